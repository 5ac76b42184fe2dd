"""Reward fine-tuning of diffusion models, exact and fast, on the memory you have."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rftcore.blocks import accelerate as accelerate
    from rftcore.blocks import report as report
    from rftcore.blocks import restore as restore
    from rftcore.build import build_info as build_info
    from rftcore.sampling import CheckpointedSampler as CheckpointedSampler
    from rftcore.sampling import GradientPath as GradientPath
    from rftcore.sampling import Trajectory as Trajectory
    from rftcore.sampling.decode import decode as decode
    from rftcore.sampling.decode import score as score
    from rftcore.training.trainer import Trainer as Trainer

__version__ = "0.1.0"

# Public name -> the module that holds it. Looked up on first use, so that `import rftcore` and the
# command line's --help do not wait for torch.
_HOME = {
    "accelerate": "rftcore.blocks",
    "build_info": "rftcore.build",
    "CheckpointedSampler": "rftcore.sampling",
    "GradientPath": "rftcore.sampling",
    "Trainer": "rftcore.training",
    "Trajectory": "rftcore.sampling",
    "decode": "rftcore.sampling",
    "report": "rftcore.blocks",
    "restore": "rftcore.blocks",
    "score": "rftcore.sampling",
}

# Packages that are used by their dotted name after a plain `import rftcore`.
_PACKAGES = ("blocks", "digits", "prompts", "rewards", "sampling", "training")

__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    if name in _PACKAGES:
        return import_module(f"rftcore.{name}")
    if name not in _HOME:
        raise AttributeError(f"module 'rftcore' has no attribute {name!r}; it has {', '.join(__all__)}")
    value = globals()[name] = getattr(import_module(_HOME[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_PACKAGES})

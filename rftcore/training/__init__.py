"""The training loop around the sampler and the losses: config, engine, resume, reports."""

from importlib import import_module
from typing import Any

# Looked up on first use: the config classes are read by `--help`, which must not wait for torch.
_HOME = {
    **{
        f"{name}Config": "rftcore.training.algorithm_configs"
        for name in (
            *("Draft", "DraftLv", "DraftPlus", "Alignprop", "Refl", "Drtune"),
            *("Ddpo", "Dpok", "Rwr", "Sft"),
        )
    },
    "Callback": "rftcore.training.callbacks",
    "Interrupted": "rftcore.errors",
    "RunError": "rftcore.errors",
    "Trainer": "rftcore.training.trainer",
    "UsageError": "rftcore.errors",
    "load_config": "rftcore.training.parsing",
}

__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    value = globals()[name] = getattr(import_module(_HOME[name]), name)
    return value

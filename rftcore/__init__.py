"""Reward fine-tuning of diffusion models, exact and fast, on the memory you have."""

from importlib import import_module

__version__ = "0.1.0"

# Public name -> the module that holds it. Looked up on first use, so that `import rftcore` and the
# command line's --help do not wait for torch.
_HOME = {
    "build_info": "rftcore.build",
    "CheckpointedSampler": "rftcore.sampling",
    "GradientPath": "rftcore.sampling",
    "Trajectory": "rftcore.sampling",
    "decode": "rftcore.sampling",
    "score": "rftcore.sampling",
}

__all__ = ["__version__", *_HOME]


def __getattr__(name):
    if name not in _HOME:
        raise AttributeError(f"module 'rftcore' has no attribute {name!r}; it has {', '.join(__all__)}")
    value = globals()[name] = getattr(import_module(_HOME[name]), name)
    return value


def __dir__():
    return sorted({*globals(), *__all__})

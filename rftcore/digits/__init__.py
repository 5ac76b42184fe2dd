"""The embedded default: a tiny but real Stable Diffusion of handwritten digits, with prompts and two judges.

``StableDiffusionPipeline.from_pretrained(rftcore.digits.path())`` loads it, without network.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

_HOME = {
    "reward": "judges",
    "held_out": "judges",
    "train_prompts": "prompts",
    "held_out_prompts": "prompts",
    "label": "prompts",
}

__all__ = ["path", *_HOME]


def path() -> str:
    """Give the folder of the shipped pipeline.

    *Raises* ``FileNotFoundError`` where it is missing.
    """
    folder = Path(__file__).parent / "pipeline"
    if not (folder / "model_index.json").is_file():
        raise FileNotFoundError(
            f"the digits pipeline is missing at {folder}: make it with `python -m rftcore.digits.pretrain`, "
            "or reinstall rftcore"
        )
    return str(folder)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

"""Rewards and prompts by name, dotted path and weight, with options of any kind: what a config says of them."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from pathlib import Path

from atheris import FuzzedDataProvider

from fuzz import drawn
from fuzz.guard import demand, tried
from rftcore import dotted, prompts
from rftcore.errors import UsageError
from rftcore.rewards import KNOWN, RewardSpecError
from rftcore.training.algorithm_configs import DraftConfig
from rftcore.training.assembly import load_judges
from rftcore.training.config import RewardConfig
from rftcore.training.parsing import build

# Those that are made without a download; each of the others says that it needs one.
_SPECS = (*sorted(KNOWN), "rftcore.rewards.brightness.brightness", "rftcore.rewards:brightness", "math.pi", "math.sin")
_OPTIONS = (
    "model",
    "dtype",
    "weights",
    "quality",
    "url",
    "checkpointing",
    "revision",
    "images",
    "x",
    "retries",
    "timeout_s",
)
_PATHS = (
    "math",
    "rftcore.rewards",
    "a",
    ".",
    "..",
    ":",
    "é",
    "\0",
    "rftcore",
    "x y",
    "json.decoder",
    "\ud800",
    "-",
    "1",
)


class _NoOthers:
    """A dotted path imports what it names: of names by chance, nothing but what is here already."""

    def find_spec(self, name: str, path=None, target=None) -> ModuleSpec | None:
        if name.partition(".")[0] in (
            "rftcore",
            "transformers",
            "torch",
            "diffusers",
            "PIL",
            "sklearn",
            "scipy",
            "numpy",
        ):
            return None
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def check(data: bytes, folder: Path) -> None:
    if not isinstance(sys.meta_path[0], _NoOthers):
        sys.meta_path.insert(0, _NoOthers())
    source = FuzzedDataProvider(data[1:])
    form = (data[0] if data else 0) % 4
    if form == 0:
        path = "".join(drawn.one_of(source, _PATHS) for _ in range(source.ConsumeIntInRange(1, 5)))
        tried((dotted.DottedPathError,), dotted.resolve, path)
    elif form == 1:
        path = "".join(drawn.one_of(source, _PATHS) for _ in range(source.ConsumeIntInRange(1, 5)))
        tried((prompts.PromptsError,), prompts.load, path)
    else:
        values = {"function": _function(source), "options": _options(source)}
        config = tried((UsageError,), build, DraftConfig, {"reward": values})
        demand(isinstance(config.reward, RewardConfig), "no config")
        judges = tried((UsageError, RewardSpecError), load_judges, config, None, None)
        demand(len(judges) == 1 and bool(judges[0].name), "no judge")


def _function(source: FuzzedDataProvider):
    kind = source.ConsumeIntInRange(0, 3)
    if kind == 0:
        count = source.ConsumeIntInRange(0, 2)
        return {drawn.one_of(source, _SPECS): drawn.one_of(source, (*drawn.NUMBERS, True)) for _ in range(count)}
    return drawn.one_of(source, _SPECS) if kind < 3 else drawn.text(source)


def _options(source: FuzzedDataProvider):
    found = {}
    for _ in range(source.ConsumeIntInRange(0, 2)):
        inner = {drawn.one_of(source, _OPTIONS): drawn.value(source, 2) for _ in range(source.ConsumeIntInRange(0, 2))}
        found[drawn.one_of(source, _SPECS)] = inner
    return found


def seeds() -> list[bytes]:
    return [
        bytes([form % 4]) + bytes((29 * k * form + 5 * form + k) % 256 for k in range(50)) for form in range(1, 150)
    ]

"""`rftcore rewards`: the rewards that ship, with what each declares of itself."""

from __future__ import annotations

import inspect
import textwrap
from typing import Any

from rftcore.dotted import resolve
from rftcore.rewards import KNOWN

_WIDTH = 120


def describe() -> str:
    """A paragraph for each known reward: what it is, its gradient, unit, range, downloads, licence and options."""
    return "\n\n".join(_paragraph(name, resolve(path)) for name, path in sorted(KNOWN.items()))


def _paragraph(name: str, reward: Any) -> str:
    range_, downloads = getattr(reward, "range", None), getattr(reward, "downloads", ())
    unit = getattr(reward, "unit", None)
    facts = {
        "gradient": "yes" if reward.differentiable else "no (DDPO, DPOK, RWR, SFT)",
        "unit": unit if range_ is None else f"{unit}, {range_[0]:g} to {range_[1]:g}",
        "loads": ", ".join(downloads),
        "licence": getattr(reward, "licence", None),
        "options": ", ".join(_options(reward)),
    }
    first_line = (inspect.getdoc(reward) or "").partition("\n")[0]
    return "\n".join([f"{name}: {first_line}", *(_line(key, value) for key, value in facts.items() if value)])


def _options(reward: Any) -> list[str]:
    """What `reward.options` may hold for it, with defaults."""
    parameters = list(inspect.signature(reward).parameters.values())
    if not inspect.isclass(reward):
        parameters = [each for each in parameters if each.kind is inspect.Parameter.KEYWORD_ONLY]
    return [
        each.name if each.default is inspect.Parameter.empty else f"{each.name}={each.default!r}" for each in parameters
    ]


def _line(key: str, value: str) -> str:
    lines = textwrap.wrap(value, _WIDTH - 12, break_long_words=False, break_on_hyphens=False)
    return f"  {key:<9} " + f"\n{' ' * 12}".join(lines)

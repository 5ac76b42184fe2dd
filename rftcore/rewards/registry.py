"""Rewards by name or dotted path, made with their options."""

from __future__ import annotations

import difflib
import functools
import inspect
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from rftcore.dotted import DottedPathError, resolve
from rftcore.rewards.option_types import expected, fits, types
from rftcore.rewards.reward import POINTS, Reward, RewardSpecError

KNOWN = {
    "adversarial": "rftcore.rewards.adversarial.Adversarial",
    "aesthetic": "rftcore.rewards.aesthetic.Aesthetic",
    "brightness": "rftcore.rewards.brightness.brightness",
    "clip_score": "rftcore.rewards.clip_score.ClipScore",
    "digits": "rftcore.digits.reward",
    "digits_held_out": "rftcore.digits.held_out",
    "file_size_compressibility": "rftcore.rewards.file_size.compressibility",
    "file_size_incompressibility": "rftcore.rewards.file_size.incompressibility",
    "hpsv2": "rftcore.rewards.hps.HPSv2",
    "hpsv2_1": "rftcore.rewards.hps.HPSv21",
    "imagereward": "rftcore.rewards.imagereward.ImageReward",
    "jpeg_compressibility": "rftcore.rewards.jpeg.Compressibility",
    "jpeg_incompressibility": "rftcore.rewards.jpeg.Incompressibility",
    "owlvit_addition": "rftcore.rewards.owlvit.Addition",
    "owlvit_removal": "rftcore.rewards.owlvit.Removal",
    "pickscore": "rftcore.rewards.pickscore.PickScore",
    "symmetry": "rftcore.rewards.symmetry.symmetry",
    "vlm_alignment": "rftcore.rewards.vlm_alignment.VlmAlignment",
}
# What a reward is called with.
_CALL = ("images", "prompts", "metadata")


def load(
    spec: str | Callable, *, differentiable: bool | None = None, options: Mapping[str, Any] | None = None
) -> Reward:
    """The reward behind a known name, "package.module.name", "package.module:name", or a function itself.

    A class is made with the options; a function is given them as keyword arguments at every call.

    Args:
        differentiable: declares it for a reward that does not.

    Raises: RewardSpecError where it is not found, cannot be made, is not callable, or is declared by neither (or by
        both, differently).
    """
    if isinstance(spec, Reward):
        return spec
    reward = load_judge(spec, options=options)
    declared = getattr(reward.function, "differentiable", None)
    if declared is None and differentiable is None:
        raise RewardSpecError(
            f"reward {reward.name!r} does not declare whether it is differentiable; decorate it with "
            "@rftcore.rewards.declare(differentiable=True or False), or set reward.differentiable in the config"
        )
    if None not in (declared, differentiable) and bool(declared) != differentiable:
        raise RewardSpecError(
            f"reward {reward.name!r} declares differentiable={bool(declared)}, but "
            f"reward.differentiable={differentiable} was asked for; leave reward.differentiable null"
        )
    return replace(reward, differentiable=bool(declared if declared is not None else differentiable))


def load_judge(spec: str | Callable, *, options: Mapping[str, Any] | None = None) -> Reward:
    """As `load`, for a reward that is only measured: one that declares no gradient is taken to have none."""
    if isinstance(spec, Reward):
        return spec
    found = _find(spec) if isinstance(spec, str) else spec
    if not callable(found):
        raise RewardSpecError(
            f"reward {spec!r} is a {type(found).__name__}, not a function (images, prompts, metadata)"
        )
    name = spec if isinstance(spec, str) and spec in KNOWN else getattr(found, "__name__", type(found).__name__)
    # Its options are under what the config calls it, which may be a dotted path.
    function = _made(found, spec if isinstance(spec, str) else name, dict(options or {}))
    return Reward(
        function=function,
        name=name,
        differentiable=bool(getattr(function, "differentiable", False)),
        unit=getattr(function, "unit", POINTS),
        range=getattr(function, "range", None),
        downloads=getattr(function, "downloads", ()),
        licence=getattr(function, "licence", None),
    )


def check_differentiable(reward: Reward, algorithm: str) -> None:
    """Raises RewardSpecError when an algorithm that follows the reward's gradient is given a reward without one."""
    if not reward.differentiable:
        broken = [repr(part.name) for part, _ in getattr(reward.function, "parts", ()) if not part.differentiable]
        which = f"{reward.name!r}, of which {', '.join(broken)}" if broken else repr(reward.name)
        raise RewardSpecError(
            f"{algorithm} follows the reward's gradient, and reward {which} declares differentiable=False; such "
            "a reward needs an algorithm that only measures it (DDPO, DPOK, RWR, SFT), or a differentiable "
            "stand-in"
        )


def _made(found: Any, name: str, options: dict[str, Any]) -> Any:
    """A class's instance, or a function that has been given its options."""
    if not inspect.isclass(found) and not options:
        return found
    taken = inspect.signature(found).parameters
    allowed = [option for option in taken if inspect.isclass(found) or option not in _CALL]
    free = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in taken.values())
    for option in options:
        if option not in allowed and not free:
            close = difflib.get_close_matches(option, allowed, n=1, cutoff=0.5)
            known = f"it takes {', '.join(allowed)}" if allowed else "it takes none"
            hint = f"did you mean {close[0]!r}? " if close else ""
            raise RewardSpecError(f"reward {name!r} has no option {option!r}; {hint}{known}")
    missing = [
        option
        for option in allowed
        if inspect.isclass(found) and taken[option].default is inspect.Parameter.empty and option not in options
        if taken[option].kind not in (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    ]
    if missing:
        raise RewardSpecError(
            f"reward {name!r} needs {', '.join(missing)}; set reward.options: {{{name}: {{{missing[0]}: ...}}}}"
        )
    wanted = types(found)
    for option, value in options.items():
        if option in wanted and not fits(value, wanted[option]):
            raise RewardSpecError(
                f"reward {name!r} has the option {option}={reprlib.repr(value)}; it must be {expected(wanted[option])}"
            )
    if inspect.isclass(found):
        return found(**options)
    return functools.update_wrapper(functools.partial(found, **options), found)


def _find(spec: str) -> Any:
    if spec.lstrip().startswith("{"):
        # A mapping of a config whose values are no numbers is left a text.
        raise RewardSpecError(
            f"rewards {spec!r} are no weighted sum: it is {{name: weight, name: weight}}, each weight a number"
        )
    if spec not in KNOWN and "." not in spec and ":" not in spec:
        close = difflib.get_close_matches(spec, KNOWN, n=1, cutoff=0.5)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise RewardSpecError(
            f"reward {spec!r} is neither a known name nor module.name; {hint}known names: {', '.join(sorted(KNOWN))}"
        )
    try:
        return resolve(KNOWN.get(spec, spec))
    except DottedPathError as error:
        raise RewardSpecError(f"reward {spec!r}: {error}") from error

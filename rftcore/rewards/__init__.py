"""Rewards: functions of images, found by name or dotted path.

A reward is `function(images, prompts, metadata) -> rewards` with images (B, 3, H, W) in [0, 1], prompts a list of B
strings, metadata a list of B dicts or None, and rewards (B,) in reward points. It declares whether its gradient with
respect to the images exists by an attribute `differentiable`; nothing is assumed for one that does not, because a
wrong guess would train nothing, or fail late.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rftcore.dotted import DottedPathError, resolve

KNOWN = {"digits": "rftcore.digits.reward", "digits_held_out": "rftcore.digits.held_out"}


class RewardSpecError(ValueError):
    """A reward that cannot be found, called, or used by the chosen algorithm."""


@dataclass(frozen=True)
class Reward:
    """A reward function with the name it is reported under, whether it has a gradient, and its unit."""

    function: Callable[..., Any]
    name: str
    differentiable: bool
    unit: str = "reward points"

    @property
    def __name__(self) -> str:
        """The name that errors about the reward give it."""
        return self.name

    def __call__(self, images, prompts: Sequence[str], metadata: Sequence[dict] | None = None):
        """Rewards (B,) of images (B, 3, H, W) in [0, 1]."""
        return self.function(images, prompts, metadata)


def declare(*, differentiable: bool, unit: str = "reward points") -> Callable[[Callable], Callable]:
    """Decorator that declares a reward function's `differentiable` and `unit`."""

    def mark(function: Callable) -> Callable:
        function.differentiable = differentiable
        function.unit = unit
        return function

    return mark


def load(spec: str | Callable, *, differentiable: bool | None = None) -> Reward:
    """The reward behind a known name, "package.module.function", "package.module:function", or a function itself.

    `differentiable` declares it for a function that does not.
    Raises: RewardSpecError where it is not found, not callable, or declared by neither (or by both, differently).
    """
    if isinstance(spec, Reward):
        return spec
    reward = load_judge(spec)
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


def load_judge(spec: str | Callable) -> Reward:
    """As `load`, for a reward that is only measured: one that declares no gradient is taken to have none."""
    if isinstance(spec, Reward):
        return spec
    function = _find(spec) if isinstance(spec, str) else spec
    if not callable(function):
        raise RewardSpecError(
            f"reward {spec!r} is a {type(function).__name__}, not a function (images, prompts, metadata)"
        )
    name = spec if isinstance(spec, str) and spec in KNOWN else getattr(function, "__name__", type(function).__name__)
    return Reward(
        function=function,
        name=name,
        differentiable=bool(getattr(function, "differentiable", False)),
        unit=getattr(function, "unit", "reward points"),
    )


def check_differentiable(reward: Reward, algorithm: str) -> None:
    """Raises RewardSpecError when an algorithm that follows the reward's gradient is given a reward without one."""
    if not reward.differentiable:
        raise RewardSpecError(
            f"{algorithm} follows the reward's gradient, and reward {reward.name!r} declares differentiable=False; "
            "such a reward needs a policy-gradient algorithm (DDPO, DPOK), or a differentiable stand-in"
        )


def _find(spec: str) -> Any:
    if spec not in KNOWN and "." not in spec and ":" not in spec:
        close = difflib.get_close_matches(spec, KNOWN, n=1, cutoff=0.5)
        hint = f"did you mean {close[0]!r}?" if close else f"known names: {', '.join(sorted(KNOWN))}"
        raise RewardSpecError(f"reward {spec!r} is neither a known name nor module.function; {hint}")
    try:
        return resolve(KNOWN.get(spec, spec))
    except DottedPathError as error:
        raise RewardSpecError(f"reward {spec!r}: {error}") from error

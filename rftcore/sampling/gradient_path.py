"""Where along a sampling chain the gradient flows, and where it is stopped."""

from __future__ import annotations

import dataclasses
import itertools
import operator
from typing import Any

MODES = ("none", "full", "detach_x", "detach_eps", "detach_input")
OUTPUTS = ("latents", "x0")
GUIDANCES = ("both", "positive")


def is_whole(number: Any) -> bool:
    """Whether a number is an integer of any kind (NumPy's too), and not a truth value."""
    return hasattr(number, "__index__") and not isinstance(number, bool)


@dataclasses.dataclass(frozen=True)
class GradientPath:
    """The gradient's way through a chain, per step, first step (most noise) first.

    A step takes x_t to x_t' = step(x_t, eps(x_t)). Its mode says what is a constant in the backward pass:

    - "full": nothing, the exact gradient (DRaFT);
    - "none": the whole step; nothing before it receives a gradient;
    - "detach_x": x_t, in both its places; the step's parameters still receive theirs;
    - "detach_eps": the UNet's output; the gradient goes on along x_t's linear path (AlignProp as released);
    - "detach_input": the UNet's input x_t; parameters and the linear path keep theirs (DRTune).

    Args:
        modes: one of the above for every step that is taken.
        stop: how many steps are taken, None for all of the sampler's (ReFL and DRTune stop early).
        output: what the last step gives: "latents", its next state, or "x0", its predicted x0.
        guidance: the branches of guidance that the gradient flows through, where there is guidance: "both", the exact
            gradient, or "positive": the negative branch is a constant, and the other's gradient is divided by the
            guidance scale, as if the UNet's output were the positive branch's (FlowBP's default; biased).

    Raises:
        ValueError: for an unknown mode, output or guidance, or when `modes` and `stop` do not agree.
    """

    modes: tuple[str, ...]
    stop: int | None = None
    output: str = "latents"
    guidance: str = "both"

    def __post_init__(self) -> None:
        object.__setattr__(self, "modes", tuple(self.modes))
        for step, mode in enumerate(self.modes):
            if mode not in MODES:
                raise ValueError(
                    f"gradient_path.modes[{step}]={mode!r} is not known; allowed are {', '.join(map(repr, MODES))}."
                )
        if self.output not in OUTPUTS:
            raise ValueError(
                f"gradient_path.output={self.output!r} is not known; allowed are {', '.join(map(repr, OUTPUTS))}."
            )
        if self.guidance not in GUIDANCES:
            raise ValueError(
                f"gradient_path.guidance={self.guidance!r} is not known; allowed are {', '.join(map(repr, GUIDANCES))}."
            )
        if not self.modes:
            raise ValueError("gradient_path.modes is empty; it needs one mode for every step that is taken.")
        if self.stop is not None and self.stop != len(self.modes):
            raise ValueError(
                f"gradient_path.stop={self.stop} and its {len(self.modes)} modes do not agree; give one mode for each "
                "step that is taken."
            )

    @classmethod
    def last(cls, backprop_steps: int | None, num_inference_steps: int) -> GradientPath:
        """The last `backprop_steps` steps in full (DRaFT-K), None for all, 0 for no gradient.

        Raises:
            ValueError: unless 0 <= backprop_steps <= num_inference_steps.
        """
        k = num_inference_steps if backprop_steps is None else backprop_steps
        if not is_whole(k) or not 0 <= k <= num_inference_steps:
            raise ValueError(
                f"backprop_steps={backprop_steps!r} must be None (the whole chain) or a whole number from 0 to "
                f"num_inference_steps={num_inference_steps}."
            )
        k = operator.index(k)
        return cls(("none",) * (num_inference_steps - k) + ("full",) * k)

    def check_length(self, num_inference_steps: int) -> None:
        """Raises ValueError unless the path fits a sampler of `num_inference_steps` steps."""
        if self.stop is None and len(self.modes) != num_inference_steps:
            raise ValueError(
                f"gradient_path has {len(self.modes)} modes and the sampler takes {num_inference_steps} steps; "
                f"give {num_inference_steps} modes, or stop={len(self.modes)} to end the chain early."
            )
        if len(self.modes) > num_inference_steps:
            raise ValueError(
                f"gradient_path.stop={self.stop} is beyond the sampler's num_inference_steps={num_inference_steps}."
            )

    @property
    def effective_modes(self) -> tuple[str, ...]:
        """The modes after what stops the gradient is drawn out: nothing flows to before a "none" or "detach_x"."""
        modes = list(self.modes)
        flows = True
        for step in reversed(range(len(modes))):
            if not flows:
                modes[step] = "none"
            elif modes[step] in ("none", "detach_x"):
                flows = False
        return tuple(modes)

    def needed(self, start: bool) -> GradientPath:
        """The path of the same gradients with "none" for every step that nothing has to flow through.

        Args:
            start: whether the chain's first state needs a gradient. If not, linear steps at the chain's beginning lead
                to nothing.
        """
        modes = list(self.effective_modes)
        if not (start and self.reaches_start):
            for step in itertools.takewhile(lambda step: modes[step] in ("none", "detach_eps"), range(len(modes))):
                modes[step] = "none"
        return dataclasses.replace(self, modes=tuple(modes))

    @property
    def differentiates(self) -> bool:
        """Whether anything at all receives a gradient."""
        return self.effective_modes[-1] != "none"

    @property
    def reaches_start(self) -> bool:
        """Whether the chain's first state receives a gradient."""
        return all(mode not in ("none", "detach_x") for mode in self.modes)

    @property
    def reaches_model(self) -> bool:
        """Whether the UNet's parameters receive a gradient."""
        return any(mode not in ("none", "detach_eps") for mode in self.effective_modes)

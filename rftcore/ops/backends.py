"""Which implementation of an op serves an input, and in words why the others do not."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch.autograd import forward_ad
from torch.nn import Parameter

from rftcore.ops import measured
from rftcore.ops.measured import Winner


@dataclass(frozen=True)
class Op:
    """An op's backends, each with its `not_supported_reasons(*inputs) -> list[str]`, in order of preference.

    On a GPU the backend comes first that was measured to be the fastest for such inputs (`ops/tables/`), and where
    nothing was measured, the one that `heuristic` names.

    Attributes:
        example: `example(device, dtype)` gives representative inputs for `rftcore info`.
        key: `key(*inputs)`: what the tables of measurements tell inputs apart by; None: nothing is measured.
        heuristic: `heuristic(*inputs)`: the backend to try first; None: the order decides.
    """

    name: str
    not_supported_reasons: dict[str, Callable[..., list[str]]]
    example: Callable[[torch.device | str, torch.dtype], tuple] = field(repr=False)
    key: Callable[..., str] | None = field(default=None, repr=False)
    heuristic: Callable[..., str | None] | None = field(default=None, repr=False)

    def winner(self, *inputs) -> Winner | None:
        """What was measured to be fastest for `inputs`; None where nothing was."""
        if self.key is None or inputs[0].device.type != "cuda":
            return None
        return measured.winner(self.name, self.key(*inputs), inputs[0].device)

    def choose(self, backend: str, *inputs) -> str:
        """The name of the backend that serves `inputs`: the one asked for; else the measured or first that can."""
        if backend == "auto":
            for name in self._order(*inputs):
                if not self.not_supported_reasons[name](*inputs):
                    return name
            raise RuntimeError(f"{self.name}: no backend serves this input. {self.explain(*inputs)}")
        if backend not in self.not_supported_reasons:
            known = ", ".join(repr(name) for name in ("auto", *self.not_supported_reasons))
            raise ValueError(f"{self.name}: backend={backend!r} is unknown; choose one of {known}.")
        if reasons := self.not_supported_reasons[backend](*inputs):
            raise RuntimeError(
                f"{self.name}: backend={backend!r} cannot serve this input: {'; '.join(reasons)}. "
                'backend="auto" takes the first that can; `rftcore info` lists them.'
            )
        return backend

    def _order(self, *inputs) -> tuple[str, ...]:
        """The backends, the one first that was measured or is believed to be the fastest."""
        on_gpu = inputs[0].device.type == "cuda"
        # On a CPU it is Triton's interpreter, for those who ask for it.
        names = tuple(name for name in self.not_supported_reasons if name != "triton" or on_gpu)
        won = self.winner(*inputs) if on_gpu else None
        first = won.backend if won is not None else self.heuristic(*inputs) if self.heuristic is not None else None
        return (first, *names) if first in names else names

    def prefer(self, backend: str, *inputs) -> str:
        """The name of the backend that serves `inputs`: `backend` where it can, else as for "auto"."""
        reasons = self.not_supported_reasons.get(backend)
        return self.choose("auto" if reasons is None or reasons(*inputs) else backend, *inputs)

    def explain(self, *inputs) -> str:
        """A sentence for each backend that cannot serve `inputs`."""
        refusals = ((name, reasons(*inputs)) for name, reasons in self.not_supported_reasons.items())
        return " ".join(f"{name}: {'; '.join(reasons)}." for name, reasons in refusals if reasons)


OPS: dict[str, Op] = {}


def register(op: Op) -> Op:
    """Adds `op` to the table that `rftcore info` prints."""
    OPS[op.name] = op
    return op


def transform_reasons() -> list[str]:
    """Why a compiled backend cannot serve any input here: it has no rule for a functorch transform or a dual number."""
    if torch.compiler.is_compiling():
        return []
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return ["a functorch transform (vmap, grad, jvp, ...) is active"]
    if forward_ad._current_level >= 0:
        return ["forward-mode differentiation is active"]
    return []


def is_plain(*tensors: torch.Tensor | None) -> bool:
    """Whether these tensors may be handed to a compiled function as raw pointers, past PyTorch's dispatcher.

    Fake, meta and zero tensors, subclasses, lazy negation and dispatch modes need the dispatcher; a raw pointer taken
    from them is null or holds other numbers than the tensor.
    """
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0:
        return False
    # A loop: a generator costs as much again as what it looks at.
    for t in tensors:
        if t is None:
            continue
        if type(t) is not torch.Tensor and type(t) is not Parameter:
            return False
        if t.is_neg() or t.is_conj() or t._is_zerotensor() or (t.data_ptr() == 0 and t.numel() != 0):
            return False
    return True

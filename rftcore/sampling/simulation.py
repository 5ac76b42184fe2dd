"""Evaluations of a UNet on tensors without data, that take no memory: their bytes and FLOPs, counted."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.attention import SDPBackend, _cur_sdpa_kernel_backends, sdpa_kernel
from torch.nn.modules import module as globals_of_modules
from torch.utils._python_dispatch import _disable_current_modes

from rftcore.blocks import costs, once, recompute
from rftcore.blocks.served import served
from rftcore.counting import FLOPs, PeakBytes
from rftcore.sampling.constants import has_constants
from rftcore.sampling.decode import decode
from rftcore.sampling.denoiser import Denoiser

# Of a layer's name, the values that it makes again; the name of one of the blocks' levels; None: as it stands.
Level = Mapping[str, tuple[str, ...]] | str | None

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Unpredictable(Exception):
    """Why an evaluation cannot be counted without running it."""


class Forward(NamedTuple):
    """An evaluation without a graph.

    Attributes:
        flops: of its matrix products, convolutions and attentions.
        peak: bytes at its largest, beyond what was there before; its output is among them.
    """

    flops: int
    peak: int


class Step(NamedTuple):
    """An evaluation with a graph, and its backward.

    Attributes:
        kept: bytes between the two.
        forward_peak, backward_peak: bytes at their largest, beyond what was there before the forward.
        forward_flops, backward_flops: the backward's with what it makes again.
    """

    kept: int
    forward_peak: int
    backward_peak: int
    forward_flops: int
    backward_flops: int

    @property
    def peak(self) -> int:
        """Bytes at their largest in both."""
        return max(self.forward_peak, self.backward_peak)


class Constants(NamedTuple):
    """What is made once for a chain and given to each evaluation.

    Attributes:
        kept: bytes of it.
        wanted: bytes of what of it has a gradient, which is summed up over the steps.
        sums: bytes of those sums, in fp32 or wider.
        peak: bytes at their largest while it is made, or made again for its gradient, beyond `kept`.
    """

    kept: int
    wanted: int
    sums: int
    peak: int


class Simulation:
    """A UNet's twin, whose tensors have shapes and dtypes and no data.

    It evaluates as the sampler does, under the autocast that holds where it is made and the attention kernels that hold
    where it is called. The UNet itself is not run, and nothing is counted twice.

    Args:
        denoiser: of the UNet.
        conditioning: the UNet's other inputs by name, as for `Denoiser`; only the shape of a row and the dtype count.
        height, width: of the latents.
        guided: whether both branches of guidance are run.

    Attributes:
        model: the twin.
        accelerated: whether it is.
        trained_bytes: of the sums of the parameters' gradients.

    Raises:
        Unpredictable: for a UNet that does more than its modules' own forwards.
    """

    def __init__(
        self, denoiser: Denoiser, conditioning: Mapping[str, Tensor], height: int, width: int, *, guided: bool
    ) -> None:
        if reasons := unpredictable_reasons(denoiser.module):
            raise Unpredictable("; ".join(reasons))
        self._mode = FakeTensorMode()
        self._denoiser = copy.copy(denoiser)
        self.model = self._denoiser.model = self._denoiser.module = _twin(denoiser.model, self._mode)
        self._autocast = _autocast(denoiser.module, denoiser.model)
        self.accelerated = _is_accelerated(self.model)
        self._conditioning = {name: (tuple(t.shape[1:]), t.dtype) for name, t in conditioning.items()}
        self._size = height, width
        self._rows = 2 if guided else 1
        self._guided = guided
        # In fp32 or wider, whatever the parameters are.
        self.trained_bytes = sum(p.numel() * max(4, p.itemsize) for p in self.model.parameters() if p.requires_grad)
        # As the chain asks, whose evaluations are then given what is made once.
        self._has_constants = has_constants(self._denoiser)
        self._given: dict[int, dict[str, Tensor]] = {}
        self._forwards: dict[int, Forward] = {}
        self._steps: dict = {}
        self._priced: dict[int, list[tuple[str, costs.Item]]] = {}
        self._constants: dict[tuple[int, int], Constants] = {}

    def forward(self, images: int) -> Forward:
        """One evaluation of `images` latents without a graph."""
        if images not in self._forwards:
            with _without_data(self._mode, self._autocast), torch.no_grad():
                x, t, conditioning = self._inputs(images)
                with self._constants_given(images), FLOPs() as counted, PeakBytes() as live:
                    self._denoiser(x, t, conditioning, guided=self._guided)
            self._forwards[images] = Forward(counted.total, live.peak)
        return self._forwards[images]

    def step(self, images: int, level: Level) -> Step:
        """One evaluation of `images` latents and the gradients of latents and parameters."""
        key = images, level if level is None or isinstance(level, str) else tuple(sorted(level.items()))
        if key not in self._steps:
            with _without_data(self._mode, self._autocast), torch.enable_grad(), _recompute(self.model, level):
                x, t, conditioning = self._inputs(images)
                with self._constants_given(images) as given:
                    wanted = [x.requires_grad_(), *(tensor for tensor in given.values() if tensor.requires_grad)]
                    wanted += [p for p in self.model.parameters() if p.requires_grad]
                    self._steps[key] = _count(lambda: self._denoiser(x, t, conditioning, guided=self._guided), wanted)
        return self._steps[key]

    def priced(self, images: int) -> list[tuple[str, costs.Item]]:
        """The layers' values that can be made again, each with its layer's name; none where nothing is accelerated."""
        if not self.accelerated:
            return []
        if images not in self._priced:
            self._priced[images] = self._priced_anew(images)
        return self._priced[images]

    def _priced_anew(self, images: int) -> list[tuple[str, costs.Item]]:
        size, text = (images * self._rows, *self._size), self._conditioning.get("prompt_embeds")
        options: dict[str, Any] = {"given": self._has_constants}
        if text is not None:
            options["tokens"] = text[0][0]
        with _disable_current_modes():
            found = list(costs.priced(self.model, *size, self._denoiser.dtype, self._autocast, **options))
        return [(layer.name, item) for layer, cost in found for item in cost.items]

    def constants(self, images: int, steps: int) -> Constants:
        """What is made once for a chain of so many steps."""
        if not self._has_constants:
            return Constants(0, 0, 0, 0)
        if (images, steps) not in self._constants:
            self._constants[images, steps] = self._constants_anew(images, steps)
        return self._constants[images, steps]

    def _constants_anew(self, images: int, steps: int) -> Constants:
        with _without_data(self._mode, self._autocast), torch.enable_grad(), PeakBytes() as live:
            made = self._compute(images, steps)
            values = [*made.text.values(), *made.time.values()]
            wanted = [tensor for tensor in values if tensor.requires_grad]
            trained = [p for p in self.model.parameters() if p.requires_grad]
            if wanted:
                torch.autograd.grad(wanted, trained, [torch.empty_like(t) for t in wanted], allow_unused=True)
        kept = sum(tensor.nbytes for tensor in values)
        sums = sum(tensor.numel() * max(4, tensor.itemsize) for tensor in wanted)
        return Constants(kept, sum(tensor.nbytes for tensor in wanted), sums, live.peak - kept)

    def _compute(self, images: int, steps: int) -> once.Values:
        _, _, conditioning = self._inputs(images)
        text, dtype = conditioning.pop("prompt_embeds", None), self._denoiser.dtype
        passed = self._denoiser.extra.get("cross_attention_kwargs", {})
        times = torch.empty(steps, dtype=torch.int64)
        return once.compute(
            self.model, times, None if text is None else text.to(dtype), conditioning or None, passed, dtype
        )

    @contextlib.contextmanager
    def _constants_given(self, images: int) -> Iterator[dict[str, Tensor]]:
        """Evaluations inside are given what the chain makes once; it yields that, by name."""
        if not self._has_constants:
            yield {}
            return
        if images not in self._given:
            with torch.enable_grad():
                made = self._compute(images, 1).at(0)
            self._given[images] = {name: t.detach().requires_grad_(t.requires_grad) for name, t in made.items()}
        with once.given(self.model, self._given[images]):
            yield self._given[images]

    def latent_bytes(self, images: int) -> int:
        """Of one state of the chain."""
        height, width = self._size
        return images * self._denoiser.config.in_channels * height * width * self._denoiser.state_dtype.itemsize

    def output_bytes(self, images: int) -> int:
        """Of the UNet's output, of both branches of guidance."""
        state, own = self._denoiser.state_dtype, self._denoiser.dtype
        return self._rows * self.latent_bytes(images) // state.itemsize * own.itemsize

    def _inputs(self, images: int) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        height, width = self._size
        x = torch.empty(images, self._denoiser.config.in_channels, height, width, dtype=self._denoiser.state_dtype)
        rows = images * self._rows
        conditioning = {
            name: torch.empty(rows, *shape, dtype=dtype) for name, (shape, dtype) in self._conditioning.items()
        }
        return x, torch.empty((), dtype=torch.int64), conditioning


def decoding(
    vae: nn.Module, height: int, width: int, *, images: int = 1, level: Level = None, gradient: bool = True
) -> Step:
    """Decoding latents (images, C, height, width) to images, and the gradient of the latents where it is asked for.

    Raises:
        Unpredictable: for an autoencoder that does more than its modules' own forwards.
    """
    if reasons := unpredictable_reasons(vae):
        raise Unpredictable("; ".join(reasons))
    mode = FakeTensorMode()
    twin = _twin(vae, mode)
    with _without_data(mode, _autocast(vae)), torch.set_grad_enabled(gradient), _recompute(twin, level):
        state = torch.promote_types(next(twin.parameters()).dtype, torch.float32)
        latents = torch.empty(images, vae.config.latent_channels, height, width, dtype=state, requires_grad=gradient)
        return _count(lambda: decode(twin, latents, images_per_call=images), [latents])


def _count(evaluate: Callable[[], Tensor], wanted: Sequence[Tensor]) -> Step:
    """What `evaluate` and the gradients of its output take."""
    with PeakBytes() as live:
        with FLOPs() as forward:
            output = evaluate()
        kept, forward_peak = live.live, live.peak
        live.peak = 0
        with FLOPs() as backward:
            if output.requires_grad:
                torch.autograd.grad(output, wanted, torch.empty_like(output), allow_unused=True)
    return Step(kept, forward_peak, live.peak, forward.total, backward.total)


@contextlib.contextmanager
def _without_data(mode: FakeTensorMode, autocast: torch.dtype | None) -> Iterator[None]:
    """Runs the block in `mode`, without the caller's modes. Raises: Unpredictable for what does not run so."""
    only_math = _cur_sdpa_kernel_backends() == [SDPBackend.MATH]
    kernels = [SDPBackend.MATH] if only_math else [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
    with contextlib.ExitStack() as stack:
        stack.enter_context(_disable_current_modes())
        stack.enter_context(sdpa_kernel(kernels))
        stack.enter_context(torch.autocast("cpu", dtype=autocast, enabled=autocast is not None, cache_enabled=False))
        stack.enter_context(mode)
        try:
            yield
        except (RuntimeError, TypeError, ValueError, AttributeError) as error:
            raise Unpredictable(f"it does not run on tensors without data: {type(error).__name__}: {error}") from error


def _recompute(model: nn.Module, level: Level) -> contextlib.AbstractContextManager[Any]:
    """Sets what each layer makes again, where the model is accelerated."""
    if level is None or not _is_accelerated(model):
        return contextlib.nullcontext()
    return recompute(model, level)


def _is_accelerated(model: nn.Module) -> bool:
    return any(served(module) for module in model.modules())


def unpredictable_reasons(module: nn.Module) -> list[str]:
    """Why evaluations of a UNet, wrapped as it is, cannot be counted on tensors without data."""
    if hasattr(module, "_orig_mod") or module._compiled_call_impl is not None:
        return ["it is compiled, and the compiler decides what is kept"]
    reasons = []
    if any(getattr(globals_of_modules, f"_global{name}") for name in _HOOKS):
        reasons.append("hooks for all modules are registered (torch.nn.modules.module)")
    for name, child in module.named_modules():
        own_forward = "forward" in child.__dict__ and served(child) is None and not _is_prepared(child)
        if any(child.__dict__[hooks] for hooks in _HOOKS) or own_forward:
            what = "a forward of its own" if own_forward else "hooks"
            reasons.append(f"{name or 'the UNet'} has {what}, which are not to be called without data")
            break
    strange = [name for name, p in module.named_parameters() if type(p) not in (Tensor, nn.Parameter, FakeTensor)]
    if strange:
        reasons.append(f"{strange[0]} is no plain parameter")
    return reasons


def _is_prepared(module: nn.Module) -> bool:
    """Whether the library accelerate has put its autocast around the module's forward."""
    return "_original_forward" in module.__dict__ and "_hf_hook" not in module.__dict__


def _autocast(*modules: nn.Module) -> torch.dtype | None:
    """The dtype that autocast lowers to in these modules' forwards."""
    kind = next(modules[0].parameters()).device.type
    if torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    if any(_is_prepared(module) for module in modules):
        return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(AcceleratorState().mixed_precision)
    return None


def _twin(model: nn.Module, mode: FakeTensorMode) -> nn.Module:
    """A copy of the model whose parameters and buffers have no data."""
    fakes: dict[int, Tensor] = {}
    # A mode of the caller's may count what is made.
    with _disable_current_modes():
        for tensor in (*model.parameters(), *model.buffers()):
            with mode:
                fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
            if isinstance(tensor, nn.Parameter):
                fake = nn.Parameter(fake, requires_grad=tensor.requires_grad)
            fakes[id(tensor)] = fake
        try:
            twin = copy.deepcopy(model, fakes)
        except (RuntimeError, TypeError) as error:
            raise Unpredictable(f"it cannot be copied: {error}") from error
    if _is_prepared(twin):
        del twin.forward
    for module in twin.modules():
        if ours := served(module):
            # The backend that was asked for may serve the device only.
            ours.place.serving.backends.clear()
    return twin

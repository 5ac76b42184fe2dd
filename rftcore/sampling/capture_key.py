"""What a captured chain has built in, so that a change of it captures anew, and why a module cannot be captured."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from torch.nn.modules import module as globals_of_modules
from torch.nn.modules.dropout import _DropoutNd
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from rftcore.blocks.served import Served
from rftcore.ops import backends
from rftcore.sampling.ambient import Ambient

# Whose Python code is known to do nothing that a launch of the captured kernels would leave out.
_KNOWN_CODE = {"torch", "diffusers", "transformers", "peft", "accelerate", "rftcore"}
_SWITCHES = ("_active_adapter", "_disable_adapters", "merged_adapters", "scaling")
_GLOBAL_HOOKS = (
    "_global_forward_hooks",
    "_global_forward_pre_hooks",
    "_global_backward_hooks",
    "_global_backward_pre_hooks",
)
_WEIGHTS = (Tensor, nn.Parameter, nn.Buffer)


class CaptureKey(NamedTuple):
    """What is the same in all chains that may launch the same graphs. Hashable.

    Hooks are not in it: where there are any, `reasons` has words against capturing.

    Attributes:
        given: what the caller says of its chain.
        inputs: dtype, shape, strides and device of its tensors.
        ambient: autocast, attention kernels, precision and determinism.
        modules: class, mode and forward of every module.
        adapters: active and merged adapters, and their scales, which are numbers in the launches.
        tensors: of every parameter and buffer a hash of address, dtype, shape, strides and whether it requires grad.
    """

    given: Hashable
    inputs: tuple
    ambient: tuple
    modules: tuple
    adapters: tuple
    tensors: tuple

    def differences(self, other: CaptureKey) -> list[str]:
        """The names of the attributes that differ."""
        return [name for name, a, b in zip(self._fields, self, other, strict=True) if a != b]


class _Same:
    """An object that is equal to itself alone, and is not let go of: its address would be another's."""

    __slots__ = ("thing",)

    def __init__(self, thing: Any) -> None:
        self.thing = thing

    def __eq__(self, other: object) -> bool:
        return type(other) is _Same and other.thing is self.thing

    def __hash__(self) -> int:
        return id(self.thing)


def capture_key(module: nn.Module, inputs: Sequence[Tensor], given: Hashable = ()) -> CaptureKey:
    """The key of a chain that evaluates `module` as it is now, in the surroundings of now.

    Args:
        inputs: the chain's, such as latents and embeddings: only what they look like counts.
        given: what else the chain does: its number of steps, guidance, plan, constants that it hands to the module.
    """
    # One flat pass: it runs before every chain, over 2,000 modules of an adapted SD1.5 (2 ms).
    modules: list[Any] = []
    adapters: list[Hashable] = []
    tensors: list[int] = []
    stack = [module]
    adapted: dict[type, bool] = {}
    while stack:
        child = stack.pop()
        attributes, kind = child.__dict__, type(child)
        modules.append(kind)
        modules.append(attributes["training"])
        if "forward" in attributes:
            modules.append(_Same(attributes["forward"]))
        if "processor" in attributes:
            modules.append(_Same(attributes["processor"]))
        if (switched := adapted.get(kind)) is None:
            switched = adapted[kind] = issubclass(kind, (BaseTunerLayer, AuxiliaryTrainingWrapper))
        if switched:
            adapters.append(tuple(_frozen(attributes.get(name)) for name in _SWITCHES))
        for held in (attributes["_parameters"], attributes["_buffers"]):
            if held:
                for t in held.values():
                    if t is not None:
                        tensors.append(hash((t.data_ptr(), t.dtype, t.shape, t.stride(), t.requires_grad)))
        if attributes["_modules"]:
            stack += [m for m in attributes["_modules"].values() if m is not None]
    device = inputs[0].device if inputs else torch.device("cpu")
    return CaptureKey(
        given,
        tuple((x.dtype, x.shape, x.stride(), x.device) for x in inputs),
        (Ambient.capture(device), *_flags()),
        tuple(modules),
        tuple(adapters),
        tuple(tensors),
    )


def reasons(module: nn.Module, differentiates: bool = True, device_type: str = "cuda") -> list[str]:
    """Why chains through `module` cannot be captured as it is now, in words; empty where they can.

    Args:
        differentiates: whether the chain has a backward pass.
        device_type: where its recorder captures.
    """
    found = _reasons_of_surroundings()
    kinds: dict[str, list[nn.Module]] = {}
    differentiates = differentiates and torch.is_grad_enabled()
    known: dict[type, list[str]] = {}
    stack = [module]
    while stack:
        child = stack.pop()
        attributes, kind = child.__dict__, type(child)
        if (of_kind := known.get(kind)) is None:
            of_kind = known[kind] = list(_reasons_of_kind(kind))
        of_module = _reasons_of_module(child, attributes, differentiates)
        for held in (attributes["_parameters"], attributes["_buffers"]):
            if held:
                of_module += _reasons_of_weights(held, device_type)
        if of_kind or of_module:
            for reason in (*of_kind, *of_module):
                kinds.setdefault(reason, []).append(child)
        if attributes["_modules"]:
            stack += [m for m in attributes["_modules"].values() if m is not None]
    for reason, children in kinds.items():
        first = next(name for name, child in module.named_modules() if child in children)
        others = f" and {len(children) - 1} more" if len(children) > 1 else ""
        found.append(f"{reason} ({first or type(module).__name__}{others})")
    return found


def _reasons_of_surroundings() -> list[str]:
    found = backends.transform_reasons()
    if torch._C._len_torch_dispatch_stack() > 0:
        found.append("a dispatch mode is active, which would see no operation of a launched graph")
    modes = [mode for mode in _get_current_function_mode_stack() if type(mode) is not DeviceContext]
    if modes:
        found.append(f"the mode {type(modes[-1]).__name__} is active, which would see no function of a launched graph")
    if torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
        found.append("saved_tensors_hooks are active, which would see no tensor of a launched graph")
    if torch.is_anomaly_enabled():
        found.append("anomaly detection is on, which looks at every gradient's numbers")
    if any(getattr(globals_of_modules, name) for name in _GLOBAL_HOOKS):
        found.append("hooks for all modules are registered (torch.nn.modules.module)")
    return found


def _reasons_of_kind(kind: type[nn.Module]) -> Iterator[str]:
    if issubclass(kind, torch.jit.ScriptModule):
        yield "it is a TorchScript module"
    elif (root := _root(kind.forward)) not in _KNOWN_CODE:
        yield f"the forward of {kind.__name__} is {root}'s code, which a launched graph would leave out"


def _reasons_of_module(module: nn.Module, attributes: dict[str, Any], differentiates: bool) -> list[str]:
    # Run for every module before every chain: no generator, and nothing looked up the long way.
    found: list[str] = []
    # What accelerate's `prepare` wraps is put aside.
    for name in ("forward", "_original_forward"):
        if name in attributes:
            forward = attributes[name]
            if type(forward) is not Served and _root(forward) not in _KNOWN_CODE:
                found.append("it has a forward of its own, which a launched graph would leave out")
    if "processor" in attributes:
        processor = type(attributes["processor"])
        if (root := _root(processor.__call__)) not in _KNOWN_CODE:
            found.append(f"{processor.__name__} is {root}'s code, which a launched graph would leave out")
    if "_hf_hook" in attributes:
        found.append(f"accelerate's {type(attributes['_hf_hook']).__name__} is attached, which may move weights")
    elif (
        attributes["_forward_hooks"]
        or attributes["_forward_pre_hooks"]
        or attributes["_backward_hooks"]
        or attributes["_backward_pre_hooks"]
    ):
        found.append("it has hooks, which a launched graph would leave out")
    if "_orig_mod" in attributes["_modules"] or attributes.get("_compiled_call_impl") is not None:
        found.append("torch.compile wraps it, which has graphs of its own")
    if differentiates and attributes.get("gradient_checkpointing"):
        found.append("gradient checkpointing is switched on, which reads the generators' states")
    if attributes.get("p") and isinstance(module, _DropoutNd) and module.training:
        found.append(f"dropout p={module.p} is active: its masks are drawn inside, and again in a replay")
    if attributes.get("_disable_adapters") and isinstance(module, BaseTunerLayer) and module.merged:
        found.append("merged adapters are disabled: PEFT's forward unmerges them, and would again at every launch")
    return found


def _reasons_of_weights(held: dict[str, Tensor | None], device_type: str) -> list[str]:
    found = []
    for tensor in held.values():
        if tensor is not None and type(tensor) not in _WEIGHTS:
            found.append(f"it holds a {type(tensor).__name__}")
        elif tensor is not None and tensor.device.type != device_type:
            found.append(f"it is on {tensor.device}, graphs are captured on {device_type}")
    return found


def _root(function: Any) -> str:
    """The package of a function's code, through bound methods and partials."""
    function = getattr(function, "__func__", function)
    function = getattr(function, "func", function)
    name = getattr(function, "__module__", None) or type(function).__module__
    return name.partition(".")[0]


def _frozen(value: Any) -> Hashable:
    if isinstance(value, dict):
        return tuple(sorted((name, _frozen(entry)) for name, entry in value.items()))
    if isinstance(value, Tensor):
        return _Same(value)
    return tuple(value) if isinstance(value, list) else value


def _flags() -> tuple:
    """PyTorch's global switches that choose among kernels."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        matmul.fp32_precision,
        cudnn.conv.fp32_precision,  # type: ignore[attr-defined]  # torch's stubs lack it
        torch._C._get_cublas_allow_fp16_reduced_precision_reduction(),
        torch._C._get_cublas_allow_bf16_reduced_precision_reduction(),
        matmul.allow_fp16_accumulation,
        torch._C._get_blas_preferred_backend(),
        torch._C._get_cudnn_enabled(),
        torch._C._get_cudnn_benchmark(),
        torch._C._get_cudnn_deterministic(),
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,  # type: ignore[attr-defined]  # torch's stubs lack it
    )

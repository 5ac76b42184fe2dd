"""The way from an op to its compiled functions: definition, dtype codes, raw pointers, and why it may be closed."""

import re
from collections.abc import Callable, Sequence
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from rftcore import build
from rftcore.ops import backends

# Codes shared with csrc/common.
DTYPES = {torch.float64: 0, torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}

_LIBRARY = torch.library.Library("rftcore", "FRAGMENT")


def maths_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype of all arithmetic: fp64 where an input is fp64, else fp32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def define(
    schema: str, function: Callable, fake: Callable, devices: Sequence[str], in_place: Callable | None = None
) -> Callable:
    """Defines the op `rftcore::<schema>`, served by `function` on `devices` ("CPU", "CUDA"), traced through `fake`.

    Args:
        in_place: what to call past the dispatcher instead of `function`, where it may change arguments that the schema
            does not name.

    Returns:
        the way to call it: past the dispatcher where its tensors allow that (9 us against 13 us, an EPYC core).
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=torch.Tag.pt2_compliant_tag)
    torch.library.register_fake(f"rftcore::{name}", fake, lib=_LIBRARY)
    for device in devices:
        _LIBRARY.impl(name, function, device)
    through_dispatcher = getattr(torch.ops.rftcore, name)

    def call(*arguments):
        tensors = []
        for a in arguments:
            if isinstance(a, Tensor):
                tensors.append(a)
            elif isinstance(a, list):
                tensors.extend(t for t in a if isinstance(t, Tensor))
        return (in_place or function)(*arguments) if backends.is_plain(*tensors) else through_dispatcher(*arguments)

    return call


def address(tensor: Tensor | None) -> int:
    """Where the tensor's first element lies; null where there is no tensor."""
    return 0 if tensor is None else tensor.data_ptr()


def vector(tensor: Tensor | None) -> tuple[int, int]:
    """A csrc/common/vector.h `Vector`: address and dtype code."""
    return (0, 0) if tensor is None else (tensor.data_ptr(), DTYPES[tensor.dtype])


def module(device: torch.device) -> ModuleType:
    """The compiled module that serves tensors on `device`."""
    return build.load("_cuda" if device.type == "cuda" else "_cpu")


def launch(name: str, device: torch.device, *arguments) -> None:
    """Calls the compiled function `name` of the device's module with its stream, or its number of threads."""
    function = getattr(module(device), name)
    if device.type != "cuda":
        function(*arguments, torch.get_num_threads())
    elif device.index == torch.cuda.current_device():
        # What torch.cuda.current_stream() wraps in an object.
        function(*arguments, torch._C._cuda_getCurrentRawStream(device.index))
    else:
        with torch.cuda.device(device):
            function(*arguments, torch._C._cuda_getCurrentRawStream(device.index))


def reasons(module: str, device_type: str, argument: str) -> Callable[..., list[str]]:
    """`not_supported_reasons` of a compiled module; `argument` names the op's first input, which it looks at."""
    missing = build.why_not_loaded(module)

    def not_supported_reasons(first: Tensor, *others) -> list[str]:
        found = backends.transform_reasons()
        if first.device.type != device_type:
            found.append(f"it serves {device_type} tensors, {argument} is on {first.device}")
        if missing is not None:
            found.append(missing)
        elif device_type == first.device.type == "cuda" and (refusal := _why_not_on(first.device)) is not None:
            found.append(refusal)
        return found

    return not_supported_reasons


def has_code_for(capability: tuple[int, int], architectures: str) -> bool:
    """Whether a GPU of this compute capability runs what was compiled for CMAKE_CUDA_ARCHITECTURES `architectures`."""
    device = 10 * capability[0] + capability[1]
    for number, feature, kind in re.findall(r"(\d+)([af]?)(-real|-virtual)?", architectures):
        compiled = int(number)
        binary = kind != "-virtual" and compiled // 10 == capability[0] and compiled <= device
        translated = kind != "-real" and compiled <= device
        if compiled == device or (not feature and (binary or translated)):
            return True
    # "native" and "all" say no number.
    return not re.search(r"\d", architectures)


def _why_not_on(device: torch.device) -> str | None:
    """Why the kernels of `_cuda` cannot run on this GPU, or None."""
    return _refusal(device)


# torch.compile reads it while it traces: torch.compiler.assume_constant_result, without the import of dynamo.
_why_not_on._dynamo_marked_constant = True  # type: ignore[attr-defined]  # functions take attributes


@cache
def _refusal(device: torch.device) -> str | None:
    if torch.version.hip is not None:
        return f"it is for NVIDIA GPUs, {device} is none"
    if not torch.cuda.is_available():  # fake tensors: nothing runs
        return None
    cuda = build.load("_cuda")
    info = cuda.build_info()
    capability = torch.cuda.get_device_capability(device)
    if not has_code_for(capability, info["architectures"]):
        return (
            f"it was compiled for {info['architectures']}, {device} has compute capability "
            f"{capability[0]}.{capability[1]}; CMAKE_CUDA_ARCHITECTURES says what to compile for"
        )
    # Its runtime is its own, and may ask for a newer driver than PyTorch's does.
    if error := cuda.why_no_device():
        return f"it was compiled by {info['compiler']}, whose runtime says: {error}"
    return None


def torch_reasons(argument: str) -> Callable[..., list[str]]:
    """`not_supported_reasons` of PyTorch's own operations inside an op that `define` made."""

    def not_supported_reasons(first: Tensor, *others) -> list[str]:
        found = backends.transform_reasons()
        if first.device.type not in ("cpu", "cuda", "meta"):
            found.append(f"it serves cpu and cuda tensors, {argument} is on {first.device}")
        return found

    return not_supported_reasons


def differentiate(reference: Callable, tensors: Sequence, needs: Sequence[bool], grad: Tensor) -> list:
    """Gradients of those `tensors` that need one, None for the others, by autograd through `reference`, run again."""
    leaves = [t.detach().requires_grad_() if needed else t for t, needed in zip(tensors, needs, strict=True)]
    with torch.enable_grad():
        output = reference(*leaves)
    wanted = [leaf for leaf, needed in zip(leaves, needs, strict=True) if needed]
    found = iter(torch.autograd.grad(output, wanted, grad))
    return [next(found) if needed else None for needed in needs]


def backward(node: type[torch.autograd.Function], *arguments):
    """An op's backward, as a node of its own only where a graph of it is recorded (create_graph=True)."""
    return node.apply(*arguments) if torch.is_grad_enabled() else node.forward(None, *arguments)


def differentiated_twice(op: str, remedy: str = 'backend="reference" does') -> RuntimeError:
    """What the backward of an op's own backward raises: an error and not a wrong number."""
    return RuntimeError(
        f"{op}: its gradient was differentiated a second time (create_graph=True), which its own backward does not "
        f"support; {remedy}."
    )


def check_tensor(op: str, name: str, tensor: Tensor) -> None:
    """Raises: ValueError where `tensor` is not a dense tensor of a dtype that the kernels serve."""
    if tensor.dtype not in DTYPES or tensor.layout != torch.strided:
        raise ValueError(
            f"{op}: {name} is {tensor.dtype}, {tensor.layout}; it must be a dense fp64, fp32, bf16 or fp16 tensor. "
            f"Convert it: {name}.to(torch.float32)."
        )


def check_gradient(op: str, grad: Tensor, value: Tensor) -> None:
    """Raises: ValueError where a gradient has another dtype than `value`, which the kernels take it to have."""
    if grad.dtype != value.dtype:
        raise ValueError(f"{op}: the gradient is {grad.dtype}, it must be {value.dtype}; convert it.")


def check_like(op: str, name: str, tensor: Tensor, shape: Sequence[int], device: torch.device, first: str) -> None:
    """Raises: ValueError where `tensor` is not of `shape`, a served dtype and on the device of the input `first`."""
    check_tensor(op, name, tensor)
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{op}: {name} is {tuple(tensor.shape)}; for this {first} it must be {tuple(shape)}.")
    if tensor.device != device:
        raise ValueError(
            f"{op}: {name} is on {tensor.device}, {first} on {device}; move it: {name}.to({first}.device)."
        )

"""Captured graphs emulated on the CPU: operations are recorded, with their addresses in a pool that is really reused.

What differs from CUDA is that nothing is faster. What does not: while a segment is captured nothing is executed; a
launch repeats the operations on the addresses of then, whatever Python holds there by now; memory that was let go of is
given to what is captured next; and what a capture forbids is an error.
"""

import contextlib
import weakref

import numpy
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

_ALIGNMENT = 64
_WAITING = ("aten::_local_scalar_dense", "aten::equal", "aten::nonzero", "aten::is_nonzero", "aten::_unique2")
_UNINITIALISED = (
    "aten::empty",
    "aten::empty_like",
    "aten::empty_strided",
    "aten::new_empty",
    "aten::new_empty_strided",
)


class CaptureError(RuntimeError):
    """What CUDA would refuse."""


class RecordedGraphs:
    """A `graphs.Recorder`.

    Attributes:
        calls: what the driver called, in order.
        fail_at: the number of the capture that fails at its end, counted from 0.
        live: bytes of the pool that something holds.
        bytes: the most that the pool ever held at a time, with its gaps.
    """

    def __init__(self, size: int = 2**26) -> None:
        # All bits set are a NaN in every floating-point format.
        self._memory = numpy.full(size, 255, numpy.uint8)
        self._base = torch.from_numpy(self._memory)
        self._blocks: dict[int, int] = {}
        self._released: list[tuple[int, int]] = []
        self._recording: list | None = None
        self._leaves = WeakIdKeyDictionary()
        self.calls: list[str] = []
        self.fail_at: int | None = None
        self.bytes = 0

    @property
    def live(self) -> int:
        return sum(self._blocks.values())

    def prepare(self) -> None:
        self.calls.append("prepare")

    def warm_up(self, work):
        self.calls.append("warm up")
        return work()

    def capture(self, work):
        self.calls.append("capture")
        # What was let go of before is overwritten in a launch, too, as soon as this graph begins.
        steps = [_Poison(*block) for block in self._released]
        self._released.clear()
        self._recording = steps
        try:
            with _Functions(self), _Operations(self):
                result = work()
            if self.calls.count("capture") - 1 == self.fail_at:
                raise CaptureError("operation failed due to a previous error during capture")
        finally:
            self._recording = None
        return (lambda: self._launch(steps)), result

    def _launch(self, steps) -> None:
        self.calls.append("launch")
        with torch.no_grad():
            for step in steps:
                step.launch(self)

    def allocate(self, size: int) -> torch.Tensor:
        """A byte tensor in the pool, whose block is free again when its storage goes."""
        size = -(-size // _ALIGNMENT) * _ALIGNMENT
        offset = 0
        for start in sorted(self._blocks):
            if start - offset >= size:
                break
            offset = start + self._blocks[start]
        if offset + size > len(self._memory):
            raise torch.OutOfMemoryError("the emulated pool is full")
        self._blocks[offset] = size
        self.bytes = max(self.bytes, offset + size)
        block = self._memory[offset : offset + size]
        block.fill(255)
        weakref.finalize(block, self._release, offset)
        return torch.from_numpy(block)

    def _release(self, offset: int) -> None:
        block = offset, self._blocks.pop(offset)
        if self._recording is not None:
            self._recording.append(_Poison(*block))
        else:
            self._released.append(block)

    def holds(self, tensor: torch.Tensor) -> bool:
        address = tensor.untyped_storage().data_ptr() - self._base.data_ptr()
        return 0 <= address < len(self._memory)

    def remember(self, tensor):
        """Where the tensor lies: recording keeps none alive."""
        if not isinstance(tensor, torch.Tensor):
            return tensor
        storage, offset = tensor.untyped_storage(), tensor.storage_offset()
        if self.holds(tensor):
            offset += (storage.data_ptr() - self._base.data_ptr()) // tensor.element_size()
            storage = self._base.untyped_storage()
        return _Address(StorageWeakRef(storage), offset, tensor.dtype, tensor.size(), tensor.stride())

    def poison(self, offset: int, size: int) -> None:
        self._memory[offset : offset + size] = 255


class _Address:
    """Of a tensor, by its storage and the elements from its beginning."""

    def __init__(self, storage, offset, dtype, size, stride) -> None:
        self._storage, self._dtype = storage, dtype
        self._place = offset, size, stride

    def tensor(self) -> torch.Tensor:
        storage = torch.UntypedStorage._new_with_weak_ptr(self._storage.cdata)
        if storage is None:
            raise CaptureError("a launched graph reads or writes a tensor that is gone: illegal memory access")
        return torch.empty(0, dtype=self._dtype).set_(storage, *self._place)


class _Poison:
    def __init__(self, offset: int, size: int) -> None:
        self.offset, self.size = offset, size

    def launch(self, recorder: RecordedGraphs) -> None:
        recorder.poison(self.offset, self.size)


class _Operation:
    """One operation on addresses; `made`: where it puts the outputs that are new, by their position."""

    def __init__(self, function, arguments, made) -> None:
        self.function, self.arguments, self.made = function, arguments, made

    def launch(self, recorder: RecordedGraphs) -> None:
        args, kwargs = _map(_tensor, self.arguments)
        outputs = _leaves(self.function(*args, **kwargs))
        for position, address in self.made.items():
            address.tensor().copy_(outputs[position])


class _Operations(TorchDispatchMode):
    """Records every operation that reaches the backends; executes none."""

    def __init__(self, recorder: RecordedGraphs) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs, recorder, name = kwargs or {}, self._recorder, function._schema.name
        if name in _WAITING:
            raise CaptureError(f"{name} waits for a number, which is forbidden while a stream is captured")
        if name == "aten::lift_fresh":
            raise CaptureError("a tensor is copied from the host, which is forbidden while a stream is captured")
        if torch.Tag.nondeterministic_seeded in function.tags and _drops(function, args, kwargs):
            raise CaptureError(f"{name} draws random numbers, from a generator that no graph knows of")
        written = _written(function, args, kwargs)
        known = {t.untyped_storage().data_ptr() for t in _leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        with _unchanged(written):
            outputs = function(*args, **kwargs)
        blocks, made = {}, {}

        def place(i, output):
            if not isinstance(output, torch.Tensor) or output.numel() == 0:
                return output
            storage = output.untyped_storage()
            if (address := storage.data_ptr()) in known:
                return output
            if address not in blocks:
                blocks[address] = recorder.allocate(storage.nbytes())
            block = blocks[address].view(output.dtype)
            placed = block.as_strided(output.size(), output.stride(), output.storage_offset())
            made[i] = recorder.remember(placed)
            return placed

        if isinstance(outputs, torch.Tensor):
            outputs = place(0, outputs)
        elif isinstance(outputs, tuple | list):
            outputs = type(outputs)(place(i, output) for i, output in enumerate(outputs))
        if (made and name not in _UNINITIALISED) or written:
            arguments = _map(recorder.remember, (args, kwargs))
            recorder._recording.append(_Operation(function, arguments, made))
        return outputs


class _Functions(TorchFunctionMode):
    """Refuses gradients of leaves from outside: autograd would accumulate them on the stream of their first use."""

    def __init__(self, recorder: RecordedGraphs) -> None:
        super().__init__()
        self._leaves = recorder._leaves

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in (torch.autograd.backward, torch.Tensor.backward):
            raise CaptureError("a captured backward accumulates into .grad, which the caller may set to None")
        if function is torch.autograd.grad:
            inputs = args[1] if len(args) > 1 else kwargs["inputs"]
            for leaf in _leaves(inputs):
                if leaf.is_leaf and leaf not in self._leaves:
                    raise CaptureError("operation would make the legacy stream depend on a capturing blocking stream")
        result = function(*args, **kwargs)
        if function is torch.Tensor.requires_grad_:
            self._leaves[result] = True
        return result


def _tensor(address):
    return address.tensor() if isinstance(address, _Address) else address


def _map(function, value):
    """`function` of every leaf; torch's own trees take three times as long as all the operations."""
    if isinstance(value, tuple | list):
        return type(value)(_map(function, entry) for entry in value)
    if isinstance(value, dict):
        return {name: _map(function, entry) for name, entry in value.items()}
    return function(value)


def _leaves(value) -> list:
    found = []
    _map(found.append, value)
    return found


def _drops(function, args, kwargs) -> bool:
    """Whether an attention has dropout; what else may draw random numbers does."""
    for i, argument in enumerate(function._schema.arguments):
        if argument.name == "dropout_p":
            return kwargs.get("dropout_p", args[i] if i < len(args) else argument.default_value) > 0
    return True


def _written(function, args, kwargs) -> list[torch.Tensor]:
    """The tensors that an operation writes to."""
    found = []
    for i, argument in enumerate(function._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = kwargs.get(argument.name, args[i] if i < len(args) else None)
            found += [t for t in _leaves(value) if isinstance(t, torch.Tensor)]
    return found


@contextlib.contextmanager
def _unchanged(tensors):
    before = [t.clone() for t in tensors]
    yield
    for tensor, values in zip(tensors, before, strict=True):
        tensor.copy_(values)

"""Captures the segments of a chain as CUDA graphs, in one memory pool."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch

T = TypeVar("T")

# Captures that broke off: the allocators ask these graphs which streams they capture.
_BROKEN: list[torch.cuda.CUDAGraph] = []


class CudaRecorder:
    """A `graphs.Recorder` of one device.

    Everything is warmed up and captured on one stream of its own: a backward runs where its forward ran, and the
    default stream cannot be captured. Graphs are launched on the caller's stream.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()
        self._last: torch.cuda.Stream | None = None

    def prepare(self) -> None:
        """Gives what the allocator has cached back to the device: a pool takes its memory from there alone."""
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()

    def warm_up(self, work: Callable[[], T]) -> T:
        with self._beside():
            return work()

    def capture(self, work: Callable[[], T]) -> tuple[Callable[[], None], T]:
        graph = torch.cuda.CUDAGraph()
        with self._beside(), _no_collection():
            try:
                # Other threads may allocate meanwhile; autograd's, which runs a backward, is one of them.
                graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
                result = work()
                graph.capture_end()
            except BaseException:
                self._abort(graph)
                raise
        return lambda: self._launch(graph), result

    @property
    def bytes(self) -> int:
        segments = torch.cuda.memory_snapshot()
        return sum(s["total_size"] for s in segments if tuple(s["segment_pool_id"]) == tuple(self._pool))

    def _launch(self, graph: torch.cuda.CUDAGraph) -> None:
        current = torch.cuda.current_stream(self._device)
        if self._last is not None and self._last != current:
            # The pool's memory is written by one graph at a time.
            current.wait_stream(self._last)
        self._last = current
        graph.replay()

    @contextlib.contextmanager
    def _beside(self) -> Iterator[None]:
        """The recorder's stream, after all that was queued on the caller's and before all that will be."""
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        try:
            with torch.cuda.stream(self._stream):
                yield
        finally:
            current.wait_stream(self._stream)

    def _abort(self, graph: torch.cuda.CUDAGraph) -> None:
        """Ends a capture that failed, so that the stream, the pool and the allocator leave it."""
        with contextlib.suppress(RuntimeError):
            graph.capture_end()
        torch.cuda.synchronize(self._device)
        try:
            graph.pool()
        except RuntimeError:
            # An invalid capture raises before it takes the allocator out of the pool, and then never lets go of it.
            index = torch.cuda._utils._get_device_index(self._device, optional=True)
            with contextlib.suppress(RuntimeError):
                torch._C._cuda_endAllocateToPool(index, self._pool)
            torch._C._cuda_releasePool(index, self._pool)
            _BROKEN.append(graph)


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """No garbage collection: it could free events or graphs, which is forbidden while a stream is captured."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()

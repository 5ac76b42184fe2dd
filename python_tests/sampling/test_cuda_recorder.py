"""What the recorder asks of CUDA, in order, without a GPU; and whole chains with one."""

import contextlib
import gc

import pytest
import torch
from checks import relative_error
from toy_chains import inputs, mlp, plainly, train, unet

from rftcore.sampling import cuda_recorder
from rftcore.sampling.cuda_recorder import CudaRecorder
from rftcore.sampling.graphs import Segments

POOL = (0, 7)


class Cuda:
    """Stands in for torch.cuda: notes what is asked of it. `invalid`: captures end with an error."""

    def __init__(self, monkeypatch):
        self.log, self.invalid = [], False
        self.user = self.now = self.stream_of("user")
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: self.stream_of("own"))
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: Graph(self))
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: POOL)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: self.now)
        monkeypatch.setattr(torch.cuda, "stream", self.within)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device: self.log.append("synchronize"))
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: self.log.append("empty cache"))
        for name in ("endAllocateToPool", "releasePool"):
            monkeypatch.setattr(
                torch._C, f"_cuda_{name}", lambda *a, name=name: self.log.append((name, *a)), raising=False
            )

    def stream_of(self, name):
        return Stream(self, name)

    @contextlib.contextmanager
    def within(self, stream):
        before, self.now = self.now, stream
        yield
        self.now = before


class Stream:
    def __init__(self, cuda, name):
        self.cuda, self.name = cuda, name

    def wait_stream(self, other):
        self.cuda.log.append(f"{self.name} waits for {other.name}")


class Graph:
    def __init__(self, cuda):
        self.cuda, self.ended = cuda, False

    def capture_begin(self, **options):
        assert self.cuda.now.name == "own"
        self.cuda.log.append(("begin", options))

    def capture_end(self):
        assert self.cuda.now.name == "own"
        self.cuda.log.append("end")
        if self.cuda.invalid:
            raise RuntimeError("operation failed due to a previous error during capture")
        self.ended = True

    def pool(self):
        if not self.ended:
            raise RuntimeError("Called CUDAGraph::pool() without a preceding successful capture.")

    def replay(self):
        self.cuda.log.append(f"launch on {self.cuda.now.name}")


@pytest.fixture
def cuda(monkeypatch):
    monkeypatch.setattr(cuda_recorder, "_BROKEN", [])
    return Cuda(monkeypatch)


@pytest.fixture
def recorder(cuda):
    return CudaRecorder(torch.device("cuda", 0))


BEGIN = ("begin", {"pool": POOL, "capture_error_mode": "thread_local"})


def test_a_capture(cuda, recorder):
    """On the recorder's stream, between all that the caller queued, into its pool, without a garbage collection."""

    def work():
        assert not gc.isenabled()
        cuda.log.append(f"work on {cuda.now.name}")
        return 5

    replay, result = recorder.capture(work)
    assert result == 5
    assert gc.isenabled()
    assert cuda.log == ["own waits for user", BEGIN, "work on own", "end", "user waits for own"]
    del cuda.log[:]
    replay()
    replay()
    assert cuda.log == ["launch on user"] * 2
    # On another stream: after the launch before, which may write to the same memory.
    cuda.now = cuda.stream_of("other")
    replay()
    assert cuda.log[2:] == ["other waits for user", "launch on other"]


def test_warming_up_runs_where_captures_do(cuda, recorder):
    with pytest.raises(ZeroDivisionError):
        recorder.warm_up(lambda: cuda.log.append(f"work on {cuda.now.name}") or 1 / 0)
    assert cuda.log == ["own waits for user", "work on own", "user waits for own"]


def test_memory_is_given_back_before_captures(cuda, recorder):
    recorder.prepare()
    assert cuda.log == ["synchronize", "empty cache"]


def test_an_error_in_the_work_ends_the_capture(cuda, recorder):
    with pytest.raises(ZeroDivisionError):
        recorder.capture(lambda: 1 / 0)
    assert gc.isenabled()
    assert cuda.log == ["own waits for user", BEGIN, "end", "synchronize", "user waits for own"]
    assert not cuda_recorder._BROKEN


def test_an_invalid_capture_leaves_the_allocator(cuda, recorder):
    """PyTorch would go on to ask the graph which allocations are for the pool, and would never free the pool."""
    cuda.invalid = True
    with pytest.raises(RuntimeError, match="previous error"):
        recorder.capture(lambda: 5)
    left = ["synchronize", ("endAllocateToPool", 0, POOL), ("releasePool", 0, POOL)]
    assert cuda.log == ["own waits for user", BEGIN, "end", "end", *left, "user waits for own"]
    assert len(cuda_recorder._BROKEN) == 1


def test_bytes_of_its_pool(monkeypatch, recorder):
    segments = [
        {"total_size": n, "segment_pool_id": pool} for n, pool in ((1, (0, 0)), (2, POOL), (4, POOL), (8, (0, 8)))
    ]
    monkeypatch.setattr(torch.cuda, "memory_snapshot", lambda: segments)
    assert recorder.bytes == 6


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("make", [lambda: mlp(torch.float32), lambda: unet()[0], lambda: unet(accelerated=False)[0]])
def test_chains_on_a_gpu(make):
    with torch.device("cuda"):
        toy = make()
        segments = Segments(CudaRecorder(torch.device("cuda", torch.cuda.current_device())))
        for _ in range(4):
            x = inputs(toy)
            expected = plainly(toy, x)
            for mine, theirs in zip(toy(segments.begin(), x), expected, strict=True):
                assert relative_error(mine, theirs) <= 1e-5
            train(toy)
        assert segments.refusal is None
        assert segments.captured
        assert segments.bytes > 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_what_cannot_be_captured_on_a_gpu():
    """The chain goes on as it is, and later captures of others work."""
    with torch.device("cuda"):
        device = torch.device("cuda", torch.cuda.current_device())
        segments = Segments(CudaRecorder(device))
        for _ in range(3):
            run, x = segments.begin(), torch.randn(8)
            now = run.keep("x", lambda: torch.empty(8))
            now.copy_(x)
            run.run("first", lambda now=now: now.mul_(2))
            run.run("waits", lambda now=now: now.mul_(now.sum().item()))
            run.finish()
            assert torch.allclose(now, 2 * x * (2 * x).sum())
        assert "'waits' could not be captured" in segments.refusal
        toy, segments = mlp(torch.float32), Segments(CudaRecorder(device))
        for _ in range(3):
            x = inputs(toy)
            assert relative_error(toy(segments.begin(), x)[0], plainly(toy, x)[0]) <= 1e-5
        assert segments.refusal is None

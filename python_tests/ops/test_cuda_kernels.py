"""The CUDA kernels, emulated: each way through them, whatever the order of threads, and what was built for a GPU."""

import math
import os
import shutil
import subprocess
from importlib.util import find_spec
from itertools import product

import emulated_cuda
import pytest
import torch
from checks import DTYPES, EMULATED, assert_as_good_as, laid_out, relative_error, value_and_gradients
from steps import make_coefficients
from test_group_norm_silu import make_inputs, ours, stock

from rftcore import build
from rftcore.ops import sampler_step

# (shape, groups, compute capability, launches of the forward and of the backward to x alone, blocks in a cluster).
# Rows of a tile are at least 64 bytes; more than 8 KiB are spread over a cluster, and 32 KiB are the most without one.
WAYS = {
    "one block keeps a tile": ((2, 32, 5, 7), 4, 90, 1, 1, 1),
    "a cluster keeps a tile": ((2, 32, 19, 17), 4, 90, 1, 1, 4),
    "and a ragged one": ((1, 36, 35, 33), 9, 90, 1, 1, 8),
    "one block without clusters": ((1, 32, 9, 9), 4, 80, 1, 1, 1),
    "too large for two tensors": ((1, 16, 17, 17), 2, 80, 1, 2, 1),
    "too large for a GPU of little shared memory": ((1, 8, 128, 96), 1, 120, 2, 2, 1),
    "too large for two tensors on it": ((1, 8, 64, 96), 1, 120, 1, 2, 8),
    "two launches": ((2, 40, 29, 31), 8, 80, 2, 2, 1),
    "several chunks": ((1, 24, 67, 71), 4, 80, 2, 2, 1),
    "pieces of a group of vectors": ((2, 1100, 3, 5), 1, 90, 2, 2, 1),
    "pieces of a group of odd channels": ((1, 1101, 3, 2), 1, 90, 2, 2, 1),
    "odd channels": ((2, 15, 9, 7), 3, 90, 2, 2, 1),
}


def only_x(inputs):
    return [inputs[0].detach().requires_grad_(), *(t.detach() for t in inputs[1:])]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("activation", ["silu", None])
def test_every_way_through_group_norm_silu_is_exact(way, activation, monkeypatch, nan_filled):
    shape, groups, capability, forward, backward, cluster = WAYS[way]
    emulation = emulated_cuda.serve(monkeypatch, capability)
    inputs = make_inputs(shape, layout="channels_last")
    grad = laid_out(torch.randn(shape, dtype=torch.float64), "channels_last")
    function = ours(groups, activation, "cuda")
    for tensors, launches in ((only_x(inputs), forward + backward), (inputs, forward + 3)):
        emulation.reset(capability, seed=len(shape))
        mine = value_and_gradients(function, tensors, grad)
        assert (emulation.launches, emulation.largest_cluster) == (launches, cluster)
        for a, b in zip(mine, value_and_gradients(stock(groups, activation), tensors, grad), strict=True):
            assert relative_error(a, b) < 1e-12


def test_code_for_older_gpus_is_launched_without_clusters(monkeypatch):
    """What was compiled for 8.0 alone runs on 9.0 as well, but its barriers of clusters are none."""
    emulation = emulated_cuda.serve(monkeypatch)
    emulation.reset(90, architecture=80)
    inputs = only_x(make_inputs((2, 32, 19, 17), layout="channels_last"))
    x, noise = torch.randn(2, 2, 3, 700, dtype=torch.float64)
    value_and_gradients(ours(4, backend="cuda"), inputs, torch.ones_like(inputs[0]))
    sampler_step(x, x, make_coefficients(None), noise=noise, backend="cuda")
    assert emulation.largest_cluster == 1


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize(("shape", "capability"), [((2, 64, 21, 20), 90), ((2, 64, 21, 20), 80), ((1, 64, 7, 5), 90)])
@pytest.mark.parametrize("mean", [0, 30])
def test_x_alone_in_low_precision_is_as_good_as_pytorch(dtype, shape, capability, mean, monkeypatch):
    emulated_cuda.serve(monkeypatch, capability)
    inputs = only_x(make_inputs(shape, dtype, "channels_last"))
    inputs[0] = (inputs[0].detach() + mean).requires_grad_()
    grad = laid_out(torch.randn(shape), "channels_last").to(dtype)
    mine = value_and_gradients(ours(8, backend="cuda"), inputs, grad)
    exact = value_and_gradients(stock(8), only_x([t.detach().double() for t in inputs]), grad.double())
    assert_as_good_as(value_and_gradients(stock(8), inputs, grad), mine, exact)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("offset", [0, 1])
def test_the_order_of_threads_and_blocks_makes_no_difference(layout, offset, monkeypatch):
    """Nor does memory that is not aligned make more than one of rounding."""
    emulation = emulated_cuda.serve(monkeypatch)
    buffer = torch.randn(2 * 32 * 19 * 16 + 1)[offset:][: 2 * 32 * 19 * 16]
    view = buffer.view(2, 32, 19, 16) if layout == "contiguous" else buffer.view(2, 19, 16, 32).movedim(-1, 1)
    inputs = make_inputs(view.shape, torch.float32)
    for tensors in ([view.requires_grad_(), *inputs[1:]], only_x([view, *inputs[1:]])):
        grad = laid_out(torch.randn(view.shape), layout)
        results = []
        for seed in range(3):
            emulation.reset(90, seed)
            results.append(value_and_gradients(ours(4, backend="cuda"), tensors, grad))
        exact = value_and_gradients(
            stock(4), [t.detach().double().requires_grad_(t.requires_grad) for t in tensors], grad
        )
        for first, second, third, expected in zip(*results, exact, strict=True):
            assert torch.equal(first, second) and torch.equal(first, third)
            assert relative_error(first, expected) < 1e-6


@pytest.mark.parametrize("elements", [8 * 8 * 256 * 2 + 8, 8 * 8 * 256 + 3, 4096, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sampler_step_is_the_same_everywhere(elements, dtype, monkeypatch):
    """With clusters and without, aligned or not, in any order: the same bits, and the next sample of the CPU."""
    x, noise = torch.randn(2, 2, elements).to(dtype)
    m, reference = torch.randn(2, 4, elements).to(torch.bfloat16)
    c = make_coefficients(2, clip=0.8, dtype=torch.float32)
    options = {"reference_output": reference, "divergence": "exact"}
    on_cpu = sampler_step(x, m, c, noise=noise, backend="cpu", **options)

    def not_aligned(t):
        return torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape)

    seen = []
    for capability, aligned, seed in product(EMULATED.values(), (True, False), (0, 1)):
        emulation = emulated_cuda.serve(monkeypatch, capability, seed)
        tensors = [t if aligned else not_aligned(t) for t in (x, m, noise, reference)]
        options = {"reference_output": tensors[3], "divergence": "exact", "backend": "cuda"}
        step = sampler_step(tensors[0], tensors[1], c, noise=tensors[2], **options)
        assert (emulation.launches, emulation.largest_cluster) == (1, 8 if capability == 90 else 1)
        assert torch.equal(step.next_sample, on_cpu.next_sample)
        scored = sampler_step(x, m, c, next_sample=step.next_sample, **options)
        assert torch.equal(scored.log_prob, step.log_prob)
        seen.append(torch.stack([step.log_prob, step.divergence]))
    assert all(torch.equal(seen[0], each) for each in seen[1:])
    torch.testing.assert_close(seen[0], torch.stack([on_cpu.log_prob, on_cpu.divergence]))


def test_the_emulation_names_the_rule_that_was_broken():
    expected = ["a barrier that not all threads reach", "a barrier that not all threads reach", "did not wait for",
                "not aligned", "beyond its shared memory", "block that has ended"]  # fmt: skip
    errors = emulated_cuda.load().errors()
    assert len(errors) == len(expected)
    for message, error in zip(expected, errors, strict=True):
        assert message in error


def find_cuobjdump():
    """CUDA's own, or the one in Triton's wheel."""
    triton = find_spec("triton")
    wheels = triton.submodule_search_locations if triton else []
    folders = [os.environ.get("PATH", ""), *(f"{wheel}/backends/nvidia/bin" for wheel in wheels)]
    return shutil.which("cuobjdump", path=os.pathsep.join(folders))


def test_kernels_keep_to_their_registers():
    """Of every kernel for every GPU that was compiled for: nothing is spilled, and no stack is used."""
    if reason := build.why_not_loaded("_cuda"):
        pytest.skip(reason)
    if not (cuobjdump := find_cuobjdump()):
        pytest.skip("no cuobjdump to read the module with, neither CUDA's nor Triton's")
    module = build.load("_cuda")
    command = [cuobjdump, "--dump-resource-usage", module.__file__]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    used = [dict(pair.split(":")[:2] for pair in line.split() if ":" in pair) for line in text.splitlines()
            if line.strip().startswith("REG:")]  # fmt: skip
    assert len(used) >= math.prod((2, 2, 16))  # forward and backward of sampler_step, at the least, for each dtype
    for kernel in used:
        assert (kernel["STACK"], kernel["LOCAL"]) == ("0", "0")
        assert int(kernel["REG"]) <= 128

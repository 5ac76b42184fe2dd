"""The kernels of attention over a few keys in Triton's interpreter, as `test_attention_kernel` has it."""

import pytest
import torch
from checks import Canaries

kernels = pytest.importorskip("rftcore.kernels.cross_attention", reason="Triton is not installed", exc_type=ImportError)

from test_attention_kernel import DTYPES, assert_right, attend, inputs  # noqa: E402

TINY = kernels.Config(16, 2, 1, 1)
PADDED = kernels.Config(16, 3, 4, 2, head_dim=(128, 0))
# B, N, M, H, d
SHAPES = [(2, 70, 77, 2, 40), (1, 130, 77, 1, 64), (1, 33, 128, 2, 80), (1, 65, 16, 1, 160), (1, 1, 1, 3, 40)]


def attend_to_few(q, k, v, grad_o, scale=None, forward=None, backward=None, needs=(True, True)):
    """o, lse and the gradients, through all launches, into memory full of NaN."""
    (batch, queries, heads, _), canaries = q.shape, Canaries()
    scale = scale or q.shape[-1] ** -0.5
    o, grad_q = canaries.empty(q.shape, q.dtype), canaries.empty(q.shape, q.dtype) if needs[0] else None
    lse = canaries.empty((batch, heads, queries), torch.float32)
    grad_k, grad_v = (canaries.empty(k.shape, k.dtype) if needs[1] else None for _ in range(2))
    shape = kernels.partials_shape(q, k, config=backward)
    partials = canaries.empty(shape, torch.float32) if shape and needs[1] else None
    kernels.forward(q, k, v, o, lse, scale, config=forward).run()
    gradients = grad_q, grad_k, grad_v
    for launch in kernels.backward(grad_o, q, k, v, lse, *gradients, partials, scale, config=backward):
        launch.run()
    canaries.check()
    return [o, lse, *(grad for grad in gradients if grad is not None)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_all_passes(shape, dtype):
    q, k, v, grad_o = inputs(shape, dtype)
    assert_right(attend_to_few(q, k, v, grad_o), q, k, v, grad_o)


@pytest.mark.parametrize("keys", [2, 15, 17, 32, 33, 48, 64, 65, 96, 97, 127])
def test_every_number_of_keys(keys):
    q, k, v, grad_o = inputs((1, 19, keys, 1, 40), torch.float16)
    assert_right(attend_to_few(q, k, v, grad_o), q, k, v, grad_o)


@pytest.mark.parametrize("head_dim", [8, 24, 32, 56, 72, 96, 128, 136, 152])
def test_every_head_dimension(head_dim):
    q, k, v, grad_o = inputs((1, 17, 77, 2, head_dim), torch.float16)
    assert_right(attend_to_few(q, k, v, grad_o), q, k, v, grad_o)


@pytest.mark.parametrize("config", [TINY, PADDED, kernels.Config(64, 1, 4, 2), kernels.Config(16, 8, 4, 2)])
def test_every_tile(config):
    """Several programs and blocks a program, with a tail and without; several partial sums and one."""
    for shape in ((1, 90, 77, 2, 40), (2, 128, 40, 1, 80)):
        q, k, v, grad_o = inputs(shape, torch.float16)
        assert_right(attend_to_few(q, k, v, grad_o, forward=config, backward=config), q, k, v, grad_o)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("head_dim", [40, 64, 80, 160])
def test_the_tiles_of_half_precision(head_dim, capability):
    q, k, v, grad_o = inputs((1, 300, 77, 1, head_dim), torch.float16)
    tiles = {name: kernels.heuristic(name, head_dim, 300, 77, 2, capability) for name in ("forward", "backward")}
    assert_right(attend_to_few(q, k, v, grad_o, **tiles), q, k, v, grad_o)


def test_strided_inputs():
    """Slices of fused projections, and a gradient whose rows repeat; what lies round them is NaN."""
    fused = torch.full((2, 45, 2, 3, 40), float("nan"))
    fused[:, :, 0] = torch.randn(2, 45, 3, 40)
    text = torch.full((2, 77, 3, 3, 40), float("nan"))
    text[:, :, :2] = torch.randn(2, 77, 2, 3, 40)
    q, k, v = fused[:, :, 0], text[:, :, 0], text[:, :, 1]
    grad_o = torch.randn(1, 1, 3, 40).expand(2, 45, 3, 40)
    assert_right(attend_to_few(q, k, v, grad_o, forward=TINY, backward=TINY), q, k, v, grad_o)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_rows_past_the_end_are_not_read(dtype):
    """Rows of NaN follow the last row of each batch."""
    q, k, v, grad_o = inputs((2, 37, 77, 2, 40), dtype)
    tensors = [torch.cat([t, torch.full_like(t, float("nan"))], 1)[:, : t.shape[1]] for t in (q, k, v, grad_o)]
    for mine, theirs in zip(attend_to_few(*tensors), attend_to_few(q, k, v, grad_o), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("size", [30.0, 300.0])
def test_large_logits(size):
    """Neither exp(logit) nor exp(-lse) exists in fp32; the keys past the end have logit 0."""
    q, k, v, grad_o = inputs((1, 40, 77, 1, 40))
    assert_right(attend_to_few(q * size, k, v, grad_o), q * size, k, v, grad_o)
    # Every logit that exists is far below that 0.
    q, k = q.abs() * size, -k.abs()
    assert_right(attend_to_few(q, k, v, grad_o), q, k, v, grad_o)


def test_only_what_is_needed():
    q, k, v, grad_o = inputs((1, 50, 77, 1, 40))
    every = attend_to_few(q, k, v, grad_o, backward=TINY)
    assert torch.equal(attend_to_few(q, k, v, grad_o, backward=TINY, needs=(True, False))[2], every[2])
    found = attend_to_few(q, k, v, grad_o, backward=TINY, needs=(False, True))[2:]
    for mine, theirs in zip(found, every[3:], strict=True):
        assert torch.equal(mine, theirs)


def test_a_sample_does_not_depend_on_its_batch():
    """Nor does the order in which partial sums are added."""
    q, k, v, grad_o = inputs((3, 600, 77, 1, 40), torch.float16)
    whole = attend_to_few(q, k, v, grad_o)
    assert kernels.partials_shape(q, k)[2] > 1
    for mine, theirs in zip(attend_to_few(q[1:2], k[1:2], v[1:2], grad_o[1:2]), whole, strict=True):
        assert torch.equal(mine, theirs[1:2])


@pytest.mark.parametrize("head_dim", [80, 160])
def test_the_other_backward_takes_what_this_forward_left(head_dim):
    """Beyond MAX_BACKWARD_HEAD_DIM."""
    q, k, v, grad_o = inputs((1, 60, 77, 1, head_dim), torch.float16)
    mine, theirs = attend_to_few(q, k, v, grad_o), attend(q, k, v, grad_o)
    for first, second in zip(mine[:2], theirs[:2], strict=True):
        torch.testing.assert_close(first, second, rtol=2e-3, atol=1e-3)
    assert_right(theirs, q, k, v, grad_o)


def test_counts():
    """SD1.5's first cross-attention at batch 1: five tensors of the image's queries, six of the text, and lse twice."""
    tensor, text, lse, product = 4096 * 320 * 2, 77 * 320 * 2, 4 * 8 * 4096, 2 * 4096 * 77 * 320
    found = kernels.counts(1, 4096, 77, 8, 40, 2)
    assert found["forward"] == (2 * tensor + 2 * text + lse, 2 * product)
    assert found["backward"] == (3 * tensor + 4 * text + lse, 5 * product)

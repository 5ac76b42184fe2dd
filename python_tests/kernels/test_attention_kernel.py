"""The attention kernels in Triton's interpreter against the op's reference: odd sizes, layouts, tiles, canaries."""

import pytest
import torch
import torch.nn.functional as F
from checks import Canaries, assert_as_good_as, value_and_gradients

attention = pytest.importorskip("rftcore.kernels.attention", reason="Triton is not installed", exc_type=ImportError)

from rftcore.ops import attention_reference  # noqa: E402

TINY = attention.Config(16, 16, 1, 1)
PADDED = attention.Config(32, 16, 4, 2, head_dim=(256, 0))
# The interpreter miscomputes bf16.
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * torch.cuda.is_available()
# B, N, M, H, d
SHAPES = [(2, 37, 53, 2, 40), (1, 130, 67, 1, 64), (1, 33, 129, 2, 80), (1, 65, 16, 1, 160), (1, 1, 1, 3, 40)]


def attend(q, k, v, grad_o, scale=None, forward=None, dq=None, dkdv=None, needs=(True, True)):
    """o, lse and the gradients, through all launches, into memory full of NaN."""
    (batch, queries, heads, _), canaries = q.shape, Canaries()
    scale = scale or q.shape[-1] ** -0.5
    o, grad_q = canaries.empty(q.shape, q.dtype), canaries.empty(q.shape, q.dtype) if needs[0] else None
    lse, delta = (canaries.empty((batch, heads, queries), torch.float32) for _ in range(2))
    grad_k, grad_v = (canaries.empty(k.shape, k.dtype) if needs[1] else None for _ in range(2))
    attention.forward(q, k, v, o, lse, scale, config=forward).run()
    gradients = grad_q, grad_k, grad_v
    for launch in attention.backward(grad_o, q, k, v, o, lse, delta, *gradients, scale, dq_config=dq, dkdv_config=dkdv):
        launch.run()
    canaries.check()
    return [o, lse, *(grad for grad in gradients if grad is not None)]


def expected(function, q, k, v, grad_o, scale):
    """What a function of (B, heads, N, d) gives for (B, N, heads, d), with its gradients."""
    tensors = [t.detach().transpose(1, 2).requires_grad_() for t in (q, k, v)]
    found = value_and_gradients(lambda *t: function(*t, scale=scale), tensors, grad_o.transpose(1, 2))
    return [t.transpose(1, 2) for t in found]


def lse_of(q, k, scale):
    return (q.transpose(1, 2) @ k.transpose(1, 2).mT * scale).logsumexp(-1)


def assert_right(found, q, k, v, grad_o, scale=None):
    scale = scale or q.shape[-1] ** -0.5
    exact = expected(attention_reference, *(t.double() for t in (q, k, v, grad_o)), scale)
    stock = expected(F.scaled_dot_product_attention, q, k, v, grad_o, scale)
    o, lse, *gradients = found
    assert_as_good_as(stock, [o, *gradients], exact)
    assert_as_good_as([lse_of(q.float(), k.float(), scale)], [lse], [lse_of(q.double(), k.double(), scale)])


def inputs(shape, dtype=torch.float32):
    batch, queries, keys, heads, head_dim = shape
    rows = queries, keys, keys, queries
    return [torch.randn(batch, n, heads, head_dim).to(dtype) for n in rows]


@pytest.mark.covering(1)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_all_passes(shape, dtype):
    q, k, v, grad_o = inputs(shape, dtype)
    assert_right(attend(q, k, v, grad_o), q, k, v, grad_o)


@pytest.mark.parametrize("head_dim", [8, 24, 32, 56, 72, 96, 128, 136, 152])
def test_every_head_dimension(head_dim):
    q, k, v, grad_o = inputs((1, 17, 19, 2, head_dim), torch.float16)
    assert_right(attend(q, k, v, grad_o), q, k, v, grad_o)


@pytest.mark.parametrize("config", [TINY, PADDED, attention.Config(32, 64, 4, 3), attention.Config(64, 16, 8, 1)])
def test_every_tile(config):
    """Loops of several blocks, with a tail and without, and a head dimension that is padded in one piece."""
    for shape in ((1, 50, 83, 2, 40), (1, 64, 64, 1, 80)):
        q, k, v, grad_o = inputs(shape, torch.float16)
        found = attend(q, k, v, grad_o, forward=config, dq=config, dkdv=config)
        assert_right(found, q, k, v, grad_o)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("head_dim", [40, 64, 80, 160])
def test_the_tiles_of_half_precision(head_dim, capability):
    q, k, v, grad_o = inputs((1, 140, 72, 1, head_dim), torch.float16)
    tiles = {name: attention.heuristic(name, head_dim, 140, 72, 2, capability) for name in ("forward", "dq", "dkdv")}
    assert_right(attend(q, k, v, grad_o, **tiles), q, k, v, grad_o)


def test_strided_inputs():
    """Slices of a fused projection, and a gradient whose rows repeat; what lies round them is NaN."""
    fused = torch.full((2, 45, 4, 3, 40), float("nan"))
    fused[:, :, :3] = torch.randn(2, 45, 3, 3, 40)
    q, k, v, _ = fused.unbind(2)
    grad_o = torch.randn(1, 1, 3, 40).expand(2, 45, 3, 40)
    found = attend(q, k, v, grad_o, forward=TINY, dq=TINY, dkdv=TINY)
    assert_right(found, q, k, v, grad_o)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_rows_past_the_end_are_not_read(dtype):
    """Rows of NaN follow the last row of each batch."""
    q, k, v, grad_o = inputs((2, 37, 53, 2, 40), dtype)
    tensors = [torch.cat([t, torch.full_like(t, float("nan"))], 1)[:, : t.shape[1]] for t in (q, k, v, grad_o)]
    for mine, theirs in zip(attend(*tensors), attend(q, k, v, grad_o), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("size", [30.0, 300.0])
def test_large_logits(size):
    """Neither exp(logit) nor exp(-lse) exists in fp32; the keys past the end have logit 0."""
    q, k, v, grad_o = inputs((1, 40, 35, 1, 40))
    assert_right(attend(q * size, k, v, grad_o), q * size, k, v, grad_o)
    # Every logit that exists is far below that 0.
    q, k = q.abs() * size, -k.abs()
    assert_right(attend(q, k, v, grad_o, forward=TINY, dq=TINY, dkdv=TINY), q, k, v, grad_o)


def test_another_scale():
    q, k, v, grad_o = inputs((1, 20, 30, 2, 64))
    assert_right(attend(q, k, v, grad_o, scale=0.37), q, k, v, grad_o, scale=0.37)


def test_only_what_is_needed():
    q, k, v, grad_o = inputs((1, 33, 40, 1, 40))
    every = attend(q, k, v, grad_o)
    assert torch.equal(attend(q, k, v, grad_o, needs=(True, False))[2], every[2])
    for mine, theirs in zip(attend(q, k, v, grad_o, needs=(False, True))[2:], every[3:], strict=True):
        assert torch.equal(mine, theirs)


def test_a_sample_does_not_depend_on_its_batch():
    q, k, v, grad_o = inputs((3, 37, 41, 2, 40), torch.float16)
    whole = attend(q, k, v, grad_o)
    for mine, theirs in zip(attend(q[1:2], k[1:2], v[1:2], grad_o[1:2]), whole, strict=True):
        assert torch.equal(mine, theirs[1:2])


def test_counts():
    """SD1.5's first self-attention at batch 1: 12 tensors of 2.5 MiB over both passes, and the log-sum-exp."""
    found = attention.counts(1, 4096, 4096, 8, 40, 2)
    tensor, lse, product = 4096 * 320 * 2, 4 * 8 * 4096, 2 * 4096 * 4096 * 320
    assert found == {"forward": (4 * tensor + lse, 2 * product), "backward": (8 * tensor + lse, 5 * product)}

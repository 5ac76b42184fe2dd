"""How tensors reach the attention kernels in Triton: in place where they can be read so, and with a positive scale."""

import pytest
import torch

from rftcore.ops import fused_attention


def as_a_projection_makes_them(dtype, head_dim=8, heads=2):
    """(B, heads, N, d) of rows (B, N, heads * d) in memory."""
    return torch.randn(3, 5, heads, head_dim).to(dtype).transpose(1, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_what_a_projection_makes_is_read_where_it_lies(dtype):
    for heads in (1, 2):
        x = as_a_projection_makes_them(dtype, heads=heads)
        ready = fused_attention._ready(x)
        assert ready.data_ptr() == x.data_ptr() and torch.equal(ready, x.transpose(1, 2))
        # As the second of three that one projection makes.
        joint = torch.randn(3, 5, 3, heads, 8).to(dtype)
        x = joint[:, :, 1].transpose(1, 2)
        ready = fused_attention._ready(x)
        assert ready.data_ptr() == x.data_ptr() and torch.equal(ready, x.transpose(1, 2))


def test_what_is_laid_out_otherwise_is_copied():
    x = as_a_projection_makes_them(torch.float16)
    others = {
        "rows off 16 bytes": as_a_projection_makes_them(torch.float16, head_dim=12)[..., :11],
        "contiguous heads": x.contiguous(),
        "every other element": as_a_projection_makes_them(torch.float16, head_dim=16)[..., ::2],
        "contiguous, off 16 bytes": torch.randn(3 * 5 * 2 * 8 + 1).half()[1:].view(3, 5, 2, 8).transpose(1, 2),
        "expanded": x[:1, :1, :1, :1].expand(3, 2, 5, 8),
    }
    for name, other in others.items():
        ready = fused_attention._ready(other)
        assert ready.is_contiguous() and torch.equal(ready, other.transpose(1, 2)), name
        assert ready.data_ptr() != other.data_ptr(), name


def test_a_sign_and_a_positive_scale():
    """sign * scale is the scale; 0 makes all logits 0, whatever the scale is then."""
    assert [fused_attention._sign(scale) for scale in (0.5, -0.5, 0.0)] == [(1, 0.5), (-1, 0.5), (0, 1.0)]


def test_few_keys_are_ours_where_nothing_was_measured():
    """However many heads and queries there are; of more, the order that is written down decides."""
    few = fused_attention._FEW_KEYS
    for heads, queries in ((1, 1), (few + 1, few + 1)):
        q = torch.empty(1, heads, queries, 8)
        answers = [fused_attention.heuristic(q, *[torch.empty(1, heads, keys, 8)] * 2) for keys in (1, few, few + 1)]
        assert answers == ["triton", "triton", None]


def test_few_keys_have_a_kernel_of_their_own():
    """However many heads, images and queries there are."""
    pytest.importorskip("rftcore.kernels.launch", reason="Triton is not installed", exc_type=ImportError)
    few = fused_attention._FEW_KEYS
    found = []
    for keys in (1, few, few + 1):
        q, k = torch.empty(few + 1, few + 1, few + 1, 8), torch.empty(few + 1, few + 1, keys, 8)
        found.append(fused_attention._kernels(q, k, k)[1])
        found.append(fused_attention._kernels(q[:1, :1, :1], k[:1, :1], k[:1, :1])[1])
    assert found == ["cross_attention"] * 4 + ["attention"] * 2

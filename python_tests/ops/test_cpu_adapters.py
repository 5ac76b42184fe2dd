"""The compiled functions of LoRA adapters on the CPU: what they write, what the dispatcher knows, where they serve."""

import math

import pytest
import torch
from checks import DTYPES, laid_out, relative_error

from rftcore.ops import Adapter, Projection, cpu_adapters, lora_linear
from rftcore.ops.backends import OPS

# (of the base, of its adapters, of autocast)
DTYPES_OF_A_CALL = [
    *((dtype, (dtype, dtype), None) for dtype in DTYPES),
    (torch.bfloat16, (torch.float32, torch.float32), None),
    (torch.float32, (torch.bfloat16, torch.float16), None),
    (torch.float32, (torch.float32, torch.bfloat16), torch.bfloat16),
    (torch.float16, (torch.float64, torch.float32), None),
]


@pytest.mark.parametrize(("base", "loras", "lower"), DTYPES_OF_A_CALL)
@pytest.mark.parametrize("rows", [1, 3, 33, 1061])
def test_the_compiled_functions_write_what_they_should_and_nothing_else(base, loras, lower, rows, monkeypatch):
    """Odd sizes and addresses, canaries before and after each result, gradients NaN before; the truth is in fp64."""
    width, columns, ranks = 37, (5, 70), ((1, 4), (6, 5))
    checks = []

    def guarded(values):
        buffer = values.new_full((values.numel() + 34,), 77.0)
        inside = buffer[17:-17].view(values.shape)
        inside.copy_(values)
        checks.append(buffer)
        return inside

    n = guarded(torch.randn(rows, width).to(base))
    grads = [torch.randn(rows, c).to(base) for c in columns]
    projections = [
        Projection(
            torch.randn(c, width).to(base) / 6, None,
            tuple(
                Adapter(torch.randn(r, width).to(lora) / 6, torch.randn(c, r).to(lora), 0.5 + r)
                for r, lora in zip(own, loras, strict=True)
            ),
        )
        for c, own in zip(columns, ranks, strict=True)
    ]  # fmt: skip
    outputs = [guarded(grad * 2) for grad in grads]
    total, residual = guarded(n * 3), guarded(grads[1])

    # In fp64, of values rounded as the adapter's dtype rounds them.
    leaves, expected = [n.double().requires_grad_()], [y.double() for y in outputs]
    expected[1] = expected[1] + residual.double()
    for i, (_, _, adapters) in enumerate(projections):
        for a, b, scale in adapters:
            dtype = a.dtype if lower is None or a.dtype == torch.float64 else lower
            leaves += [t.to(dtype).double().requires_grad_() for t in (a, b)]
            # The rounding's gradient is 1.
            rounded = leaves[0] + (n.to(dtype).double() - n.double())
            expected[i] = expected[i] + _GradientTo.apply((rounded @ leaves[-2].t()) @ leaves[-1].t() * scale, dtype)
    exact = torch.autograd.grad(expected, leaves, [g.double() for g in grads])

    with torch.no_grad():
        for y, projection, added in zip(outputs, projections, (None, residual), strict=True):
            cpu_adapters._launch_add([y], n, *cpu_adapters.arguments([projection], lower), added)
        new_empty = torch.Tensor.new_empty
        monkeypatch.setattr(
            torch.Tensor, "new_empty", lambda self, *args, **options: guarded(new_empty(self, *args).fill_(math.nan))
        )
        total, *found = cpu_adapters._change_grads(
            n, grads, *cpu_adapters.arguments(projections, lower), [True] * 8, total
        )
    bound = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}
    for mine, y in zip(outputs, expected, strict=True):
        assert relative_error(mine, y) < bound[base]
    assert relative_error(total, n.double() * 3 + exact[0]) < bound[base]
    for mine, gradient in zip(found, exact[1:], strict=True):
        wide = torch.float64 in (base, *loras)
        assert relative_error(mine, gradient) < max(bound[mine.dtype], 1e-14 if wide else 1e-6)
    assert len(checks) == 5 + 8
    for buffer in checks:
        assert (buffer[:17] == 77).all() and (buffer[-17:] == 77).all()


class _GradientTo(torch.autograd.Function):
    """The identity, whose gradient is rounded to a dtype."""

    @staticmethod
    def forward(ctx, x, dtype):
        ctx.dtype = dtype
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad.to(ctx.dtype).to(grad.dtype), None


def test_opcheck():
    columns = (8, 8, 14)
    projections = [
        Projection(
            torch.randn(c, 10).double(), None,
            tuple(Adapter(torch.randn(r, 10).double(), torch.randn(c, r).double(), 0.5) for r in (3, 2)),
        )
        for c in columns
    ]  # fmt: skip
    a, b, *others = cpu_adapters.arguments(projections, None)
    n, grads = torch.randn(6, 10).double(), [torch.randn(6, c).double() for c in columns]
    ops = torch.ops.rftcore
    torch.library.opcheck(ops.lora_add.default, ([g.clone() for g in grads], n, a, b, *others, None))
    arguments_of_one = (own[:2] for own in (a, b, *others))
    torch.library.opcheck(ops.lora_add.default, ([grads[0].clone()], n, *arguments_of_one, grads[1]))
    sliced = laid_out(n, "sliced")
    for first, needs, grad_n in ((sliced, [True] * 12, n), (sliced, [True, False] * 6, None), (None, [False] * 12, n)):
        torch.library.opcheck(ops.lora_grads.default, (first, grads, a, b, *others, needs, grad_n))


def test_high_ranks_are_left_to_pytorch_s_products():
    op = OPS["lora_linear"]
    for dtype in DTYPES:
        highest = 4 if dtype == torch.bfloat16 else 32
        x = torch.randn(3, 6).to(dtype)
        for rank, backend in ((highest, "cpu"), (highest + 1, "torch")):
            adapter = Adapter(torch.zeros(rank, 6).to(dtype), torch.zeros(5, rank).to(dtype), 1.0)
            plain = Projection(torch.zeros(5, 6).to(dtype))
            assert op.choose("auto", x, [plain._replace(adapters=(adapter,))]) == backend
            assert op.choose("auto", x, [plain, plain._replace(adapters=(adapter, adapter))]) == backend
    with pytest.raises(RuntimeError, match="have rank 33 a projection; over 32 PyTorch's products are faster"):
        lora_linear(x, plain._replace(adapters=(adapter,)), backend="cpu")
    single = Projection(torch.zeros(5, 6), None, (Adapter(torch.zeros(5, 6), torch.zeros(5, 5), 1.0),))
    assert op.choose("auto", torch.randn(3, 6), [single]) == "cpu"
    with pytest.raises(RuntimeError, match="over 4, all in bf16, PyTorch's"):
        op.choose("cpu", torch.randn(3, 6), [single], torch.bfloat16)

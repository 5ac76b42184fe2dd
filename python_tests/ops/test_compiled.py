"""The way to compiled functions: pointers and codes, refusals in words, and gradients through a reference."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from rftcore.ops import compiled

X = torch.ones(2, 3)


def test_maths_is_fp64_where_any_input_is():
    half, double = X.half(), X.double()
    assert compiled.maths_dtype(half, X) == compiled.maths_dtype(X.bfloat16()) == torch.float32
    assert compiled.maths_dtype(half, double) == compiled.maths_dtype(double) == torch.float64


def test_addresses_and_codes():
    """csrc/common's codes; an address counts the bytes before the first element."""
    assert compiled.address(None) == 0 and compiled.vector(None) == (0, 0)
    assert compiled.address(X[1]) == X.data_ptr() + 3 * 4
    codes = [compiled.vector(X.to(d))[1] for d in (torch.float64, torch.float32, torch.bfloat16, torch.float16)]
    assert codes == [0, 1, 2, 3] and compiled.vector(X[1])[0] == compiled.address(X[1])


def test_backends_say_where_they_do_not_serve():
    cpu, torch_ops = compiled.reasons("_cpu", "cpu", "u"), compiled.torch_reasons("u")
    assert cpu(X) == torch_ops(X) == torch_ops(X.to("meta")) == []
    with FakeTensorMode():
        gpu, other = torch.empty(2, device="cuda"), torch.empty(2, device="xpu")
        assert cpu(gpu) == ["it serves cpu tensors, u is on cuda:0"] and torch_ops(gpu) == []
        assert torch_ops(other) == ["it serves cpu and cuda tensors, u is on xpu:0"]
    for reasons in (cpu, torch_ops):
        found = []
        torch.vmap(lambda x, reasons=reasons, found=found: (found.append(reasons(x)), x)[1])(X)
        assert len(found[0]) == 1 and "functorch" in found[0][0]


def test_a_missing_module_is_a_reason(monkeypatch):
    monkeypatch.setattr(compiled.build, "why_not_loaded", lambda module: f"{module} is not there")
    assert compiled.reasons("_cpu", "cpu", "u")(X) == ["_cpu is not there"]


def test_differentiate_gives_the_gradients_that_are_needed():
    """d sum(a b^2) = (b^2, 2 a b), also under no_grad; the inputs' own graph is left alone."""
    a, b = torch.tensor(3.0, requires_grad=True) * 1, torch.tensor(5.0)
    with torch.no_grad():
        found = compiled.differentiate(lambda a, b: a * b**2, (a, b), (True, True), torch.tensor(2.0))
        assert [g.item() for g in found] == [50.0, 60.0]
        found = compiled.differentiate(lambda a, b: a * b**2, (a, b), (False, True), torch.tensor(1.0))
    assert found[0] is None and found[1].item() == 30.0
    assert not any(g is not None and g.requires_grad for g in found) and not b.requires_grad


@pytest.mark.parametrize(
    ("check", "message"),
    [
        (lambda: compiled.check_tensor("op", "x", X.int()), "op: x is torch.int32.*x.to"),
        (lambda: compiled.check_tensor("op", "x", X.to_sparse()), "op: x is torch.float32, torch.sparse_coo"),
        (lambda: compiled.check_gradient("op", X, X.half()), "the gradient is torch.float32, it must be torch.float16"),
        (lambda: compiled.check_like("op", "w", X, (3, 2), X.device, "x"), r"w is \(2, 3\); for this x it must be \(3"),
        (lambda: compiled.check_like("op", "w", X.int(), (2, 3), X.device, "x"), "op: w is torch.int32"),
        (
            lambda: compiled.check_like("op", "w", X, (2, 3), torch.device("meta"), "x"),
            r"w is on cpu, x on meta; move it: w.to\(x.device\)",
        ),
    ],
)
def test_what_does_not_fit_is_named(check, message):
    with pytest.raises(ValueError, match=message):
        check()


def test_what_fits_passes():
    compiled.check_tensor("op", "x", X)
    compiled.check_gradient("op", X, X.clone())
    compiled.check_like("op", "w", X, [2, 3], X.device, "x")

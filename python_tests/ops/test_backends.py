"""Which backend serves an input: the one asked for or the first that can, why not the others, and raw pointers."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode

from rftcore.ops.backends import OPS, Op, is_plain, register, transform_reasons

X = torch.ones(3)


def op_of(*order, refusing=(), heuristic=None):
    reasons = {name: lambda x, name=name: [f"{name} is away"] if name in refusing else [] for name in order}
    return Op("toy", reasons, lambda device, dtype: (), heuristic=heuristic)


def test_auto_takes_the_first_that_can():
    assert op_of("a", "b", "c").choose("auto", X) == "a"
    assert op_of("a", "b", "c", refusing="ab").choose("auto", X) == "c"


def test_on_a_cpu_tritons_interpreter_is_for_those_who_ask():
    op = op_of("triton", "b")
    assert op.choose("auto", X) == "b" and op.choose("triton", X) == "triton"
    with FakeTensorMode():
        assert op.choose("auto", torch.empty(3, device="cuda")) == "triton"


@pytest.mark.parametrize(("named", "chosen"), [("c", "c"), ("b", "a"), (None, "a"), ("unknown", "a")])
def test_the_heuristics_choice_comes_first_where_it_can_serve(named, chosen):
    assert op_of("a", "b", "c", refusing="b", heuristic=lambda x: named).choose("auto", X) == chosen


def test_a_request_that_cannot_be_met_says_why():
    with pytest.raises(ValueError, match="toy: backend='d' is unknown; choose one of 'auto', 'a', 'b'"):
        op_of("a", "b").choose("d", X)
    with pytest.raises(RuntimeError, match="toy: backend='b' cannot serve this input: b is away"):
        op_of("a", "b", refusing="b").choose("b", X)
    with pytest.raises(RuntimeError, match="toy: no backend serves this input. a: a is away. b: b is away."):
        op_of("a", "b", refusing="ab").choose("auto", X)


def test_explain_names_those_that_cannot_serve_only():
    assert op_of("a", "b", "c", refusing="b").explain(X) == "b: b is away."


def test_a_preference_is_taken_where_it_can_be_and_never_an_error():
    op = op_of("a", "b", "c", refusing="b")
    assert [op.prefer(name, X) for name in ("c", "b", "unknown")] == ["c", "a", "a"]


def test_without_a_key_or_a_gpu_nothing_was_measured():
    assert op_of("a").winner(X) is None
    assert Op("geglu", {}, lambda device, dtype: (), lambda x: "any").winner(X) is None


def test_register_gives_the_op_back(monkeypatch):
    monkeypatch.setattr("rftcore.ops.backends.OPS", dict(OPS))
    op = op_of("a")
    assert register(op) is op


def test_transforms_are_named():
    assert transform_reasons() == []
    seen = []

    def look(x):
        seen.append(transform_reasons())
        return x

    torch.vmap(look)(X)
    with forward_ad.dual_level():
        seen.append(transform_reasons())
    assert ["functorch" in found[0] for found in seen] == [True, False] and "forward-mode" in seen[1][0]
    assert transform_reasons() == []


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


def test_plain_tensors_may_be_handed_over_as_pointers():
    assert is_plain() and is_plain(X, None, Parameter(X), torch.empty(0), X[1:])


def test_what_needs_the_dispatcher_is_not_plain():
    class Own(torch.Tensor):
        pass

    with FakeTensorMode():
        fake = torch.empty(3)
    complex_values = torch.ones(3, dtype=torch.complex64)
    conjugate = complex_values.conj()
    others = {
        "fake": fake,
        "meta": torch.empty(3, device="meta"),
        "subclass": X.as_subclass(Own),
        "lazily conjugate": conjugate,
        "lazily negative": conjugate.imag,
        "zero": torch._efficientzerotensor(3),
    }
    assert {name: is_plain(X, None, tensor) for name, tensor in others.items()} == dict.fromkeys(others, False)
    with _Mode():
        assert not is_plain(X)

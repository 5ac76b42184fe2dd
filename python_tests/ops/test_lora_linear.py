"""lora_linear and lora_linears: against PEFT's layers behind a LayerNorm."""

import copy
from collections import Counter

import pytest
import torch
from adapted import results
from checks import DTYPES, LAYOUTS, assert_as_good_as, laid_out, relative_error, saved_by
from queries_keys_values import arguments, make_grads, make_input, make_model, ours
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.memory import saved_bytes
from rftcore.ops import (
    Adapter,
    Norm,
    Projection,
    compiled,
    cpu_adapters,
    lora_linear,
    lora_linears,
    lora_linears_reference,
)
from rftcore.ops.backends import OPS
from rftcore.ops.lora_linear import normalise, normalise_backward, project, project_backward
from rftcore.ops.projections import flatten, restore

BACKENDS = ["torch", "reference", "cpu"]


@pytest.fixture
def any_rank(monkeypatch):
    """The compiled backend serves adapters of any rank, also where PyTorch's products are faster."""
    monkeypatch.setattr(cpu_adapters, "_HIGHEST_RANK", 1000)
    monkeypatch.setattr(cpu_adapters, "_HIGHEST_RANK_IN_BF16", 1000)


@pytest.fixture
def launched(monkeypatch):
    """The names of the compiled functions that were called."""
    names, launch = [], compiled.launch

    def spy(name, *arguments):
        names.append(name)
        return launch(name, *arguments)

    monkeypatch.setattr(compiled, "launch", spy)
    return names


MODELS = [
    {},
    {"ranks": (4,), "norm": False},
    {"ranks": (), "trained": ("norm",)},
    {"trained": ("norm", "weight", "bias"), "use_rslora": True},
    {"ranks": (1,), "norm": False, "trained": ("to_k", "bias")},
    {"ranks": (), "norm": False},
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", MODELS)
def test_results_and_gradients_are_exact_in_fp64(backend, options, nan_filled, launched):
    model = make_model(**options)
    adapted = options.get("ranks") != ()
    if backend == "cpu" and not adapted:
        with pytest.raises(RuntimeError, match="no projection has an adapter"):
            ours(model, backend)(make_input())
        return
    for shape in ((10,), (7, 10), (2, 5, 10), (1, 3, 2, 10)):
        for layout in LAYOUTS if len(shape) > 1 else LAYOUTS[:1]:
            x = make_input(shape, layout=layout)
            assert OPS["lora_linear"].choose("auto", x) == "torch"
            assert OPS["lora_linear"].choose("auto", x, arguments(model)[0]) == ("cpu" if adapted else "torch")
            grads = make_grads(model, x)
            handed = [grads, [g.flatten()[0].expand_as(g) for g in grads]]
            handed += [[laid_out(g, other) for g in grads] for other in LAYOUTS[1:] if len(shape) > 1]
            for g in handed:
                mine = results(ours(model, backend), model, x, g)
                exact = results(model, model, x, g)
                assert max(relative_error(a, b) for a, b in zip(mine, exact, strict=True)) < 1e-12
                assert launched == (["lora_add", "lora_grads"] if backend == "cpu" else [])
                launched.clear()


@pytest.mark.parametrize("backend", ["torch", "auto"])
def test_an_input_that_needs_no_gradient(backend):
    """Text: its keys and values have trained adapters, itself it is fixed."""
    for options in MODELS[:5]:
        model, x = make_model(**options), make_input().detach()
        grads = make_grads(model, x)
        mine, exact = (results(f, model, x, grads) for f in (ours(model, backend), model))
        assert max(relative_error(a, b) for a, b in zip(mine, exact, strict=True)) < 1e-12


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_each_gradient_alone(backend, norm):
    model, x = make_model(norm=norm, trained=("norm", "weight", "bias")), make_input()
    grads = make_grads(model, x)
    together = results(ours(model, backend), model, x, grads)[3:]
    for i, expected in enumerate(together):
        alone = copy.deepcopy(model).requires_grad_(False)
        leaf = x.detach()
        [leaf, *alone.parameters()][i].requires_grad_()
        assert relative_error(results(ours(alone, backend), alone, leaf, grads)[3], expected) < 1e-14


# (dtype of the base, of its LoRA, of x, of autocast)
PRECISIONS = [
    *((dtype, dtype, dtype, None) for dtype in DTYPES[1:]),
    (torch.bfloat16, torch.float32, torch.bfloat16, None),
    (torch.float16, torch.float32, torch.float16, None),
    (torch.bfloat16, torch.float32, torch.bfloat16, torch.bfloat16),
    (torch.float32, torch.float32, torch.float32, torch.bfloat16),
    (torch.float32, torch.bfloat16, torch.float32, None),
]


@pytest.mark.parametrize("backend", ["torch", "cpu"])
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize(("base", "lora", "given", "lower"), PRECISIONS)
def test_low_precision_is_as_good_as_peft(base, lora, given, lower, norm, backend, any_rank, launched):
    model = make_model((4, 3), 48, norm, ("norm", "to_v"), base, lora)
    x = make_input((4, 33, 48), given)
    with torch.autocast("cpu", dtype=lower, enabled=lower is not None):
        grads = make_grads(model, x)

    def run(function):
        def forward(x):
            with torch.autocast("cpu", dtype=lower, enabled=lower is not None):
                return function(x)

        return results(forward, model, x, grads)

    wide = copy.deepcopy(model).double()
    exact = results(wide, wide, x.detach().double().requires_grad_(), [g.double() for g in grads])
    assert_as_good_as(run(model), run(ours(model, backend)), exact)
    assert launched == (["lora_add", "lora_grads"] if backend == "cpu" else [])


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_adapters_of_several_dtypes_run_each_in_its_own(backend):
    model, x = make_model(), make_input()
    for name, module in model.named_modules():
        if name.endswith("adapter1"):
            module.float()
    grads = make_grads(model, x)
    for mine, expected in zip(
        results(ours(model, backend), model, x, grads), results(model, model, x, grads), strict=True
    ):
        assert mine.dtype == expected.dtype and relative_error(mine, expected) < 1e-6


@pytest.mark.parametrize("backend", ["torch", "cpu"])
@pytest.mark.parametrize(("base", "lora", "given", "lower"), PRECISIONS)
@pytest.mark.parametrize("norm", [True, False])
def test_only_the_input_is_saved(base, lora, given, lower, norm, backend, any_rank):
    model, x = make_model((4, 2), 10, norm, ("to_v",), base, lora), make_input((3, 7, 10), given)
    with torch.autocast("cpu", dtype=lower, enabled=lower is not None):
        assert _saved(model, x, backend) == x.nbytes


def _saved(model, x, backend="torch"):
    with saved_bytes(excluded=list(model.parameters())) as saved:
        outputs = ours(model, backend)(x)
    assert any(y.requires_grad for y in outputs)
    return saved["bytes"]


def test_what_nothing_needs_is_not_saved():
    x = make_input()
    assert _saved(make_model((), norm=False), x) == 0
    assert _saved(make_model((), norm=False, trained=("bias",)), x) == 0
    assert _saved(make_model((), norm=False, trained=("to_k",)), x) == x.nbytes
    frozen = make_model(norm=False).requires_grad_(False)
    assert _saved(frozen, x) == 0
    assert _saved(make_model(()), x) == x.nbytes


def test_the_input_is_saved_once_for_all_projections_with_an_op_before_it():
    model, x = make_model((2,)), make_input()
    own = {p.data_ptr() for p in model.parameters()}
    others = [t.data_ptr() for t in saved_by(ours(model), x) if t.data_ptr() not in own]
    assert others == [x.data_ptr()]


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_a_backward_under_autocast_computes_as_its_forward(backend):
    model, x = make_model((2,), dtype=torch.float32), make_input(dtype=torch.float32)
    grads = make_grads(model, x)
    outputs = ours(model, backend)(x)
    expected = torch.autograd.grad(outputs, x, grads, retain_graph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(torch.autograd.grad(outputs, x, grads)[0], expected[0])


def test_dtypes_that_stock_layers_refuse_are_refused():
    model, x = make_model((2,), norm=False, dtype=torch.bfloat16), make_input(dtype=torch.float32)
    for function in (model, ours(model)):
        with pytest.raises(RuntimeError, match="dtype"):
            function(x)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("norm", [True, False])
def test_gradcheck(backend, norm):
    model, x = make_model((2,), 4, norm, ("norm", "weight", "bias")), make_input((2, 3, 4))
    projections, norm = arguments(model)
    scales = [[a.scale for a in p.adapters] for p in projections]
    norms = [] if norm is None else list(norm[:2])

    def function(x, *tensors):
        given = None if norm is None else Norm(*tensors[:2], norm.eps)
        return lora_linears(x, restore(tensors[len(norms) :], scales), given, backend=backend)

    assert torch.autograd.gradcheck(function, [x, *norms, *flatten(projections)])


def test_one_projection():
    model, x = make_model(), make_input()
    projections, norm = arguments(model)
    for projection, expected in zip(projections, model(x), strict=True):
        assert relative_error(lora_linear(x, projection, norm=norm), expected) < 1e-14


def test_the_primitives_of_a_layer_that_recomputes_its_projections():
    """As a fused attention uses them: project again in the backward, then take its gradients through."""
    model, x = make_model(trained=("norm", "weight")), make_input()
    projections, norm = arguments(model)
    grads = make_grads(model, x)
    scales = [[adapter.scale for adapter in p.adapters] for p in projections]
    wanted = [t is not None and t.requires_grad for t in flatten(projections)]
    with torch.no_grad():
        n = normalise(x, norm, None)[0]
        outputs = project(n, projections, None)
        grad_n, found = project_backward(n, projections, grads, True, restore(wanted, scales), None)
    leaves = [n.requires_grad_(), *(t for t, want in zip(flatten(projections), wanted, strict=True) if want)]
    expected = lora_linears_reference(n, projections, None)
    exact = [*expected, *torch.autograd.grad(expected, leaves, grads)]
    mine = [*outputs, grad_n.view(n.shape), *(g for g in flatten(found) if g is not None)]
    assert max(relative_error(a, b) for a, b in zip(mine, exact, strict=True)) < 1e-13


@pytest.mark.parametrize(
    "affine", [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.float32,), ()]
)
def test_autocast_runs_the_norm_in_fp32_on_other_devices_than_a_cpu(affine):
    """Its dtypes, without such a device: x of bf16, the norm and its gradient in fp32, the products in bf16."""
    model, x = (
        make_model(trained=("norm",), dtype=torch.float32).to("meta"),
        make_input(dtype=torch.bfloat16).to("meta"),
    )
    projections, norm = arguments(model)
    norm = Norm(
        *(torch.empty(10, dtype=dtype, device="meta") for dtype in affine), *[None] * (2 - len(affine)), norm.eps
    )
    lower = torch.bfloat16
    needs = restore([False] * len(flatten(projections)), [[1.0] * len(p.adapters) for p in projections])
    with torch.no_grad():
        n, mean, inverse_deviation = normalise(x, norm, lower)
        outputs = project(n, projections, lower)
        grad_n, _ = project_backward(n, projections, outputs, True, needs, lower)
        wanted = [True, *(tensor is not None for tensor in norm[:2])]
        grads = normalise_backward(grad_n.view(n.shape), x, norm, mean, inverse_deviation, wanted, lower)
    assert n.dtype == torch.float32 and all(y.dtype == lower for y in outputs)
    assert [g.dtype for g in grads if g is not None] == [lower, *affine]


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_outputs_may_be_changed_in_place(backend):
    model, x = make_model(), make_input()
    grads = make_grads(model, x)

    def shifted(function):
        return lambda x: tuple(y.mul_(2) for y in function(x))

    mine, exact = (results(shifted(f), model, x, grads) for f in (ours(model, backend), model))
    assert max(relative_error(a, b) for a, b in zip(mine, exact, strict=True)) < 1e-12


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_a_graph_serves_twice_and_not_after_a_weight_changed(backend):
    model, x = make_model(), make_input()
    outputs, grads = ours(model, backend)(x), make_grads(model, x)
    first, second = (torch.autograd.grad(outputs, x, grads, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    with torch.no_grad():
        arguments(model)[0][0].adapters[0].a.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(outputs, x, grads)


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_an_output_that_is_not_used(backend):
    model, x = make_model(), make_input()
    mine, exact = (torch.autograd.grad(f(x)[1].sum(), x)[0] for f in (ours(model, backend), model))
    assert relative_error(mine, exact) < 1e-13


def test_a_second_derivative_is_an_error_in_words():
    x = make_input()
    (grad,) = torch.autograd.grad(ours(make_model())(x)[0].square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match='lora_linears.*second time.*backend="reference" does'):
        grad.sum().backward()


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_empty_inputs(backend, nan_filled):
    model, x = make_model(), torch.empty(0, 3, 10, dtype=torch.float64, requires_grad=True)
    *outputs, grad_x = (found := results(ours(model, backend), model, x, make_grads(model, x)))[:4]
    assert not any(t.any() for t in found)
    assert [y.shape for y in outputs] == [(0, 3, 8), (0, 3, 8), (0, 3, 14)] and grad_x.shape == x.shape


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_without_gradients(backend):
    model, x = make_model(), make_input()
    expected = model(x)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            for mine, y in zip(ours(model, backend)(x), expected, strict=True):
                assert relative_error(mine, y) < 1e-14 and not mine.requires_grad


def test_fake_meta_functorch_and_compiled():
    model, x = make_model(dtype=torch.float32), make_input(dtype=torch.float32)
    grads = make_grads(model, x)
    meta = copy.deepcopy(model).to("meta")
    found = results(ours(meta), meta, x.to("meta"), [g.to("meta") for g in grads])
    assert [t.shape for t in found] == [t.shape for t in results(model, model, x, grads)]
    for backend in ("torch", "cpu"):
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            fake = [mode.from_tensor(g) for g in grads]
            found = results(ours(model, backend), model, mode.from_tensor(x), fake)
        assert [t.shape for t in found] == [t.shape for t in results(model, model, x, grads)]
    with torch.no_grad():
        mapped = torch.func.vmap(ours(model, "auto"))(x)
    for mine, expected in zip(mapped, model(x), strict=True):
        torch.testing.assert_close(mine, expected)

    def loss(x):
        return sum(y.square().sum() for y in ours(model, "auto")(x))

    (expected,) = torch.autograd.grad(loss(x), x)
    torch._dynamo.reset()
    (compiled,) = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(x), x)
    torch.testing.assert_close(compiled, expected)


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_the_flops_are_the_base_s_two_products_and_the_adapters_through_their_rank(backend):
    rank, width, rows = 2, 10, 10
    model, x = make_model((rank,), width), make_input()
    grads = make_grads(model, x)
    outs = sum(g.shape[-1] for g in grads)
    with FlopCounterMode(display=False) as counter:
        results(ours(model, backend), model, x, grads)
    base = 2 * rows * width * outs
    down, up = 2 * rows * width * 3 * rank, 2 * rows * outs * rank
    # Forward: down, up. Backward: down again, up's two gradients, down's two.
    assert counter.get_total_flops() == 2 * base + (1 + 1 + 2) * down + (1 + 2) * up


class Calls(TorchDispatchMode):
    """Counts what runs through the dispatcher, by name."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.counts[str(function)] += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("train", [True, False])
def test_the_adapters_of_three_projections_are_one_call_forward_and_one_backward(train):
    model, x = make_model((3, 2), norm=False), make_input().detach()
    projections, _ = arguments(model)
    grads = [g.detach() for g in make_grads(model, x)]
    needs = restore([False, False, *[train] * 4] * 3, [[1.0, 1.0]] * 3)
    with torch.no_grad(), Calls() as calls:
        project(x, projections, None)
    assert calls.counts == {
        "aten.view.default": 1, "aten.t.default": 3, "aten.mm.default": 1, "aten.addmm.default": 2,
        "aten._unsafe_view.default": 3, "rftcore.lora_add.default": 1,
    }  # fmt: skip
    with torch.no_grad(), Calls() as calls:
        project_backward(x if train else None, projections, grads, True, needs, None)
    assert calls.counts == {
        "aten.view.default": 3, "aten.mm.default": 1, "aten.addmm.out": 2, "rftcore.lora_grads.default": 1,
    }  # fmt: skip


def test_a_scale_costs_pytorch_s_products_no_call():
    model, x = make_model((3,), norm=False), make_input((6, 10)).detach()
    grads = [g.detach() for g in make_grads(model, x)]
    needs = restore([False, False, True, True] * 3, [[1.0]] * 3)
    with torch.no_grad(), Calls() as calls:
        project_backward(x, arguments(model)[0], grads, True, needs, None, backend="torch")
    assert not any("mul" in name for name in calls.counts)


def test_results_do_not_depend_on_the_number_of_threads():
    model, x = make_model((4, 3), 64, False, dtype=torch.float32), make_input((3, 1111, 64), torch.float32)
    grads = make_grads(model, x)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = results(ours(model, "cpu"), model, x, grads)
        torch.set_num_threads(3)
        together = results(ours(model, "cpu"), model, x, grads)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


@pytest.mark.parametrize("backend", ["torch", "auto"])
@pytest.mark.parametrize("ranks", [(3, 2), ()])
@pytest.mark.parametrize("kind", ["alike", "transposed", "one row", "wider"])
def test_a_residual(backend, ranks, kind, launched):
    dtype = torch.float32 if kind == "wider" else torch.float64
    model, n = make_model(ranks, norm=False, dtype=dtype), make_input(dtype=dtype).detach()
    projection = arguments(model)[0][0]
    residual = torch.randn((1, 5, 8) if kind == "one row" else (2, 5, 8), dtype=torch.float64)
    residual = laid_out(residual, "transposed") if kind == "transposed" else residual
    kept = residual.clone()
    with torch.no_grad():
        (y,) = project(n, [projection], None, residual=residual, backend=backend)
        expected = model.to_q(n) + residual
    assert torch.equal(residual, kept) and y.dtype == expected.dtype
    assert relative_error(y, expected) < (1e-6 if kind == "wider" else 1e-14)
    assert launched == (["lora_add"] if backend == "auto" and ranks else [])
    if backend == "auto" and ranks and kind == "alike":
        with torch.no_grad(), Calls() as calls:
            project(n, [projection], None, residual=residual)
        assert not any("add." in name or "add_." in name for name in calls.counts if "rftcore" not in name)


def test_a_residual_of_several_projections_is_refused():
    projections, _ = arguments(make_model(norm=False))
    with pytest.raises(ValueError, match="residual is given with 3 projections; it is added to one"):
        project(make_input().detach(), projections, None, residual=torch.zeros(2, 5, 8).double())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(2, 4, dtype=torch.int64)}, "x is torch.int64"),
        ({"x": torch.tensor(1.0)}, "x is (); it must be (..., in)"),
        ({"projections": ()}, "projections is empty"),
        ({"projections": [Projection(torch.zeros(3, 5))]}, "weight is (3, 5); for this x it must be (3, 4)"),
        ({"projections": [Projection(torch.zeros(3, 4), torch.zeros(4))]}, "bias is (4,); for this x it must be (3,)"),
        (
            {
                "projections": [
                    Projection(torch.zeros(3, 4), None, (Adapter(torch.zeros(2, 3), torch.zeros(3, 2), 1.0),))
                ]
            },
            "a is (2, 3); for this x it must be (2, 4)",
        ),
        (
            {
                "projections": [
                    Projection(torch.zeros(3, 4), None, (Adapter(torch.zeros(2, 4), torch.zeros(4, 2), 1.0),))
                ]
            },
            "b is (4, 2); for this x it must be (3, 2)",
        ),
        ({"norm": Norm(torch.zeros(3), None, 1e-5)}, "norm.weight is (3,)"),
        ({"norm": Norm(None, torch.zeros(4, device="meta"), 1e-5)}, "norm.bias is on meta"),
        ({"backend": "gpu"}, "backend='gpu' is unknown"),
    ],
)
def test_errors_name_the_argument_and_what_is_allowed(changes, message):
    with pytest.raises(ValueError) as error:
        lora_linears(**({"x": torch.zeros(2, 4), "projections": [Projection(torch.zeros(3, 4))]} | changes))
    assert message in str(error.value)

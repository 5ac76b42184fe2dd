"""lora_conv2d: against PEFT's convolution."""

import copy

import pytest
import torch
from adapted import adapt, adapters_of, results
from checks import DTYPES, LAYOUTS, assert_as_good_as, laid_out, relative_error
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.memory import saved_bytes
from rftcore.ops import Adapter, Geometry, lora_conv2d
from rftcore.ops.backends import OPS

BACKENDS = ["torch", "reference"]
# Channels in and out, kernel, and how it walks; groups divide the ranks.
CASES = [
    ((6, 4, (3, 3)), {"padding": (1, 1)}),
    ((6, 9, (3, 3)), {"stride": (2, 2), "padding": (1, 1), "bias": False}),
    ((6, 4, (1, 1)), {}),
    ((4, 6, (2, 3)), {"stride": (3, 2), "padding": (0, 1), "groups": 2}),
]


class Convolution(nn.Module):
    """A convolution whose forward PEFT may wrap."""

    def __init__(self, *sizes, **geometry):
        super().__init__()
        self.conv = nn.Conv2d(*sizes, **geometry)

    def forward(self, x):
        return self.conv(x)


def make_model(case=CASES[0], ranks=(4, 2), trained=(), dtype=torch.float64, lora=None, **options):
    sizes, geometry = case
    model = adapt(Convolution(*sizes, **geometry).to(dtype), ranks, lora or dtype, **options)
    for name, parameter in model.named_parameters():
        if "lora" not in name:
            parameter.requires_grad_(any(part in name for part in trained))
    return model


def ours(model, backend="torch"):
    layer = model.conv
    base = getattr(layer, "base_layer", layer)
    adapters = adapters_of(layer) if base is not layer else ()
    geometry = Geometry(base.stride, base.padding, base.dilation, base.groups)
    return lambda x: lora_conv2d(x, base.weight, base.bias, adapters, geometry, backend=backend)


def make_input(channels=6, dtype=torch.float64, layout="contiguous", size=(8, 7)):
    return laid_out(torch.randn(2, channels, *size, dtype=torch.float64), layout).to(dtype).requires_grad_()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "options",
    [{}, {"ranks": (2,), "trained": ("weight", "bias"), "use_rslora": True}, {"ranks": ()}, {"trained": ("bias",)}],
)
def test_results_and_gradients_are_exact_in_fp64(backend, layout, options):
    for case in CASES:
        model, x = make_model(case, **options), make_input(case[0][0], layout=layout)
        assert OPS["lora_conv2d"].choose("auto", x) == "torch"
        grad = torch.randn_like(model(x))
        for g in [*(laid_out(grad, other) for other in LAYOUTS), grad.flatten()[0].expand_as(grad)]:
            mine = results(ours(model, backend), model, x, [g])
            exact = results(model, model, x, [g])
            assert max(relative_error(a, b) for a, b in zip(mine, exact, strict=True)) < 1e-12


def test_each_gradient_alone():
    model, x = make_model(trained=("weight", "bias")), make_input()
    grad = torch.randn_like(model(x))
    for i, expected in enumerate(results(ours(model), model, x, [grad])[1:]):
        alone, leaf = copy.deepcopy(model).requires_grad_(False), x.detach()
        [leaf, *alone.parameters()][i].requires_grad_()
        assert relative_error(results(ours(alone), alone, leaf, [grad])[1], expected) < 1e-14


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS[:2])
def test_output_and_gradient_have_the_memory_format_of_x(dtype, layout):
    expected = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    for case in CASES:
        model, x = make_model(case, dtype=dtype, lora=torch.float32), make_input(case[0][0], dtype, layout)
        y = ours(model)(x)
        for grad in (torch.ones_like(y), torch.ones((), dtype=dtype).expand_as(y)):
            (grad_x,) = torch.autograd.grad(y, x, grad, retain_graph=True)
            assert y.is_contiguous(memory_format=expected) and grad_x.is_contiguous(memory_format=expected)


# (dtype of the base, of its LoRA, of x, of autocast)
PRECISIONS = [
    *((dtype, dtype, dtype, None) for dtype in DTYPES[1:]),
    (torch.bfloat16, torch.float32, torch.bfloat16, None),
    (torch.bfloat16, torch.float32, torch.bfloat16, torch.bfloat16),
    (torch.float32, torch.float32, torch.float32, torch.bfloat16),
    (torch.float32, torch.bfloat16, torch.float32, None),
]


@pytest.mark.parametrize("trained", [(), ("weight", "bias")])
@pytest.mark.parametrize(("base", "lora", "given", "lower"), PRECISIONS)
def test_low_precision_is_as_good_as_peft(base, lora, given, lower, trained):
    case = (24, 32, (3, 3)), {"padding": (1, 1), "stride": (2, 2)}
    model = make_model(case, (4, 3), trained, base, lora)
    x = make_input(24, given, "channels_last", (12, 13))

    def run(function):
        def forward(x):
            with torch.autocast("cpu", dtype=lower, enabled=lower is not None):
                return function(x)

        return results(forward, model, x, [grad])

    with torch.autocast("cpu", dtype=lower, enabled=lower is not None):
        grad = torch.randn_like(model(x))
    wide = copy.deepcopy(model).double()
    exact = results(wide, wide, x.detach().double().requires_grad_(), [grad.double()])
    assert_as_good_as(run(model), run(ours(model)), exact)


def _saved(model, x):
    with saved_bytes(excluded=list(model.parameters())) as saved:
        assert ours(model)(x).requires_grad
    return saved["bytes"]


@pytest.mark.parametrize(("base", "lora", "given", "lower"), PRECISIONS)
def test_only_the_input_is_saved(base, lora, given, lower):
    model, x = make_model(dtype=base, lora=lora), make_input(dtype=given)
    with torch.autocast("cpu", dtype=lower, enabled=lower is not None):
        assert _saved(model, x) == x.nbytes


def test_what_nothing_needs_is_not_saved():
    x = make_input()
    assert _saved(make_model(ranks=()), x) == 0
    assert _saved(make_model(ranks=(), trained=("bias",)), x) == 0
    assert _saved(make_model(ranks=(), trained=("weight",)), x) == x.nbytes
    assert _saved(make_model().requires_grad_(False), x) == 0


def test_a_backward_under_autocast_computes_as_its_forward():
    model, x = make_model(dtype=torch.float32), make_input(dtype=torch.float32)
    y = ours(model)(x)
    (expected,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(torch.autograd.grad(y, x, torch.ones_like(y))[0], expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES[1::2])
def test_gradcheck(backend, case):
    model, x = make_model(case, (2,), ("weight", "bias")), make_input(case[0][0], size=(4, 5))
    base, (adapter,) = model.conv.base_layer, adapters_of(model.conv)
    geometry = Geometry(base.stride, base.padding, groups=base.groups)

    def function(x, weight, bias, a, b):
        return lora_conv2d(x, weight, bias, [Adapter(a, b, adapter.scale)], geometry, backend=backend)

    assert torch.autograd.gradcheck(function, [x, base.weight, base.bias, adapter.a, adapter.b])


def test_outputs_may_be_changed_in_place():
    model, x = make_model(), make_input()
    mine, exact = (torch.autograd.grad(f(x).mul_(2).square().sum(), x)[0] for f in (ours(model), model))
    assert relative_error(mine, exact) < 1e-12


def test_a_graph_serves_twice_and_not_after_a_weight_changed():
    model, x = make_model(), make_input()
    y = ours(model)(x)
    first, second = (torch.autograd.grad(y.sum(), x, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    with torch.no_grad():
        adapters_of(model.conv)[0].b.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_a_second_derivative_is_an_error_in_words():
    x = make_input()
    (grad,) = torch.autograd.grad(ours(make_model())(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match='lora_conv2d.*second time.*backend="reference" does'):
        grad.sum().backward()


def test_an_empty_batch():
    model, x = make_model(), torch.empty(0, 6, 8, 7, dtype=torch.float64, requires_grad=True)
    y, grad_x, *others = results(ours(model), model, x, [torch.empty(0, 4, 8, 7, dtype=x.dtype)])
    assert y.shape == (0, 4, 8, 7) and grad_x.shape == x.shape and all((g == 0).all() for g in others)


def test_without_gradients():
    model, x = make_model(), make_input()
    expected = model(x)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            y = ours(model)(x)
        assert relative_error(y, expected) < 1e-14 and not y.requires_grad


def test_fake_meta_functorch_and_compiled():
    model, x = make_model(dtype=torch.float32), make_input(dtype=torch.float32)
    grad = torch.randn_like(model(x))
    meta = copy.deepcopy(model).to("meta")
    found = results(ours(meta), meta, x.to("meta"), [grad.to("meta")])
    assert [t.shape for t in found] == [t.shape for t in results(model, model, x, [grad])]
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        results(ours(model), model, mode.from_tensor(x), [mode.from_tensor(grad)])
    with torch.no_grad():
        mapped = torch.func.vmap(lambda x: ours(model, "auto")(x[None]))(x)
    torch.testing.assert_close(mapped[:, 0], model(x))

    def loss(x):
        return ours(model, "auto")(x).square().sum()

    (expected,) = torch.autograd.grad(loss(x), x)
    torch._dynamo.reset()
    (compiled,) = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(x), x)
    torch.testing.assert_close(compiled, expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(4, 5, 5)}, "x is (4, 5, 5); it must be (N, C, H, W)"),
        ({"weight": torch.zeros(2, 3, 3, 3)}, "weight is (2, 3, 3, 3); for this x it must be (2, 4, 3, 3)"),
        ({"geometry": Geometry(dilation=(2, 2))}, "dilation=(2, 2) with adapters"),
        (
            {"adapters": [Adapter(torch.zeros(1, 4, 1, 1), torch.zeros(2, 1, 1, 1), 1.0)]},
            "a is (1, 4, 1, 1); for this x it must be (1, 4, 3, 3)",
        ),
        (
            {"adapters": [Adapter(torch.zeros(1, 4, 3, 3), torch.zeros(2, 3, 1, 1), 1.0)]},
            "b is (2, 3, 1, 1); for this x it must be (2, 1, 1, 1)",
        ),
        ({"backend": "gpu"}, "backend='gpu' is unknown"),
    ],
)
def test_errors_name_the_argument_and_what_is_allowed(changes, message):
    inputs = {
        "x": torch.zeros(1, 4, 5, 5),
        "weight": torch.zeros(2, 4, 3, 3),
        "bias": None,
        "adapters": [Adapter(torch.zeros(1, 4, 3, 3), torch.zeros(2, 1, 1, 1), 1.0)],
        "geometry": Geometry(),
    }
    with pytest.raises(ValueError) as error:
        lora_conv2d(**(inputs | changes))
    assert message in str(error.value)

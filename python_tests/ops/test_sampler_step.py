"""sampler_step: every backend against PyTorch's own distributions and autograd in fp64."""

import math
from itertools import product

import pytest
import torch
from checks import COMPILED, DTYPES, relative_error
from hypothesis import given, settings
from hypothesis import strategies as st
from steps import make_coefficients, make_inputs, truth
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from rftcore import build
from rftcore.ops import Coefficient, sampler_step
from rftcore.ops.backends import OPS

C = Coefficient


def run(function, x, m, grads, *arguments, **options):
    """Results and gradients of `function`; `grads` are those of its three results, None where not used."""
    outputs = function(x, m, *arguments, **options)
    pairs = [(o, g) for o, g in zip(outputs, grads, strict=True) if o is not None and o.requires_grad and g is not None]
    inputs = torch.autograd.grad([o for o, _ in pairs], [x, m], [g for _, g in pairs], materialize_grads=True)
    return [o for o in (*outputs, *inputs) if o is not None]


def assert_served(backend, *inputs):
    """The backend asked for is the one that `auto` takes (the reference serves everything)."""
    assert backend == "reference" or OPS["sampler_step"].choose("auto", *inputs) == backend


@pytest.mark.covering(2)
@pytest.mark.parametrize("divergence", [None, "exact", "uniform"])
@pytest.mark.parametrize("mode", ["noise", "mean", "score"])
def test_results_and_gradients_are_exact_in_fp64(backend, divergence, mode):
    # 3 * 11 * 19 = 627 elements: a block and a part of one.
    shape = (3, 3, 11, 19)
    for guided, rows, clip in product((False, True), (False, True), (0.7, math.inf)):
        x, m, c = make_inputs(shape, guided=guided, rows=rows, clip=clip)
        if rows:
            c[1, C.SIGMA] = 0
        other = torch.randn(shape, dtype=torch.float64)
        options = {"noise": {"noise": other}, "score": {"next_sample": other}, "mean": {}}[mode]
        if divergence:
            # Near the model output, as a reference is: some elements are clamped in one of the two only.
            reference_output = m.detach() + 0.3 * torch.randn_like(m)
            options |= {"reference_output": reference_output, "divergence": divergence}
        grads = [torch.randn_like(other), *torch.randn(2, shape[0], dtype=torch.float64)]
        assert_served(backend, x, m)
        ours = run(sampler_step, x, m, grads, c, backend=backend, **options)
        exact = run(truth, x, m, grads, c, **options)
        assert max(relative_error(a, b) for a, b in zip(ours, exact, strict=True)) < 1e-12


# Not emulated: with its hundreds of launches that takes long, and truth() says as much.
@pytest.mark.parametrize("backend", ["reference", "cpu", "cuda"], indirect=True)
@pytest.mark.parametrize("divergence", ["exact", "uniform"])
def test_gradcheck(backend, divergence):
    x, m, c = make_inputs((2, 3, 4), clip=0.6)
    fixed = {"reference_output": torch.randn_like(m), "divergence": divergence, "backend": backend}
    noise = torch.randn_like(x)

    # The log-probability is taken of the next sample as a constant, so finite differences see it only when scoring.
    def sample(x, m):
        stepped, _, distance = sampler_step(x, m, c, noise=noise, **fixed)
        return stepped, distance

    def score(x, m):
        return sampler_step(x, m, c, next_sample=noise, **fixed)[1:]

    assert torch.autograd.gradcheck(sample, (x, m))
    assert torch.autograd.gradcheck(score, (x, m))


@pytest.mark.covering(2)
@COMPILED
@pytest.mark.parametrize(("dtype", "output_dtype"), list(product(DTYPES, DTYPES)))
def test_low_precision_is_as_good_as_pytorch(backend, dtype, output_dtype):
    x, m, c = make_inputs((4, 4, 16, 16), dtype, output_dtype, clip=0.7)
    options = {"noise": torch.randn_like(x), "reference_output": torch.randn_like(m), "divergence": "exact"}
    wide = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    grads = [torch.randn_like(x), *torch.randn(2, 4, dtype=c.dtype)]
    wide_grads = [g.double() for g in grads]

    ours = run(sampler_step, x, m, grads, c, backend=backend, **options)
    stock = run(sampler_step, x, m, grads, c, backend="reference", **options)
    exact = run(sampler_step, x.detach().double().requires_grad_(), m.detach().double().requires_grad_(), wide_grads,
                c.double(), backend="reference", **wide)  # fmt: skip
    assert [o.dtype for o in ours] == [dtype, c.dtype, c.dtype, dtype, output_dtype]
    assert torch.equal(ours[0], stock[0])  # same operations in the same order
    for mine, yardstick, expected in zip(ours, stock, exact, strict=True):
        assert relative_error(mine, expected) <= 2 * relative_error(yardstick, expected) + 1e-6


@COMPILED
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_conversions_equal_pytorchs(backend, dtype):
    """All 65,536 values of a 16-bit type in, and fp32 values on and beside the ties between them out."""
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype)
    every = every[every.isfinite()]
    halfway = every.float() + (every.float() - every.float().nextafter(torch.tensor(0.0))) * (
        1 << (15 if dtype == torch.bfloat16 else 12)
    )
    values = torch.cat([halfway, halfway.nextafter(torch.tensor(math.inf)), torch.tensor([math.nan, 1e38, -7e4])])
    c = torch.zeros(len(C))
    c[C.CLIP] = math.inf
    c[C.MEAN_FROM_OUTPUT] = 1
    zeros = torch.zeros(1, len(values), dtype=dtype)
    out = sampler_step(zeros, values[None], c, backend=backend).next_sample
    torch.testing.assert_close(out[0], values.to(dtype), rtol=0, atol=0, equal_nan=True)

    zeros = torch.zeros(1, len(every))
    out = sampler_step(zeros, every[None], c, backend=backend).next_sample
    assert torch.equal(out[0], every.float())


def test_the_clamps_gradient_passes_on_its_bounds(backend):
    x = torch.tensor([[-2.0, -1.0, 0.0, 1.0, 2.0, math.nan]], requires_grad=True)
    c = torch.tensor([1.0, 0, 1, 1, 0, 0, 0, 0, 1])
    stepped = sampler_step(x, torch.zeros_like(x), c, backend=backend).next_sample
    stepped.sum().backward()
    assert stepped.tolist()[0][:5] == [-1, -1, 0, 1, 1] and stepped[0, 5].isnan()
    assert x.grad.tolist()[0][:5] == [0, 1, 1, 1, 0]


def test_deterministic_rows_are_zero_without_nan(backend):
    x, m, c = make_inputs((3, 8))
    c[1, C.SIGMA] = 0
    options = {"noise": torch.randn_like(x), "reference_output": torch.randn_like(m), "backend": backend}
    for divergence in ("exact", "uniform"):
        step = sampler_step(x, m, c, divergence=divergence, **options)
        assert step.log_prob[1] == 0 and step.divergence[1] == 0
        assert (step.log_prob[[0, 2]] != 0).all() and (step.divergence[[0, 2]] > 0).all()
        grads = torch.autograd.grad(step.log_prob.sum() + step.divergence.sum(), [x, m])
        assert (grads[0][1] == 0).all() and (grads[1][[1, 4]] == 0).all()
        assert all(g.isfinite().all() and (g[0] != 0).any() for g in grads)


@pytest.mark.parametrize("used", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0)])
def test_gradients_may_be_undefined_expanded_or_strided(backend, used):
    # With no element clamped the divergence's gradient to the sample would be 0, and its error all rounding.
    x, m, c = make_inputs((4, 3, 6, 6), clip=0.6)
    options = {"noise": torch.randn_like(x), "reference_output": torch.randn_like(m), "divergence": "exact"}
    like = torch.randn(6, 6, 3, 4, dtype=torch.float64)
    layouts = [
        (like[0, 0, 0, 0].expand(x.shape), like[0, 0, 0, 0].expand(4), like[0, 0, 0, 0].expand(4)),
        (like.permute(3, 2, 0, 1), like[0, 0, 0], like[0, 0, 1]),
        (like.permute(3, 2, 0, 1).contiguous(memory_format=torch.channels_last), like[0, :4, 0, 0], like[:4, 0, 0, 0]),
    ]
    for grads in layouts:
        grads = [g if use else None for g, use in zip(grads, used, strict=True)]
        ours = run(sampler_step, x, m, grads, c, backend=backend, **options)
        exact = run(truth, x, m, grads, c, **options)
        assert max(relative_error(a, b) for a, b in zip(ours, exact, strict=True)) < 1e-12


def test_only_what_is_asked_for_gets_a_gradient(backend):
    x, m, c = make_inputs((2, 9))
    both = torch.autograd.grad(sampler_step(x, m, c, backend=backend).next_sample.sum(), [x, m])
    for i, (a, b) in enumerate(((x, m.detach()), (x.detach(), m))):
        (grad,) = torch.autograd.grad(sampler_step(a, b, c, backend=backend).next_sample.sum(), (a, b)[i])
        assert torch.equal(grad, both[i])
    with torch.no_grad():
        assert not sampler_step(x, m, c, backend=backend).log_prob.requires_grad
    given = torch.randn_like(x, requires_grad=True)
    step = sampler_step(x, m, c, next_sample=given, backend=backend)
    assert step.next_sample.data_ptr() == given.data_ptr() and not step.next_sample.requires_grad
    assert torch.autograd.grad(step.log_prob.sum(), given, allow_unused=True) == (None,)


def test_a_second_derivative_is_an_error_in_words():
    x, m, c = make_inputs((2, 9))
    (grad,) = torch.autograd.grad(sampler_step(x, m, c, backend="cpu").log_prob.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match='second time.*backend="reference" does'):
        grad.sum().backward()
    (grad,) = torch.autograd.grad(sampler_step(x, m, c, backend="reference").log_prob.sum(), x, create_graph=True)
    grad.sum().backward()
    assert (x.grad != 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_scoring_a_stored_step_gives_the_same_bits(backend, dtype):
    x, m, c = make_inputs((5, 4, 17, 13), dtype, torch.bfloat16, clip=0.8)
    options = {"reference_output": torch.randn_like(m), "divergence": "exact", "backend": backend}
    with torch.no_grad():
        taken = sampler_step(x, m, c, noise=torch.randn_like(x), **options)
    scored = sampler_step(x, m, c, next_sample=taken.next_sample, **options)
    assert torch.equal(taken.log_prob, scored.log_prob) and torch.equal(taken.divergence, scored.divergence)


@pytest.mark.parametrize("threads", [2, 3, 7])
def test_results_do_not_depend_on_the_number_of_threads(threads):
    # 1024 blocks: enough for four threads.
    x, m, c = make_inputs((2, 4, 256, 256), torch.float32, guided=False)
    options = {"noise": torch.randn_like(x), "reference_output": torch.randn_like(m), "divergence": "exact"}
    grads = [torch.randn_like(x), torch.ones(2), torch.ones(2)]
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = run(sampler_step, x, m, grads, c, backend="cpu", **options)
        torch.set_num_threads(threads)
        together = run(sampler_step, x, m, grads, c, backend="cpu", **options)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


@COMPILED
def test_a_sample_does_not_see_its_batch(backend):
    x, m, c = make_inputs((5, 4, 23, 29), torch.float32)
    noise = torch.randn_like(x)
    grads = [torch.randn_like(x), torch.randn_like(x[:, 0, 0, 0]), None]
    whole = run(sampler_step, x, m, grads, c, noise=noise, backend=backend)
    for i in (0, 3, 4):
        part = run(
            sampler_step,
            x[i : i + 1].detach().requires_grad_(),
            m[[i, 5 + i]].detach().requires_grad_(),
            [None if g is None else g[i : i + 1] for g in grads],
            c[i],
            noise=noise[i : i + 1],
            backend=backend,
        )
        expected = [*(w[i : i + 1] for w in whole[:3]), whole[3][[i, 5 + i]]]
        assert all(torch.equal(a, b) for a, b in zip(part, expected, strict=True))


@st.composite
def strided(draw, shape):
    """A tensor of `shape` whose dimensions are permuted, sliced and offset in memory."""
    order = draw(st.permutations(range(len(shape))))
    steps = [draw(st.integers(1, 2)) for _ in shape]
    base = torch.randn([shape[d] * steps[d] + 1 for d in order], dtype=torch.float64)
    view = base.permute([order.index(d) for d in range(len(shape))])
    return view[tuple(slice(1, 1 + n * s, s) if n else slice(0, 0) for n, s in zip(shape, steps, strict=True))]


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_any_shape_and_strides(data):
    shape = data.draw(st.lists(st.integers(0, 5), min_size=1, max_size=5), label="shape")
    guided = data.draw(st.booleans(), label="guided")
    x = data.draw(strided(shape)).requires_grad_()
    m = data.draw(strided([shape[0] * (1 + guided), *shape[1:]])).requires_grad_()
    c = make_coefficients(shape[0] if shape[0] and data.draw(st.booleans()) else None, clip=0.9)
    options = {
        "noise": data.draw(strided(shape)),
        "reference_output": data.draw(strided(m.shape)),
        "divergence": data.draw(st.sampled_from(["exact", "uniform"])),
    }
    grads = [data.draw(strided(shape)), *torch.randn(2, shape[0], dtype=torch.float64)]
    ours = run(sampler_step, x, m, grads, c, backend="cpu", **options)
    stock = run(sampler_step, x, m, grads, c, backend="reference", **options)
    for a, b in zip(ours, stock, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    if x.numel() == 0:
        assert (ours[1] == 0).all() and (ours[2] == 0).all()


def test_channels_last_gives_the_same_bits():
    x, m, c = make_inputs((2, 4, 8, 8), torch.float32)
    plain = sampler_step(x, m, c, backend="cpu")
    like = sampler_step(*(t.to(memory_format=torch.channels_last) for t in (x, m)), c, backend="cpu")
    assert torch.equal(plain.next_sample, like.next_sample) and torch.equal(plain.log_prob, like.log_prob)


GUARD = 64


def guarded(shape, dtype, fill):
    """A tensor of `shape` between two guards in one buffer, all filled; and the buffer."""
    buffer = torch.full((2 * GUARD + math.prod(shape),), fill, dtype=dtype)
    return buffer[GUARD : len(buffer) - GUARD].view(shape), buffer


@pytest.mark.parametrize(("dtype", "output_dtype"), list(product(DTYPES, DTYPES)))
@pytest.mark.parametrize("guided", [False, True])
def test_raw_calls_write_every_element_and_nothing_else(dtype, output_dtype, guided):
    shape = (2, 523)
    x, m, c = make_inputs(shape, dtype, output_dtype, guided=guided)
    x, m = x.detach(), m.detach()
    noise, reference_output = torch.randn_like(x), torch.randn_like(m)
    outputs = [guarded(shape, dtype, math.nan), guarded((2,), c.dtype, math.nan), guarded((2,), c.dtype, math.nan)]
    gradients = [guarded(shape, dtype, math.nan), guarded(m.shape, output_dtype, math.nan)]
    codes = [DTYPES.index(dtype), DTYPES.index(output_dtype), *shape, guided, True, 1]
    cpu = build.load("_cpu")
    address = torch.Tensor.data_ptr
    cpu.sampler_step_forward(
        *codes, *map(address, (x, m, c, noise)), 0, address(reference_output), *(address(t) for t, _ in outputs), 1
    )
    ones = torch.ones(2, dtype=c.dtype)
    cpu.sampler_step_backward(
        *codes, *map(address, (x, m, c, outputs[0][0], reference_output, noise, ones, ones)),
        *(address(t) for t, _ in gradients), 1,
    )  # fmt: skip
    for tensor, buffer in outputs + gradients:
        assert tensor.isfinite().all()
        assert buffer[:GUARD].isnan().all() and buffer[-GUARD:].isnan().all()


def test_an_unknown_dtype_code_is_an_exception():
    with pytest.raises(ValueError, match="unknown dtype code 9"):
        build.load("_cpu").sampler_step_forward(9, 0, 1, 1, False, False, 0, *[0] * 9, 1)


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("divergence", [0, 1, 2])
def test_opcheck(guided, divergence):
    x, m, c = (t.detach() for t in make_inputs((2, 3, 4, 4), guided=guided))
    reference_output = torch.randn_like(m) if divergence else None
    other = torch.randn(4, 3, 4, 2, dtype=torch.float64).permute(3, 1, 0, 2)
    ops = torch.ops.rftcore
    torch.library.opcheck(ops.sampler_step.default, (x, m, c, other, None, reference_output, divergence))
    torch.library.opcheck(ops.sampler_step.default, (x, m, c, None, other, reference_output, divergence))
    grad = torch.ones((), dtype=torch.float64).expand(2)
    for needs in ((True, True), (True, False), (False, True)):
        torch.library.opcheck(
            ops.sampler_step_backward.default,
            (other, grad, grad if divergence else None, x, m, c, other, reference_output, divergence, *needs),
        )


def test_meta_fake_and_zero_tensors_and_dispatch_modes_are_safe():
    x, m, c = make_inputs((2, 3, 4, 4))
    meta = sampler_step(x.to("meta"), m.to("meta"), c.to("meta"))
    assert meta.next_sample.device.type == "meta" and meta.log_prob.shape == (2,)

    # Fake tensors know no values: that this runs shows that nothing waits for one.
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(t) for t in (x, m, c)]
        step = sampler_step(*fake, noise=fake[0].detach(), reference_output=fake[1], divergence="exact", backend="cpu")
        step.log_prob.sum().backward()
        assert step.next_sample.shape == x.shape and step.divergence.shape == (2,)
        assert fake[0].grad.shape == x.shape and fake[1].grad.shape == m.shape

    zero = torch._efficientzerotensor(x.shape, dtype=torch.float64)
    expected = sampler_step(torch.zeros_like(x), m, c)
    assert torch.equal(sampler_step(zero, m, c, backend="cpu").next_sample, expected.next_sample)
    negative = torch.complex(x.detach(), -x.detach()).conj().imag
    assert negative.is_neg()
    assert torch.equal(sampler_step(negative, m, c, backend="cpu").log_prob, sampler_step(x, m, c).log_prob)

    seen = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(function.name())
            return function(*args, **(kwargs or {}))

    with Record():
        step = sampler_step(x, m, c, backend="cpu")
        step.next_sample.sum().backward()
    assert {"rftcore::sampler_step", "rftcore::sampler_step_backward"} <= set(seen)


def test_subclasses_go_through_the_dispatcher():
    class Tagged(torch.Tensor):
        pass

    x, m, c = make_inputs((2, 3))
    tagged = x.detach().as_subclass(Tagged)
    assert torch.equal(sampler_step(tagged, m, c, backend="cpu").log_prob, sampler_step(x, m, c).log_prob)


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_torch_compile_in_one_graph(compiler):
    x, m, c = make_inputs((2, 3, 4, 4), torch.float32)
    noise = torch.randn_like(x)

    def loss(x, m):
        step = sampler_step(x * 2, m, c, noise=noise, reference_output=m.detach() + 1, divergence="exact")
        return step.next_sample.square().sum() + step.log_prob.sum() + step.divergence.sum()

    expected = torch.autograd.grad(loss(x, m), [x, m])
    torch._dynamo.reset()
    compiled = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend=compiler)(x, m), [x, m])
    for a, b in zip(compiled, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_functorch_and_forward_mode_are_served_by_the_reference():
    x, m, c = (t.detach() for t in make_inputs((2, 3, 4)))
    stacked = torch.stack([x, x + 1])
    mapped = torch.func.vmap(lambda x: sampler_step(x, m, c).log_prob)(stacked)
    torch.testing.assert_close(mapped, torch.stack([sampler_step(s, m, c).log_prob for s in stacked]))

    def loss(x):
        return sampler_step(x, m, c).next_sample.square().sum()

    y = x.clone().requires_grad_()
    loss(y).backward()
    torch.testing.assert_close(torch.func.grad(loss)(x), y.grad)
    _, tangent = torch.func.jvp(loss, (x,), (torch.ones_like(x),))
    torch.testing.assert_close(tangent, y.grad.sum())
    with torch.autograd.forward_ad.dual_level():
        with pytest.raises(RuntimeError, match="forward-mode"):
            sampler_step(x, m, c, backend="cpu")


def bad(message, **changes):
    return pytest.param(changes, message, id=message)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        bad("sample is torch.int64", sample=torch.zeros(2, 3, dtype=torch.int64)),
        bad("sample has no dimension", sample=torch.tensor(1.0), model_output=torch.tensor(1.0)),
        bad("model_output is (3, 3)", model_output=torch.zeros(3, 3)),
        bad("model_output is (2, 4)", model_output=torch.zeros(2, 4)),
        bad("coefficients are (3, 9)", coefficients=torch.zeros(3, 9)),
        bad("coefficients are (9,), torch.float64", coefficients=torch.zeros(9, dtype=torch.float64)),
        bad("noise is (2, 1)", noise=torch.zeros(2, 1)),
        bad("next_sample is (2, 3), torch.float16", next_sample=torch.zeros(2, 3, dtype=torch.float16)),
        bad("noise and next_sample were both given", noise=torch.zeros(2, 3), next_sample=torch.zeros(2, 3)),
        bad("divergence='kl' is unknown", divergence="kl", reference_output=torch.zeros(2, 3)),
        bad("reference_output is missing", divergence="exact"),
        bad("divergence is missing", reference_output=torch.zeros(2, 3)),
        bad("reference_output is (4, 3)", divergence="exact", reference_output=torch.zeros(4, 3)),
        bad("model_output is on meta", model_output=torch.zeros(2, 3, device="meta")),
        bad("coefficients requires a gradient", coefficients=torch.ones(9, requires_grad=True)),
        bad("noise requires a gradient", noise=torch.ones(2, 3, requires_grad=True)),
        bad("backend='gpu' is unknown", backend="gpu"),
    ],
)
def test_errors_name_the_argument_and_what_is_allowed(changes, message):
    inputs = {"sample": torch.zeros(2, 3), "model_output": torch.zeros(2, 3), "coefficients": torch.ones(9)} | changes
    with pytest.raises(ValueError) as error:
        sampler_step(**inputs)
    assert message in str(error.value)


def test_an_explicit_backend_that_cannot_serve_says_why():
    x, m, c = make_inputs((2, 3))
    with pytest.raises(RuntimeError, match="backend='cuda' cannot serve this input: it serves cuda tensors"):
        sampler_step(x, m, c, backend="cuda")
    with pytest.raises(RuntimeError, match="sample is on meta"):
        sampler_step(x.to("meta"), m.to("meta"), c.to("meta"), backend="cpu")


@pytest.mark.parametrize("guided", [False, True])
def test_one_row_serves_every_sample(backend, guided):
    """(9,), (1, 9) and (B, 9) of equal rows are the same coefficients, for results and gradients."""
    x, m, c = make_inputs((3, 5), guided=guided, rows=False)
    grads = [torch.randn_like(x), *torch.randn(2, 3, dtype=torch.float64)]
    options = {"reference_output": torch.randn_like(m), "divergence": "exact", "backend": backend}
    one, row, rows = (run(sampler_step, x, m, grads, form, **options) for form in (c, c[None], c.repeat(3, 1)))
    assert all(map(torch.equal, row, one)) and all(map(torch.equal, rows, one))

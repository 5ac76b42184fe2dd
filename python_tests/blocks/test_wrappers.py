"""What may be around an accelerated model, or between its forward and its backward."""

import contextlib
import copy
import warnings

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from against_stock import (
    BOUND,
    assert_equal,
    assert_same,
    assert_served,
    backward,
    inputs,
    make,
    pair,
    randomise_adapters,
    results,
    weights,
)
from checks import relative_error
from diffusers import AutoencoderKL
from diffusers.models.attention_processor import AttnProcessor
from models import randomise_norms
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import rftcore


@pytest.mark.parametrize(("kind", "when"), [("sd1", "before"), pytest.param("sdxl", "after", marks=pytest.mark.slow)])
def test_torch_compile(kind, when, caplog):
    torch.compiler.reset()
    unet = make(kind)
    stock = copy.deepcopy(unet)
    if when == "before":
        rftcore.accelerate(unet)
    wrapped = torch.compile(unet, backend="eager")
    if when == "after":
        assert rftcore.accelerate(wrapped) is wrapped
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert_same(wrapped, stock, lambda: inputs(kind))
        with torch.no_grad():
            assert relative_error(wrapped(**inputs(kind)).sample, stock(**inputs(kind)).sample) <= BOUND
    ours = [str(w.message) for w in caught if "rftcore" in f"{w.message}{w.filename}" or "ynamo" in str(w.message)]
    assert not ours and "rftcore" not in caplog.text
    assert_served(wrapped)
    torch.compiler.reset()


def test_compiled_and_distributed():
    """Looking under wrappers leaves them as they are: without DistributedDataParallel no gradient would be averaged."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        stock, unet = make(), make()
        unet.load_state_dict(stock.state_dict())
        distributed = DistributedDataParallel(unet)
        wrapped = torch.compile(distributed, backend="eager")
        rftcore.accelerate(wrapped)
        assert wrapped._orig_mod is distributed and distributed.module is unet
        assert rftcore.report(wrapped).served == rftcore.report(unet).served
        assert_served(wrapped)
        other = DistributedDataParallel(torch.compile(stock, backend="eager"))
        rftcore.accelerate(other)
        assert_served(stock)
        rftcore.restore(wrapped)
        assert not rftcore.report(unet).served
    finally:
        torch.distributed.destroy_process_group()
        torch.compiler.reset()


def test_module_compile():
    torch.compiler.reset()
    stock, unet = pair(make())
    unet.compile(backend="eager")
    assert_same(unet, stock)
    assert_served(unet)
    torch.compiler.reset()


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_accelerator_prepare(precision, when):
    """With bf16 the output and gradients are at most twice as far from fp64 as stock's are."""
    exact = make()
    unet = copy.deepcopy(exact)
    if precision == "bf16":
        exact.float().double(), unet.float()
    stock = copy.deepcopy(unet)
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True, mixed_precision=precision)
    stock = accelerator.prepare(stock)
    if when == "before":
        rftcore.accelerate(unet)
    unet = accelerator.prepare(unet)
    if when == "after":
        rftcore.accelerate(unet)
    if precision == "no":
        assert_same(unet, stock)
    else:
        truth, theirs, ours = (
            [t for t in results(model, inputs(dtype=dtype)).values() if t is not None]
            for model, dtype in ((exact, torch.float64), (stock, torch.float32), (unet, torch.float32))
        )
        assert_as_close(ours, theirs, truth)
    assert_served(unet)
    rftcore.restore(unet)
    assert "forward" not in unet.mid_block.resnets[0].__dict__
    owner = accelerator.unwrap_model(unet, keep_fp32_wrapper=False)
    assert not [name for name, module in owner.named_modules() if "forward" in module.__dict__ and name]
    AcceleratorState._reset_state(reset_partial_state=True)


def assert_as_close(ours, theirs, truth):
    """At most twice stock's error: in the output, in the inputs' gradients, in the parameters' taken together."""
    assert [t.dtype for t in ours] == [t.dtype for t in theirs]
    mine, yardstick = (torch.tensor(list(map(relative_error, found, truth))) for found in (ours, theirs))
    for of in (slice(0, 1), slice(1, 3), slice(3, None)):
        assert mine[of].square().mean().sqrt() <= 2 * yardstick[of].square().mean().sqrt() + 1e-6


@pytest.mark.parametrize("recompute", ["none", "block"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_with_backward_outside(dtype, recompute):
    exact = make("sd2", lora=False).float().double()
    stock, unet = pair(copy.deepcopy(exact).float(), recompute=recompute)

    def measured(model, lower):
        given = inputs(dtype=next(model.parameters()).dtype)
        for parameter in model.parameters():
            parameter.grad = None
        with torch.autocast("cpu", lower) if lower else contextlib.nullcontext():
            output = model(**given).sample
        backward(output)
        leaves = [given["sample"], given["encoder_hidden_states"], *model.parameters()]
        return [output.detach(), *(leaf.grad for leaf in leaves)]

    truth, theirs, ours = measured(exact, None), measured(stock, dtype), measured(unet, dtype)
    assert ours[0].dtype == dtype
    assert_as_close(ours, theirs, truth)
    assert_served(unet)


def test_the_graph_keeps_its_forwards_autocast_state():
    """fp64 stays fp64 under autocast, in the forward and in a backward inside or outside of it."""
    stock, unet = pair(make(), recompute="block")
    expected = results(stock)

    def inside(output):
        with torch.autocast("cpu", torch.bfloat16):
            backward(output)

    assert_equal(results(unet, differentiate=inside), expected)


def test_grad_scaler():
    """fp16 autocast, a scaled loss, and the same step as stock takes, to fp16's precision."""
    exact = make(lora=False).float().double()
    models = [copy.deepcopy(exact).float(), rftcore.accelerate(copy.deepcopy(exact).float())]
    found = []
    for model in models:
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
        before = [p.detach().clone() for p in model.parameters()]
        with torch.autocast("cpu", torch.float16):
            loss = model(**inputs(dtype=torch.float32, leaves=())).sample.float().pow(2).mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        assert scaler.get_scale() == 256
        found.append(
            [
                loss.detach(),
                loss.detach(),
                loss.detach(),
                *(a - b for a, b in zip(before, model.parameters(), strict=True)),
            ]
        )
    loss = exact(**inputs(leaves=())).sample.pow(2).mean()
    loss.backward()
    truth = [loss.detach()] * 3 + [p.grad for p in exact.parameters()]
    theirs, ours = found
    assert_as_close([t.detach() for t in ours], [t.detach() for t in theirs], truth)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("kind", ["sd1", "sdxl", "unconditional"])
def test_without_gradients(context, kind):
    stock, unet = pair(make(kind))
    with context():
        mine, theirs = (model(**inputs(kind, leaves=())).sample for model in (unet, stock))
    assert relative_error(mine, theirs) <= BOUND and not mine.requires_grad
    assert mine.is_inference() == theirs.is_inference()
    assert_same(unet, stock, lambda: inputs(kind))
    assert_served(unet)


def call(model, parameters, sample):
    given = inputs(leaves=())
    return torch.func.functional_call(
        model, parameters, (sample, given["timestep"], given["encoder_hidden_states"])
    ).sample


def test_functional_call_with_other_weights():
    stock, unet = pair(make(lora=False))
    own = results(unet)["output"]
    generator = torch.Generator().manual_seed(8)
    others = {
        n: p.detach() + 0.05 * torch.randn(p.shape, generator=generator, dtype=p.dtype)
        for n, p in stock.named_parameters()
    }
    others = {name: tensor.requires_grad_() for name, tensor in others.items()}
    found = []
    for model in (stock, unet):
        output = call(model, others, inputs()["sample"])
        found.append(dict(enumerate([output, *torch.autograd.grad(output, list(others.values()), weights(output))])))
    assert_equal(found[1], found[0])
    assert relative_error(found[1][0], own) > 1e-3
    assert_served(unet)
    assert relative_error(results(unet)["output"], own) <= BOUND


def test_functorch_gradients_run_stock():
    stock, unet = pair(make(lora=False))
    sample = inputs(leaves=())["sample"]
    found = []
    for model in (stock, unet):
        parameters = {name: p.detach() for name, p in model.named_parameters()}

        def loss(parameters, sample, model=model):
            return call(model, parameters, sample).pow(2).mean()

        gradients, of_sample = torch.func.grad(loss, argnums=(0, 1))(parameters, sample)
        found.append({**gradients, "sample": of_sample})
    assert_equal(found[1], found[0])
    assert "functorch" in rftcore.report(unet).stock["mid_block.attentions.0"]
    assert_same(unet, stock)
    assert_served(unet)


def test_vmap_runs_stock():
    stock, unet = pair(make())
    given = inputs(leaves=())
    noise = torch.randn(3, 1, 4, 8, 8, dtype=torch.float64)
    found = []
    for model in (stock, unet):
        with torch.no_grad():
            found.append(
                torch.vmap(lambda x, model=model: model(x, 7, given["encoder_hidden_states"][:1]).sample)(noise)
            )
    assert relative_error(found[1], found[0]) <= BOUND
    one_by_one = torch.stack([stock(x, 7, given["encoder_hidden_states"][:1]).sample for x in noise])
    assert relative_error(found[1], one_by_one) <= BOUND


def test_forward_mode_runs_stock():
    stock, unet = pair(make())
    given = inputs(leaves=())
    tangent = torch.randn_like(given["sample"])
    found = []
    for model in (stock, unet):
        # The kernels of attention have no forward mode; diffusers' plain processor needs none.
        model.set_attn_processor(AttnProcessor())
        _, out = torch.func.jvp(
            lambda x, model=model: model(x, given["timestep"], given["encoder_hidden_states"]).sample,
            (given["sample"],), (tangent,),
        )  # fmt: skip
        found.append(out)
    assert relative_error(found[1], found[0]) <= BOUND


@pytest.mark.parametrize("recompute", ["none", "block"])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_checkpoint_around_it(use_reentrant, recompute):
    stock, unet = pair(make(), recompute=recompute)

    class Checkpointed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.unet = unet

        def forward(self, sample, timestep, encoder_hidden_states, return_dict):
            return (checkpoint(self.inner, sample, timestep, encoder_hidden_states, use_reentrant=use_reentrant),)

        def inner(self, *arguments):
            return self.unet(*arguments).sample

    assert_same(Checkpointed(), stock)
    assert_served(unet)


@pytest.mark.parametrize("context", [lambda: save_on_cpu(), lambda: saved_tensors_hooks(torch.clone, torch.clone)])
@pytest.mark.parametrize("recompute", ["none", "block"])
def test_saved_tensors_hooks(context, recompute):
    stock, unet = pair(make("sdxl"), recompute=recompute)
    expected = results(stock, inputs("sdxl"))
    with context():
        assert_equal(results(unet, inputs("sdxl")), expected)


def test_anomaly_mode():
    stock, unet = pair(make())
    with warnings.catch_warnings(), torch.autograd.detect_anomaly():
        warnings.simplefilter("ignore")
        assert_same(unet, stock)


@pytest.mark.parametrize("recompute", ["none", "qkv", "block"])
def test_a_second_backward(recompute):
    """retain_graph=True: the same gradients both times, added up."""
    stock, unet = pair(make("sd2"), recompute=recompute)
    found = []

    def twice(output):
        output.backward(weights(output), retain_graph=True)
        found.append([p.grad.clone() for p in unet.parameters() if p.requires_grad])
        output.backward(weights(output))

    expected = results(stock, inputs("sd2"))
    second = results(unet, inputs("sd2"), twice)
    halved = {name: t if t is None or name == "output" else t / 2 for name, t in second.items()}
    assert_equal(halved, expected)
    assert_equal(dict(enumerate(found[0])), dict(enumerate(g for g in list(expected.values())[3:] if g is not None)))


def test_a_backward_after_the_graph_is_freed_raises_as_stock():
    for model in pair(make()):
        output = model(**inputs()).sample
        output.sum().backward()
        with pytest.raises(RuntimeError, match="second time"):
            output.sum().backward()


def test_two_losses_of_one_graph():
    stock, unet = pair(make(), recompute="block")

    def two(output):
        first, second = output[:1].pow(2).mean(), output[1:].abs().mean()
        first.backward(retain_graph=True)
        second.backward()

    assert_equal(results(unet, differentiate=two), results(stock, differentiate=two))


def test_two_calls_before_one_backward():
    """Weights are shared by both graphs; guidance and consistency losses do this."""
    stock, unet = pair(make())
    found = []
    for model in (stock, unet):
        given = inputs()
        for parameter in model.parameters():
            parameter.grad = None
        once = model(**given).sample
        twice = model(once, given["timestep"], given["encoder_hidden_states"]).sample
        (twice - 0.3 * once).pow(2).mean().backward()
        leaves = [given["sample"], given["encoder_hidden_states"], *model.parameters()]
        found.append(dict(enumerate(leaf.grad for leaf in leaves if leaf.grad is not None)))
    assert_equal(found[1], found[0])


@pytest.mark.parametrize("recompute", ["none", "block"])
@pytest.mark.parametrize("loss", [torch.sum, lambda output: output.pow(2).mean()], ids=["sum", "square"])
def test_a_second_derivative_raises(loss, recompute):
    stock, unet = pair(make(), recompute=recompute)
    given = inputs()
    (gradient,) = torch.autograd.grad(loss(unet(**given).sample), [given["sample"]], create_graph=True)
    theirs = inputs()
    (expected,) = torch.autograd.grad(loss(stock(**theirs).sample), [theirs["sample"]])
    assert relative_error(gradient, expected) <= BOUND
    with pytest.raises(RuntimeError, match=r"rftcore\.restore\(module\)"):
        gradient.pow(2).sum().backward()


def test_a_second_derivative_of_one_block_by_its_text():
    """Where the block keeps nothing of what is differentiated."""
    _, unet = pair(make(lora=False).requires_grad_(False))
    block = unet.mid_block.attentions[0].transformer_blocks[0]
    text = torch.randn(2, 5, 12, dtype=torch.float64, requires_grad=True)
    output = block(torch.randn(2, 6, 32, dtype=torch.float64), encoder_hidden_states=text)
    (gradient,) = torch.autograd.grad(output.sum(), [text], create_graph=True)
    with pytest.raises(RuntimeError, match=r"rftcore\.restore\(module\)"):
        gradient.pow(2).sum().backward()


def test_a_step_between_forward_and_backward_raises_as_stock():
    for model in pair(make()):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        model(**inputs()).sample.sum().backward()
        output = model(**inputs()).sample
        optimizer.step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            output.sum().backward()


def test_inputs_changed_in_place_after_the_forward():
    """x_t is read by the first GroupNorm's backward only as conv_in's output; the text by the keys' adapters."""
    for model in pair(make()):
        given = inputs(leaves=())
        output = model(**given).sample
        with torch.no_grad():
            given["encoder_hidden_states"].mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            output.sum().backward()


def test_outputs_may_be_changed_in_place():
    stock, unet = pair(make())

    def in_place(output):
        backward(output.mul_(2).add_(1))

    assert_equal(results(unet, differentiate=in_place), results(stock, differentiate=in_place))


def test_training_steps():
    """Ten steps of AdamW leave the same weights."""
    found = []
    for model in pair(randomise_adapters(make()), recompute="ff"):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        for _ in range(10):
            loss = model(**inputs(leaves=())).sample.pow(2).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        found.append({"loss": loss.detach()} | {n: p.detach() for n, p in model.named_parameters() if p.requires_grad})
    assert (
        max(relative_error(mine, expected) for mine, expected in zip(found[1].values(), found[0].values(), strict=True))
        < 1e-9
    )


@pytest.mark.parametrize("tiling", [False, True])
def test_an_autoencoder(tiling):
    """Encoded, decoded, sliced and tiled."""
    vae = randomise_norms(
        AutoencoderKL(
            block_out_channels=(8, 16), down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=4, sample_size=16,
        ).double().eval()
    )  # fmt: skip
    stock, vae = pair(vae)
    for model in (stock, vae):
        model.enable_slicing()
        if tiling:
            model.enable_tiling()
    found = []
    for model in (stock, vae):
        image = torch.linspace(-1, 1, 2 * 3 * 24 * 20, dtype=torch.float64).sin().view(2, 3, 24, 20).requires_grad_()
        latents = model.encode(image).latent_dist.mode()
        output = model.decode(latents).sample
        found.append(
            dict(enumerate([output, *torch.autograd.grad(output, [image, *model.parameters()], weights(output))]))
        )
    assert_equal(found[1], found[0])
    assert_served(vae)

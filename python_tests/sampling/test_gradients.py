"""The sampler's gradients against plain autograd through diffusers' own scheduler."""

import copy
import itertools

import pytest
import stock
import torch

import rftcore

STEPS = 4


def relative_error(ours, truth):
    scale = sum(t.double().pow(2).sum() for t in truth).sqrt()
    return (sum((o - t).double().pow(2).sum() for o, t in zip(ours, truth, strict=True)).sqrt() / scale).item()


def compare(unet, scheduler, given, *, guidance_scale, backprop_steps, eta=None, leaves=None, steps=STEPS, **options):
    """Relative errors of (latents, gradients of the trainable parameters and `leaves`)."""
    parameters = [p for p in unet.parameters() if p.requires_grad]
    leaves = [*parameters, *(leaves or [])]
    batch = next((t.shape[0] for t in given.values() if isinstance(t, torch.Tensor)), 2)
    noise = options.pop("latents", None)
    if noise is None:
        noise = torch.randn(batch, 4, 8, 8, dtype=unet.dtype)
    weight = torch.randn_like(noise)
    truth = stock.sample(
        unet, copy.deepcopy(scheduler), noise, given, steps=steps, guidance_scale=guidance_scale,
        backprop_steps=steps if backprop_steps is None else backprop_steps, eta=eta,
        generator=torch.Generator().manual_seed(7),
    )  # fmt: skip
    truth_grads = torch.autograd.grad((truth * weight).sum(), leaves, allow_unused=True)
    sampler = rftcore.CheckpointedSampler(
        unet, scheduler, num_inference_steps=steps, guidance_scale=guidance_scale, eta=eta,
        backprop_steps=backprop_steps, **options,
    )  # fmt: skip
    trajectory = sampler(**given, latents=noise, generator=torch.Generator().manual_seed(7))
    grads = torch.autograd.grad((trajectory.latents * weight).sum(), leaves, allow_unused=True)
    assert [g is None for g in grads] == [g is None for g in truth_grads]
    reached = [(g, t) for g, t in zip(grads, truth_grads, strict=True) if t is not None]
    assert len(reached) >= len(parameters)
    return relative_error([trajectory.latents], [truth]), relative_error(*zip(*reached, strict=True))


# An unconditional UNet has no guidance: refused, in test_errors.py.
@pytest.mark.covering(1)
@pytest.mark.parametrize(
    ("kind", "guidance_scale"),
    [*itertools.product(["sd1", "sd2", "sdxl"], [1.0, 5.0]), ("unconditional", 1.0)],
)
@pytest.mark.parametrize("backprop_steps", [1, 3, None])
@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_ddim_equals_plain_autograd(
    make_unet, make_scheduler, conditioning, kind, backprop_steps, guidance_scale, eta, prediction_type
):
    unet = make_unet(kind)
    given = conditioning(kind, guided=guidance_scale != 1.0)
    options = {"guidance_scale": guidance_scale, "backprop_steps": backprop_steps, "eta": eta}
    latents, gradients = compare(unet, make_scheduler(prediction_type=prediction_type), given, **options)
    assert latents <= 1e-11
    assert gradients <= 1e-11
    untouched = make_scheduler(prediction_type=prediction_type, fp64=False)
    latents, gradients = compare(unet, untouched, given, **options)
    assert latents <= 1e-5
    assert gradients <= 1e-5


@pytest.mark.covering(1)
@pytest.mark.parametrize("options", [
    {"prediction_type": "sample"},
    {"clip_sample": True, "clip_sample_range": 0.8},
    {"set_alpha_to_one": True, "clip_sample": True},
    {"timestep_spacing": "trailing", "steps_offset": 0},
    {"timestep_spacing": "linspace", "steps_offset": 0},
    {"steps_offset": 0},
    {"beta_schedule": "squaredcos_cap_v2"},
    {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02},
    {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "timestep_spacing": "trailing"},
])  # fmt: skip
@pytest.mark.parametrize("eta", [0.0, 0.6])
def test_ddim_as_configured(make_unet, make_scheduler, conditioning, options, eta):
    latents, gradients = compare(
        make_unet(), make_scheduler(**options), conditioning("sd1"), guidance_scale=3.0, backprop_steps=None, eta=eta
    )
    assert latents <= 1e-11
    assert gradients <= 1e-11


@pytest.mark.covering(1)
@pytest.mark.parametrize("kind", ["sd1", "unconditional"])
@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_small_log", "fixed_large"])
@pytest.mark.parametrize("options", [
    {},
    {"clip_sample": True},
    {"prediction_type": "v_prediction", "steps_offset": 1},
    {"prediction_type": "sample", "timestep_spacing": "trailing"},
])  # fmt: skip
def test_ddpm_equals_plain_autograd(make_unet, make_scheduler, conditioning, kind, variance_type, options):
    guidance = 1.0 if kind == "unconditional" else 2.0
    scheduler = make_scheduler("ddpm", variance_type=variance_type, **options)
    latents, gradients = compare(
        make_unet(kind), scheduler, conditioning(kind), guidance_scale=guidance, backprop_steps=None
    )
    # Where a chain's last step starts above t = 0, diffusers clamps its variance of zero to 1e-20: a noise of 1e-10.
    clamped = variance_type != "fixed_large" and ("steps_offset" in options or "timestep_spacing" in options)
    bound = 1e-9 if clamped else 1e-11
    assert latents <= bound
    assert gradients <= bound


def test_gradient_reaches_noise_and_both_prompts(make_unet, make_scheduler, conditioning):
    given = conditioning("sdxl")
    noise = torch.randn(2, 4, 8, 8, dtype=torch.float64, requires_grad=True)
    leaves = [noise, given["prompt_embeds"], given["negative_prompt_embeds"]]
    leaves += [given["added_cond_kwargs"]["text_embeds"], given["negative_added_cond_kwargs"]["text_embeds"]]
    for leaf in leaves:
        leaf.requires_grad_()
    _, gradients = compare(
        make_unet("sdxl"), make_scheduler(), given, guidance_scale=2.0, backprop_steps=None, eta=1.0, leaves=leaves,
        latents=noise,
    )  # fmt: skip
    assert gradients <= 1e-11


def test_noise_of_a_truncated_chain_gets_no_gradient(make_unet, make_scheduler, conditioning):
    noise = torch.randn(2, 4, 8, 8, dtype=torch.float64, requires_grad=True)
    sampler = rftcore.CheckpointedSampler(make_unet(), make_scheduler(), num_inference_steps=3, backprop_steps=2)
    latents = sampler(conditioning("sd1")["prompt_embeds"], latents=noise).latents
    assert torch.autograd.grad(latents.sum(), noise, allow_unused=True)[0] is None


def test_full_fine_tuning(make_unet, make_scheduler, conditioning):
    unet = make_unet(lora=False)
    _, gradients = compare(
        unet, make_scheduler(), conditioning("sd1"), guidance_scale=2.0, backprop_steps=None, eta=0.0
    )
    assert gradients <= 1e-11


def test_second_backward_through_a_retained_graph(make_unet, make_scheduler, conditioning):
    unet = make_unet()
    parameters = [p for p in unet.parameters() if p.requires_grad]
    sampler = rftcore.CheckpointedSampler(unet, make_scheduler(), num_inference_steps=3, guidance_scale=2.0)
    given = conditioning("sd1")
    latents = sampler(given["prompt_embeds"], given["negative_prompt_embeds"]).latents
    once = torch.autograd.grad(latents.sum(), parameters, retain_graph=True)
    twice = torch.autograd.grad(latents.sum(), parameters)
    assert all(torch.equal(a, b) for a, b in zip(once, twice, strict=True))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(latents.sum(), parameters)


def test_double_backward_is_refused(make_unet, make_scheduler, conditioning):
    unet = make_unet()
    parameters = [p for p in unet.parameters() if p.requires_grad]
    sampler = rftcore.CheckpointedSampler(unet, make_scheduler(), num_inference_steps=2)
    latents = sampler(conditioning("sd1")["prompt_embeds"]).latents
    grads = torch.autograd.grad(latents.pow(2).sum(), parameters, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        sum(g.pow(2).sum() for g in grads).backward()


def test_a_parameter_changed_before_the_backward_is_refused(make_unet, make_scheduler, conditioning):
    unet = make_unet()
    sampler = rftcore.CheckpointedSampler(unet, make_scheduler(), num_inference_steps=2)
    latents = sampler(conditioning("sd1")["prompt_embeds"]).latents
    with torch.no_grad():
        next(p for p in unet.parameters() if p.requires_grad).add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        latents.sum().backward()


def test_tensor_hooks_run_once_on_the_whole_gradient(make_unet, make_scheduler, conditioning):
    unet = make_unet()
    parameter = next(p for p in unet.parameters() if p.requires_grad)
    sampler = rftcore.CheckpointedSampler(unet, make_scheduler(), num_inference_steps=3)
    given, noise = conditioning("sd1")["prompt_embeds"], torch.randn(2, 4, 8, 8, dtype=torch.float64)
    sampler(given, latents=noise).latents.sum().backward()
    plain, parameter.grad = parameter.grad, None
    seen = []
    parameter.register_hook(lambda grad: (seen.append(grad.clone()), grad * 0.5)[1])
    sampler(given, latents=noise).latents.sum().backward()
    assert len(seen) == 1
    torch.testing.assert_close(parameter.grad, plain * 0.5, rtol=1e-12, atol=0)


def test_bf16_is_as_close_as_stock(make_unet, make_scheduler, conditioning):
    truth_unet = make_unet()
    scheduler, given, noise = make_scheduler(), conditioning("sd1"), torch.randn(2, 4, 8, 8, dtype=torch.float64)

    def gradients(unet, dtype, sample):
        moved = {name: tensor.to(dtype) for name, tensor in given.items()}
        latents = sample(unet, moved, noise.to(dtype))
        return torch.autograd.grad(latents.double().sum(), [p for p in unet.parameters() if p.requires_grad])

    def by_stock(unet, given, noise):
        return stock.sample(unet, copy.deepcopy(scheduler), noise, given, steps=3, guidance_scale=2.0,
                            backprop_steps=3, generator=None, eta=0.0)  # fmt: skip

    def by_ours(unet, given, noise):
        sampler = rftcore.CheckpointedSampler(unet, scheduler, num_inference_steps=3, guidance_scale=2.0)
        return sampler(**given, latents=noise).latents

    truth = gradients(truth_unet, torch.float64, by_stock)
    low = copy.deepcopy(truth_unet).to(torch.bfloat16)
    stock_error = relative_error(gradients(low, torch.bfloat16, by_stock), truth)
    our_error = relative_error(gradients(low, torch.bfloat16, by_ours), truth)
    assert our_error <= 2 * stock_error + 1e-6

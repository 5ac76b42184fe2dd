"""What changes between a forward and its backward is brought back, or refused; what has no gradient is refused."""

import copy

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler
from peft import LoraConfig, get_peft_model, inject_adapter_in_model

import rftcore
from rftcore import GradientPath
from rftcore.sampling import Plan, RewardError


@pytest.fixture
def setup(make_unet, make_scheduler, conditioning):
    def make(plan=None, **options):
        unet = make_unet(**options)
        sampler = rftcore.CheckpointedSampler(
            unet, make_scheduler(), num_inference_steps=3, guidance_scale=2.0, eta=1.0, plan=plan
        )
        return unet, sampler, conditioning("sd1")

    return make


def trained(unet):
    return [p for p in unet.parameters() if p.requires_grad]


def gradients(unet, sampler, given, between=lambda: None):
    noise = torch.ones(2, 4, 8, 8, dtype=torch.float64)
    loss = sampler(**given, latents=noise, generator=torch.Generator().manual_seed(0)).latents.sum()
    parameters = trained(unet)
    between()
    return torch.autograd.grad(loss, parameters)


CHANGES = {
    "train": lambda unet: unet.train(),
    "disabled": lambda unet: unet.disable_adapters(),
    "scaled": lambda unet: unet.set_adapters("default", 0.25),
}


@pytest.mark.parametrize("plan", [None, Plan.replayed(["full"] * 3, 2)], ids=["stored", "replayed"])
@pytest.mark.parametrize("change", CHANGES)
def test_modes_and_adapters_are_those_of_the_forward(setup, change, plan):
    unet, sampler, given = setup(plan, dropout=0.5)
    unet.peft_config = {"default": LoraConfig(r=2, lora_alpha=3)}
    unet._hf_peft_config_loaded = True
    expected = gradients(unet, sampler, given)
    parameters = trained(unet)

    def between():
        CHANGES[change](unet)
        for parameter in parameters:  # PEFT's own switch takes it away
            parameter.requires_grad_()

    found = gradients(unet, sampler, given, between)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    if change == "train":
        assert unet.training, "what the caller set stays set"


def test_a_frozen_weight_that_changed_is_refused(setup):
    unet, sampler, given = setup()

    def between():
        with torch.no_grad():
            unet.conv_in.weight.mul_(2)

    with pytest.raises(RuntimeError, match="frozen weight 'conv_in.weight' was written to"):
        gradients(unet, sampler, given, between)


def test_merged_adapters_are_refused(setup):
    unet, sampler, given = setup()
    layers = [m for m in unet.modules() if hasattr(m, "merge") and hasattr(m, "lora_A")]
    with torch.no_grad():
        trajectory = sampler(**given)
    with pytest.raises(RuntimeError, match="merged or unmerged between"):
        gradients(unet, sampler, given, lambda: [layer.merge() for layer in layers])
    with pytest.raises(RuntimeError, match="reached none of the .* trainable parameters"):
        gradients(unet, sampler, given)
    with pytest.raises(RuntimeError, match="reached none of the"):
        sampler.log_prob(trajectory, [1])
    with pytest.raises(RuntimeError, match="reached none of the"):
        torch.autograd.grad(sampler.log_prob(trajectory, [0, 1])[0].sum(), trained(unet))
    with pytest.raises(ValueError, match="merged into the base weights"):
        sampler.log_prob(trajectory, [1], reference="exact")


def test_sampling_under_inference_mode_leaves_the_sampler_usable(setup):
    unet, sampler, given = setup()
    with torch.inference_mode():
        sampler(**given)
    assert all(g.abs().sum() > 0 for g in gradients(unet, sampler, given))


def test_the_table_is_not_the_callers_to_change(setup):
    _, sampler, given = setup()
    with torch.no_grad():
        sampler(**given).timesteps.zero_()
        assert sampler(**given).timesteps.min() > 0


def test_reference_with_other_trained_weights(make_unet, make_scheduler, conditioning):
    given = conditioning("sd1", guided=False)
    x = torch.randn(2, 4, 8, 8, dtype=torch.float64)

    def base_prediction(unet):
        sampler = rftcore.CheckpointedSampler(unet, make_scheduler(), num_inference_steps=2)
        return sampler.predict(x, 5, **given, adapter=False)

    unet = make_unet(lora=False)
    unet.requires_grad_(False)
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["linear_1"], bias="lora_only"), unet)
    with pytest.raises(ValueError, match="linear_1.base_layer.bias' and 0 more .* are not an adapter's"):
        base_prediction(unet)
    unet = make_unet()
    unet.conv_out.requires_grad_(True)
    with pytest.raises(ValueError, match="'conv_out.weight' and 1 more trainable parameters are not an adapter's"):
        base_prediction(unet)


def test_modules_to_save_are_switched_off_too(make_unet, make_scheduler, conditioning):
    base = make_unet(lora=False)
    model = get_peft_model(copy.deepcopy(base), LoraConfig(r=2, target_modules=["to_q"], modules_to_save=["conv_out"]))
    with torch.no_grad():
        for parameter in trained(model):
            parameter.add_(0.3)
    given, x = conditioning("sd1", guided=False), torch.randn(2, 4, 8, 8, dtype=torch.float64)
    sampler = rftcore.CheckpointedSampler(model, make_scheduler(), num_inference_steps=2)
    expected = base(x, 5, given["prompt_embeds"]).sample
    torch.testing.assert_close(sampler.predict(x, 5, **given, adapter=False), expected)
    assert (sampler.predict(x, 5, **given) - expected).abs().max() > 1e-3


@pytest.mark.parametrize("method", ["_get_variance", "step"])
def test_schedulers_with_a_step_of_their_own(make_unet, make_scheduler, method):
    scheduler = make_scheduler()
    setattr(scheduler, method, lambda *args: None)
    with pytest.raises(ValueError, match="is not served"):
        rftcore.CheckpointedSampler(make_unet(), scheduler)
    own = type("Own", (DDIMScheduler,), {method: lambda *args: None})
    with pytest.raises(ValueError, match="scheduler=Own is not served"):
        rftcore.CheckpointedSampler(make_unet(), own())


def test_refused_at_once(make_unet, make_scheduler, conditioning):
    unet, given = make_unet(), conditioning("sd1")
    scale = torch.tensor(0.5, requires_grad=True)
    with pytest.raises(ValueError, match=r"cross_attention_kwargs\['scale'\] requires grad"):
        rftcore.CheckpointedSampler(unet, make_scheduler(), cross_attention_kwargs={"scale": scale})
    with pytest.raises(ValueError, match=r"added_cond_kwargs lacks \['text_embeds', 'time_ids'\]"):
        rftcore.CheckpointedSampler(make_unet("sdxl"), make_scheduler())(given["prompt_embeds"])
    sampler = rftcore.CheckpointedSampler(unet, make_scheduler(), num_inference_steps=3)
    with pytest.raises(ValueError, match="gradient_path must be an rftcore.GradientPath, got list"):
        sampler(given["prompt_embeds"], gradient_path=["full"] * 3)
    with pytest.raises(ValueError, match="gives the timestep 1000, beyond the 1000"):
        rftcore.CheckpointedSampler(unet, make_scheduler(), num_inference_steps=1000)
    with pytest.raises(ValueError, match="holds 0 samples"):
        sampler(given["prompt_embeds"][:0])
    frozen = make_unet()
    frozen.requires_grad_(False)
    prompts = given["prompt_embeds"].requires_grad_()
    with pytest.raises(ValueError, match="nothing that it reaches requires grad"):
        rftcore.CheckpointedSampler(frozen, make_scheduler(), num_inference_steps=2)(
            prompts, gradient_path=GradientPath(("detach_eps",) * 2)
        )


def test_rescoring_with_another_scale_or_dtype_is_refused(setup, make_scheduler):
    unet, sampler, given = setup()
    with torch.no_grad():
        trajectory = sampler(**given)
    options = {"num_inference_steps": 3, "guidance_scale": 2.0, "eta": 1.0}
    halved = rftcore.CheckpointedSampler(unet, make_scheduler(), **options, cross_attention_kwargs={"scale": 0.5})
    with pytest.raises(ValueError, match="cross_attention_kwargs"):
        halved.log_prob(trajectory, [0])
    single = rftcore.CheckpointedSampler(copy.deepcopy(unet).float(), make_scheduler(), **options)
    with pytest.raises(ValueError, match="states are torch.float64 and this UNet's would be torch.float32"):
        single.log_prob(trajectory, [0])


@pytest.fixture
def fp16_vae():
    vae = AutoencoderKL(
        block_out_channels=(8,), latent_channels=4, norm_num_groups=4, sample_size=8, force_upcast=True,
        down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",),
    )  # fmt: skip
    return vae.half().train()


def test_upcast_decoder_with_gradient_checkpointing_is_refused(fp16_vae):
    fp16_vae.enable_gradient_checkpointing()
    with pytest.raises(ValueError, match="disable_gradient_checkpointing"):
        rftcore.decode(fp16_vae, torch.randn(1, 4, 8, 8, requires_grad=True))


def test_large_and_small_rewards_through_an_fp16_decoder(fp16_vae):
    fp16_vae.register_to_config(force_upcast=False)
    for size in (100.0, 1e-6):
        latents = torch.randn(1, 4, 8, 8, requires_grad=True)
        reward = lambda images, *_, size=size: images.float().sum((1, 2, 3)) * size  # noqa: E731
        (grad,) = torch.autograd.grad(rftcore.score(fp16_vae, latents, reward, ["x"], clamp="none").sum(), latents)
        wide = copy.deepcopy(fp16_vae).float()
        (exact,) = torch.autograd.grad(reward(rftcore.decode(wide, latents, clamp="none")).sum(), latents)
        assert (grad - exact).norm() <= 0.05 * exact.norm()
    with pytest.raises(RewardError, match="is NaN or inf"):
        rftcore.score(
            fp16_vae, torch.randn(1, 4, 8, 8, requires_grad=True), lambda i, *_: i.sum((1, 2, 3)) * 1e6, ["x"]
        )


def test_scoring_nothing(fp16_vae):
    with pytest.raises(ValueError, match="holds no images"):
        rftcore.score(fp16_vae, torch.randn(0, 4, 8, 8), lambda i, *_: i.sum((1, 2, 3)), [])

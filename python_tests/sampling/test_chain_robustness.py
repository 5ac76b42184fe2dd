"""What a chain is spared: dropout in parts of a batch, UNets changed half-way, little memory, copies, uneven ranks."""

import copy
import dataclasses
import pickle

import pytest
import torch
import torch.utils.checkpoint
from diffusers import DDIMScheduler
from models import UNETS
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer

import rftcore
from rftcore.sampling import Plan, plans
from rftcore.sampling.captures import Captures

STEPS, BATCH = 3, 3
REPLAYED = Plan.replayed(["full"] * STEPS, BATCH)
PLANS = {
    "stored": dataclasses.replace(REPLAYED, stored=(0,) * STEPS, levels=(None,)),
    "two images at a time": dataclasses.replace(REPLAYED, replay_batch=2),
    "half": dataclasses.replace(REPLAYED, stored=(None, 0, 0), levels=(None,), replay_batch=1),
}


def sampler_of(unet, plan=None, **options):
    scheduler = DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    return rftcore.CheckpointedSampler(
        unet, scheduler, num_inference_steps=STEPS, guidance_scale=2.0, plan=plan, **options
    )


def trained(unet):
    return [p for p in unet.parameters() if p.requires_grad]


def loss_of(sampler, given):
    noise = torch.linspace(-1, 1, BATCH * 256).to(given["prompt_embeds"].dtype).reshape(BATCH, 4, 8, 8)
    return sampler(**given, latents=noise).latents.square().sum()


@pytest.mark.parametrize("dropped", ["adapters", "blocks"])
@pytest.mark.parametrize("accelerated", [False, True], ids=["stock", "accelerated"])
def test_masks_of_dropout_are_those_of_the_whole_batch(accelerated, dropped, conditioning):
    unet = UNETS["sd1"](dropout=0.3 if dropped == "blocks" else 0.0).double().train().requires_grad_(False)
    config = LoraConfig(r=2, lora_dropout=0.5 if dropped == "adapters" else 0.0, target_modules=["to_q", "to_v"])
    inject_adapter_in_model(config, unet)
    for name, parameter in unet.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    if accelerated:
        rftcore.accelerate(unet)
    given, expected = conditioning("sd1", BATCH), None
    for name, plan in {"replayed": REPLAYED, **PLANS}.items():
        torch.manual_seed(7)
        found = torch.autograd.grad(loss_of(sampler_of(unet, plan), given), trained(unet))
        expected = expected or found
        for ours, theirs in zip(found, expected, strict=True):
            assert (ours - theirs).norm() <= 1e-11 * theirs.norm() + 1e-14, name


def without_adapters(unet):
    for layer in unet.modules():
        if isinstance(layer, BaseTunerLayer):
            layer.delete_adapter("default")


def hooked(unet):
    next(m for n, m in unet.named_modules() if n.endswith("attn2.to_k")).register_forward_hook(lambda *_: None)


@pytest.mark.parametrize(("change", "message"), [
    (without_adapters, "and 63 more trainable parameters were taken out"),
    (hooked, "hooks, adapters or gradient checkpointing were put on"),
    (lambda unet: unet.register_forward_pre_hook(lambda *_: None), "hooks, adapters or gradient checkpointing"),
], ids=["adapter deleted", "layer hooked", "model hooked"])  # fmt: skip
@pytest.mark.parametrize("plan", PLANS)
def test_a_unet_changed_before_the_backward_is_refused(plan, change, message, make_unet, conditioning):
    """Some layers' share of the gradient would be missing, or another layer's."""
    unet = rftcore.accelerate(make_unet())
    parameters = trained(unet)
    loss = loss_of(sampler_of(unet, PLANS[plan]), conditioning("sd1", BATCH))
    change(unet)
    with pytest.raises(RuntimeError, match=message):
        loss.backward()
    assert all(parameter.grad is None for parameter in parameters)


def recorder_of(device):
    return device


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))], ids=["copied", "pickled"])
def test_a_copy_of_a_sampler_is_another_one(copied, make_unet, conditioning):
    unet, given = rftcore.accelerate(make_unet()), conditioning("sd1", BATCH)
    sampler = sampler_of(unet)
    sampler._captures = Captures(sampler.denoiser, True, recorder_of)
    expected = torch.autograd.grad(loss_of(sampler, given), trained(unet))
    other = copied(sampler)
    assert other.plan == sampler.plan
    found = torch.autograd.grad(loss_of(other, given), trained(other.denoiser.module))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    # What it captures, it captures on its own UNet's device.
    other.denoiser.module.to("meta")
    assert other._captures._graphs._make_recorder() == torch.device("meta")


def plan_with(monkeypatch, free, unet, given, **options):
    monkeypatch.setattr(plans, "free_memory", lambda *_, **__: free)
    sampler = sampler_of(unet, **options)
    loss_of(sampler, given)
    return sampler.plan


def test_little_free_memory(monkeypatch, make_unet, conditioning):
    unet, given = rftcore.accelerate(make_unet()), conditioning("sd1", BATCH)
    plenty = plan_with(monkeypatch, 16 * 2**30, unet, given)
    assert plenty.extra_percent < 1 and plenty.peak_bytes > 2 * 2**30, "2 GiB are reserved"
    assert plan_with(monkeypatch, 2**30, unet, given).extra_percent < 1, "half of what is free is reserved at most"
    little = plan_with(monkeypatch, 5 * 10**6, unet, given)
    assert little.extra_percent > 1 and little.peak_bytes <= 5 * 10**6
    assert plan_with(monkeypatch, 2**30, unet, given, reserve=0).peak_bytes < 2**26
    with pytest.raises(
        ValueError, match="(?s)memory_budget=None .* 1.00 GiB, of which 3.00 GiB are reserved .* reserve"
    ):
        plan_with(monkeypatch, 2**30, unet, given, reserve="3GiB")
    with pytest.raises(ValueError, match="(?s)free on cpu, 0 B.*a sampling step takes"):
        plan_with(monkeypatch, 0, unet, given)


@pytest.mark.parametrize(("options", "error", "message"), [
    ({"reserve": "much"}, ValueError, "reserve='much'"),
    ({"reserve": -1}, ValueError, "reserve=-1"),
    ({"plan": {"batch": 3}}, TypeError, "plan must be .* got dict"),
])  # fmt: skip
def test_arguments_of_a_plan(options, error, message, make_unet):
    with pytest.raises(error, match=message):
        sampler_of(make_unet(), **options)


CHANGES = {
    "frozen weights of another dtype": lambda unet: [
        setattr(p, "data", p.data.bfloat16()) for p in unet.parameters() if not p.requires_grad
    ],
    "gradient checkpointing": lambda unet: unet.enable_gradient_checkpointing(),
    "a hook": lambda unet: unet.mid_block.register_forward_hook(lambda *_: None),
    "dropout": lambda unet: unet.train(),
    "accelerated anew": lambda unet: rftcore.accelerate(unet, "block"),
    "restored": rftcore.restore,
}  # fmt: skip


@pytest.mark.parametrize(
    "change",
    [pytest.param(change, marks=pytest.mark.slow if place % 3 else []) for place, change in enumerate(CHANGES)],
)
def test_what_decides_about_memory_is_planned_anew(change, make_unet, conditioning):
    unet = rftcore.accelerate(make_unet(dtype=torch.float32, dropout=0.2))
    given, sampler = conditioning("sd1", BATCH, dtype=torch.float32), sampler_of(unet)
    loss_of(sampler, given)
    before = sampler.plan
    loss_of(sampler, given)
    assert sampler.plan is before
    CHANGES[change](unet)
    loss_of(sampler, given)
    assert sampler.plan is not before


def test_only_the_first_plan_waits_for_the_other_ranks(monkeypatch, make_unet, conditioning):
    """A later one may be one rank's alone: the others' batches had that shape before."""
    asked = []

    def free_memory(device, of_all_ranks=True):
        asked.append(of_all_ranks)
        return 2**30 if of_all_ranks else 2**31

    def make_plan(denoiser, conditioning, *, batch, modes, budget, **others):
        return Plan.replayed(modes, batch, budget=budget)

    monkeypatch.setattr(plans, "free_memory", free_memory)
    monkeypatch.setattr(plans, "make_plan", make_plan)
    sampler = sampler_of(make_unet())
    for batch in (2, 3):
        sampler(**conditioning("sd1", batch))
        assert sampler.plan.budget == 2**31
    sampler = sampler_of(make_unet())
    sampler.denoiser.ddp, sampler.denoiser.synchronised = object(), lambda function: function()
    for batch in (2, 3, 2):
        sampler(**conditioning("sd1", batch))
        assert sampler.plan.budget == 2**30
    assert asked == [False, False, True, False]


def rollout(unet, given, batch, **options):
    scheduler = DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    guidance = 2.0 if given else 1.0
    sampler = rftcore.CheckpointedSampler(
        unet, scheduler, num_inference_steps=8, guidance_scale=guidance, eta=1.0, **options
    )
    with torch.no_grad():
        return sampler, sampler(**given, batch_size=batch, generator=torch.Generator().manual_seed(1))


@pytest.mark.covering(1)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "kind", ["sd1", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("sdxl", "unconditional"))]
)
def test_a_step_that_is_scored_again_is_the_sampled_one_bit_for_bit(kind, dtype, make_unet, conditioning):
    """Made once of 8 times, an embedding rounds otherwise than made of one: both ways have to make it of 8."""
    unet = rftcore.accelerate(make_unet(kind, dtype))
    for batch in (1, 3):
        sampler, trajectory = rollout(unet, conditioning(kind, batch, dtype), batch)
        for steps in (torch.arange(8), torch.stack([torch.randperm(8) for _ in range(batch)])):
            log_probs, _ = sampler.log_prob(trajectory, steps)
            assert torch.equal(log_probs, trajectory.log_probs.gather(1, steps.expand(batch, -1)))
    path = rftcore.GradientPath(("full",) * 5, stop=5)
    sampler, trajectory = rollout(unet, conditioning(kind, 2, dtype), 2, gradient_path=path)
    assert torch.equal(sampler.log_prob(trajectory, range(5))[0], trajectory.log_probs)


@pytest.mark.parametrize("steps", [[2], [[0, 7, 3], [4, 4, 1]]], ids=["one", "each sample's own"])
def test_gradients_of_steps_that_are_scored_again(steps, make_unet, conditioning):
    unet, given = make_unet("sdxl"), conditioning("sdxl")
    for name, parameter in unet.named_parameters():
        if "time_emb_proj" in name or "add_embedding" in name:
            parameter.requires_grad_()
    sampler, trajectory = rollout(unet, given, 2)
    found = []
    for accelerated in (False, True):
        if accelerated:
            rftcore.accelerate(unet)
        log_probs, _ = sampler.log_prob(trajectory, torch.tensor(steps))
        weights = torch.linspace(1, 2, log_probs.numel(), dtype=log_probs.dtype).view_as(log_probs)
        found.append(torch.autograd.grad((log_probs * weights).sum(), trained(unet)))
    for ours, theirs in zip(*reversed(found), strict=True):
        assert (ours - theirs).norm() <= 1e-11 * theirs.norm() + 1e-13


def test_a_chain_inside_a_checkpoint_is_planned_without_its_hooks(make_unet, conditioning):
    """They would save the plan's tensors without data, and run the chain again in the middle of planning it."""
    unet, given = rftcore.accelerate(make_unet()), conditioning("sd1", BATCH)
    expected = torch.autograd.grad(loss_of(sampler_of(unet), given), trained(unet))
    noise = torch.linspace(-1, 1, BATCH * 256).double().reshape(BATCH, 4, 8, 8).requires_grad_()
    sampler = sampler_of(unet)
    chain = lambda noise: sampler(**given, latents=noise).latents.square().sum()  # noqa: E731
    torch.utils.checkpoint.checkpoint(chain, noise, use_reentrant=False).backward()
    for parameter, grad in zip(trained(unet), expected, strict=True):
        assert (parameter.grad - grad).norm() <= 1e-11 * grad.norm() + 1e-14

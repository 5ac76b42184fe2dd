"""A chain whose steps are stored, replayed, or replayed in parts: each time plain autograd's gradient."""

import dataclasses

import pytest
import stock
import torch

import rftcore
from rftcore.sampling import GradientPath, Plan

STEPS, BATCH = 4, 3


def plans(levels=("none",)):
    """Every way of keeping steps, by name; `levels` of the stored ones, None for a UNet that is not accelerated."""
    replayed = Plan.replayed(["full"] * STEPS, BATCH)
    first, last = levels[0], len(levels) - 1
    return {
        "stored": dataclasses.replace(replayed, stored=(0,) * STEPS, levels=levels),
        "levels": dataclasses.replace(replayed, stored=(0, last, last, 0), levels=levels),
        "replayed": replayed,
        "an image at a time": dataclasses.replace(replayed, replay_batch=1, replay_level=first),
        "two images at a time": dataclasses.replace(replayed, replay_batch=2, replay_level=first),
        "half": dataclasses.replace(replayed, stored=(None, None, 0, last), levels=levels, replay_batch=2),
    }


def gradients(unet, scheduler, given, noise, plan, **options):
    settings = {"num_inference_steps": STEPS, "guidance_scale": 2.0 if "prompt_embeds" in given else 1.0, **options}
    sampler = rftcore.CheckpointedSampler(unet, scheduler, plan=plan, **settings)
    noise = noise.clone().requires_grad_()
    embeddings = [t for t in given.values() if isinstance(t, torch.Tensor)]
    embeddings += [t for t in given.get("added_cond_kwargs", {}).values() if t.requires_grad]
    parameters = [p for p in unet.parameters() if p.requires_grad]
    trajectory = sampler(**given, latents=noise, generator=torch.Generator().manual_seed(3))
    return trajectory, torch.autograd.grad(
        (trajectory.latents * torch.linspace(-1, 2, noise.numel(), dtype=noise.dtype).view_as(noise)).sum(),
        [noise, *[t for t in embeddings if t.requires_grad], *parameters],
    )


def expected(unet, scheduler, given, noise, **options):
    noise = noise.clone().requires_grad_()
    scale = 2.0 if "prompt_embeds" in given else 1.0
    latents = stock.sample(
        unet, scheduler, noise, given, steps=STEPS, guidance_scale=scale, backprop_steps=STEPS,
        generator=torch.Generator().manual_seed(3), **options,
    )  # fmt: skip
    embeddings = [t for t in given.values() if isinstance(t, torch.Tensor)]
    embeddings += [t for t in given.get("added_cond_kwargs", {}).values() if t.requires_grad]
    parameters = [p for p in unet.parameters() if p.requires_grad]
    weights = torch.linspace(-1, 2, noise.numel(), dtype=noise.dtype).view_as(noise)
    wanted = [noise, *[t for t in embeddings if t.requires_grad], *parameters]
    return latents, torch.autograd.grad((latents * weights).sum(), wanted)


def trained_prompts(given):
    """The same with prompts that are trained, too."""
    for tensor in given.values():
        if isinstance(tensor, torch.Tensor):
            tensor.requires_grad_()
    if "added_cond_kwargs" in given:
        given["added_cond_kwargs"]["text_embeds"].requires_grad_()
    return given


def test_as_many_images_as_channels(make_unet, make_scheduler, conditioning):
    """What belongs to some of the images is told from what belongs to all by their number alone."""
    unet, given = make_unet(), trained_prompts(conditioning("sd1", 4))
    noise, plan = torch.randn(4, 4, 8, 8, dtype=torch.float64), Plan.replayed(["full"] * STEPS, 4)
    _, found = gradients(unet, make_scheduler(), given, noise, dataclasses.replace(plan, replay_batch=2))
    _, wanted = expected(unet, make_scheduler(), given, noise)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-11)


@pytest.mark.covering(1)
@pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl", "unconditional"])
@pytest.mark.parametrize("accelerated", [False, True], ids=["stock", "accelerated"])
def test_every_plan_is_plain_autograd(kind, accelerated, make_unet, make_scheduler, conditioning):
    unet, given = make_unet(kind), trained_prompts(conditioning(kind, BATCH))
    noise = torch.randn(BATCH, 4, 8, 8, dtype=torch.float64)
    latents, wanted = expected(unet, make_scheduler(), given, noise, eta=0.5)
    levels = (None,)
    if accelerated:
        rftcore.accelerate(unet)
        levels = ("none", "qkv", "block")
    for name, plan in plans(levels).items():
        trajectory, found = gradients(unet, make_scheduler(), given, noise, plan, eta=0.5)
        torch.testing.assert_close(trajectory.latents, latents, rtol=1e-11, atol=1e-12, msg=name)
        for ours, theirs in zip(found, wanted, strict=True):
            assert (ours - theirs).norm() <= 1e-11 * theirs.norm() + 1e-14, name


def test_a_second_backward_pass_replays_what_was_stored(make_unet, make_scheduler, conditioning):
    unet, given = make_unet(), conditioning("sd1", BATCH)
    noise = torch.randn(BATCH, 4, 8, 8, dtype=torch.float64)
    sampler = rftcore.CheckpointedSampler(
        unet, make_scheduler(), num_inference_steps=STEPS, guidance_scale=2.0, plan=plans((None,))["half"]
    )
    loss = sampler(**given, latents=noise).latents.square().sum()
    parameters = [p for p in unet.parameters() if p.requires_grad]
    once = torch.autograd.grad(loss, parameters, retain_graph=True)
    again = torch.autograd.grad(loss, parameters)
    for a, b in zip(once, again, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("modes", [("none", "full", "detach_input", "full"), ("detach_eps", "full", "detach_eps", "full"),
                                   pytest.param(("full", "detach_x", "full", "full"), marks=pytest.mark.slow)])  # fmt: skip
def test_paths_are_the_same_in_every_plan(modes, make_unet, make_scheduler, conditioning):
    unet, given = rftcore.accelerate(make_unet()), conditioning("sd1", BATCH)
    noise = torch.randn(BATCH, 4, 8, 8, dtype=torch.float64)
    path = GradientPath(modes)
    parameters = [p for p in unet.parameters() if p.requires_grad]
    results = {}
    for name, plan in plans().items():
        modes = path.effective_modes
        kept = tuple(
            level if mode in ("full", "detach_x", "detach_input") else None
            for level, mode in zip(plan.stored, modes, strict=True)
        )
        sampler = rftcore.CheckpointedSampler(
            unet, make_scheduler(), num_inference_steps=STEPS, guidance_scale=2.0, gradient_path=path,
            plan=dataclasses.replace(plan, stored=kept),
        )  # fmt: skip
        results[name] = torch.autograd.grad(sampler(**given, latents=noise).latents.square().sum(), parameters)
    for name, found in results.items():
        for ours, theirs in zip(found, results["replayed"], strict=True):
            assert (ours - theirs).norm() <= 1e-11 * theirs.norm() + 1e-14, name


def test_a_stored_step_is_not_run_a_second_time(make_unet, make_scheduler, conditioning):
    unet, given = make_unet(), conditioning("sd1", BATCH)
    calls = []
    unet.conv_in.register_forward_hook(lambda *_: calls.append(1))
    for name, again in (("stored", 0), ("half", 2 * 2), ("replayed", STEPS), ("an image at a time", STEPS * BATCH)):
        calls.clear()
        gradients(unet, make_scheduler(), given, torch.randn(BATCH, 4, 8, 8, dtype=torch.float64), plans((None,))[name])
        assert len(calls) == STEPS + again, name


@pytest.fixture
def out_of_memory_at():
    """A function that makes a UNet's n-th call from then on fail as an allocator does."""
    handles = []

    def arm(unet, call):
        calls = []

        def fail(*_):
            calls.append(1)
            if len(calls) == call:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

        handles.append(unet.conv_in.register_forward_pre_hook(fail))

    yield arm
    for handle in handles:
        handle.remove()


def test_out_of_memory_names_the_step_and_the_plan(make_unet, make_scheduler, conditioning, out_of_memory_at):
    unet, given = make_unet(), conditioning("sd1", BATCH)
    options = {"num_inference_steps": STEPS, "guidance_scale": 2.0}
    stored = rftcore.CheckpointedSampler(unet, make_scheduler(), **options)
    stored(**given).latents.sum().backward()
    before = [p.grad.clone() for p in unet.parameters() if p.requires_grad]
    replayed = rftcore.CheckpointedSampler(unet, make_scheduler(), plan=plans((None,))["replayed"], **options)
    loss = replayed(**given).latents.sum()
    out_of_memory_at(unet, 3)
    with pytest.raises(
        torch.OutOfMemoryError, match="(?s)in the backward of step 2 of 4.*4 replayed.*2 images at a time"
    ):
        loss.backward()
    out_of_memory_at(unet, 3)
    plan = plans((None,))["stored"]
    kept = rftcore.CheckpointedSampler(
        unet, make_scheduler(), plan=dataclasses.replace(plan, kept_bytes=(2**20,), peak_bytes=2**23), **options
    )
    with pytest.raises(torch.OutOfMemoryError, match="(?s)in step 3 of 4.*4 stored.*2 stored.*2 replayed"):
        kept(**given)
    for parameter, grad in zip((p for p in unet.parameters() if p.requires_grad), before, strict=True):
        assert torch.equal(parameter.grad, grad)


def test_budgets_and_plans_that_do_not_fit(make_unet, make_scheduler, conditioning):
    unet, given = make_unet(), conditioning("sd1", BATCH)
    options = {"num_inference_steps": STEPS, "guidance_scale": 2.0}
    with pytest.raises(ValueError, match=r"memory_budget=100 KiB is too small.* 3 images: .* takes [\d.]+ MiB"):
        rftcore.CheckpointedSampler(unet, make_scheduler(), memory_budget="100KiB", **options)(**given)
    with pytest.raises(ValueError, match="plan is for 3 images and 4 steps, and this chain has 2 images"):
        sampler = rftcore.CheckpointedSampler(unet, make_scheduler(), plan=plans((None,))["stored"], **options)
        sampler(**conditioning("sd1", 2))
    with pytest.raises(ValueError, match="beside a plan"):
        rftcore.CheckpointedSampler(
            unet, make_scheduler(), plan=plans((None,))["stored"], memory_budget="1GiB", **options
        )


@pytest.mark.slow
def test_a_smaller_budget_keeps_less(make_unet, make_scheduler, conditioning):
    unet, given = rftcore.accelerate(make_unet(dtype=torch.float32)), conditioning("sd1", BATCH, dtype=torch.float32)
    noise, parameters = torch.randn(BATCH, 4, 8, 8), [p for p in unet.parameters() if p.requires_grad]

    def run(memory_budget):
        sampler = rftcore.CheckpointedSampler(
            unet, make_scheduler(), num_inference_steps=STEPS, guidance_scale=2.0, memory_budget=memory_budget
        )
        loss = sampler(**given, latents=noise).latents.square().sum()
        return sampler.plan, torch.autograd.grad(loss, parameters)

    all_kept, expected_gradients = run("1GiB")
    assert all_kept.replays == 0 and all_kept.extra_percent < 1
    for share in (0.6, 0.35):
        plan, found = run(int(share * all_kept.peak_bytes))
        assert plan.extra_percent > all_kept.extra_percent and plan.peak_bytes <= share * all_kept.peak_bytes
        for ours, theirs in zip(found, expected_gradients, strict=True):
            assert (ours - theirs).norm() <= 1e-4 * theirs.norm()


def test_blocks_put_back_before_the_backward_pass_are_noticed(make_unet, make_scheduler, conditioning):
    unet = rftcore.accelerate(make_unet())
    sampler = rftcore.CheckpointedSampler(unet, make_scheduler(), num_inference_steps=STEPS, guidance_scale=2.0)
    loss = sampler(**conditioning("sd1", BATCH)).latents.sum()
    rftcore.restore(unet)
    with pytest.raises(RuntimeError, match="rftcore.restore was called on the UNet between.*call backward"):
        loss.backward()

"""The peak that a plan predicts is that of the chain: counted, and as the process has it."""

import os
import subprocess
import sys

import pytest
import torch
from diffusers import DDIMScheduler
from planned import arguments_of, conditioning_of, planner_of, sampler_of, unet_of

import rftcore
from rftcore import published
from rftcore.counting import PeakBytes
from rftcore.sampling.constants import make_constants
from rftcore.sampling.denoiser import Denoiser
from rftcore.sampling.planner import Planner
from rftcore.sampling.simulation import Simulation


@pytest.mark.parametrize(
    ("kind", "accelerated", "shares"),
    [
        pytest.param("sd1", True, (0, 0.4, 1), marks=pytest.mark.slow),
        pytest.param("sd2", False, (0, 0.5), marks=pytest.mark.slow),
        ("unconditional", True, (0.1, 1)),
        pytest.param("sdxl", True, (0.3,), marks=pytest.mark.slow),
    ],
)
def test_the_predicted_peak_is_the_counted_one(kind, accelerated, shares):
    """A real chain, from the least budget to one that holds everything."""
    unet, batch = unet_of(kind, accelerated), 3
    planner = planner_of(unet, kind, batch)
    least, everything = max(planner.least().values()), planner.plan(2**40).peak_bytes
    plans = [planner.plan(round(least + share * (everything - least))) for share in shares]
    arguments, noise = arguments_of(kind, batch), torch.randn(batch, 4, 8, 8)
    for plan in plans:
        sampler = sampler_of(unet, kind, plan=plan)
        for _ in range(2):  # the first chain makes what later ones find
            unet.zero_grad()
            with PeakBytes() as live:
                sampler(**arguments, latents=noise).latents.sum().backward()
        assert live.peak == pytest.approx(plan.peak_bytes, rel=0.1), str(plan)
    assert len({(plan.extra_percent, plan.replay_batch) for plan in plans}) == len(shares)


@pytest.mark.parametrize("kind", ["sd1", "sdxl", "unconditional"])
def test_what_is_made_once_takes_what_it_is_predicted_to(kind):
    unet, images, steps = unet_of(kind), 2, 3
    denoiser, joined = Denoiser(unet), conditioning_of(kind, 2 * images if kind != "unconditional" else images)
    made = make_constants(denoiser, torch.arange(steps), joined, {})
    simulation = Simulation(denoiser, conditioning_of(kind, 1), 8, 8, guided=kind != "unconditional")
    kept = sum(tensor.nbytes for group in (made.text, made.time) for tensor in group.values())
    assert simulation.constants(images, steps).kept == kept > 0


@pytest.mark.parametrize(
    ("name", "batch", "budgets"),
    [
        pytest.param("sd15", 2, (1.0,), marks=pytest.mark.slow),
        pytest.param("sd15", 2, (4.0,), marks=pytest.mark.slow),
        pytest.param("sdxl", 1, (2.5, 7.0, 25.0), marks=pytest.mark.slow),
    ],
)
def test_the_predicted_peak_is_the_counted_one_of_published_models(name, batch, budgets):
    """The sampler's own chain, on tensors without data; budgets in GiB."""
    unet, mode = published.unet(published.UNETS[name], torch.float32)
    mode.allow_non_fake_inputs = True
    rftcore.accelerate(unet)
    size, conditioning = unet.config.sample_size, published.conditioning(unet, batch)
    planner = Planner(Simulation(Denoiser(unet), conditioning, size, size, guided=True), batch, ["full"] * 3)
    for budget in budgets:
        plan = planner.plan(int(budget * 2**30))
        sampler = rftcore.CheckpointedSampler(
            unet, DDIMScheduler(), num_inference_steps=3, guidance_scale=5.0, plan=plan, capture=False
        )
        with mode:
            given = {key: torch.empty(tensor.shape, dtype=tensor.dtype) for key, tensor in conditioning.items()}
            text, noise = given.pop("prompt_embeds"), torch.empty(batch, 4, size, size)
            with PeakBytes() as live:
                end = sampler(
                    text, text, latents=noise, added_cond_kwargs=given, negative_added_cond_kwargs=given
                ).latents
                torch.autograd.grad(end, [p for p in unet.parameters() if p.requires_grad], torch.empty_like(end))
        assert live.peak <= plan.budget
        assert live.peak == pytest.approx(plan.peak_bytes, rel=0.1), str(plan)


_PROCESS = """
import sys, torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from peft import LoraConfig
import rftcore
from rftcore import resident

torch.set_num_threads(1)
unet = UNet2DConditionModel(
    block_out_channels=(128, 256, 256), cross_attention_dim=768, attention_head_dim=8, norm_num_groups=32,
    down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
).requires_grad_(False)
unet.add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
rftcore.accelerate(unet)
text = torch.randn(1, 77, 768)
sampler = lambda budget: rftcore.CheckpointedSampler(
    unet, DDIMScheduler(), num_inference_steps=3, guidance_scale=5.0, memory_budget=budget
)

# Libraries' own memory is there before.
sampler(2**40)(text, text, latents=torch.randn(1, 4, 16, 16)).latents.sum().backward()
chain = sampler(int(sys.argv[1]))
before = resident.now()
chain(text, text, latents=torch.randn(1, 4, 32, 32)).latents.sum().backward()
print(before, resident.largest(), chain.plan.peak_bytes, chain.plan.replays)
"""


@pytest.mark.slow
@pytest.mark.parametrize("budget", [150, 400, 1200])
def test_the_predicted_peak_is_the_processes(budget):
    """The 37 M UNet on the CPU, budgets in MiB; the allocator is told to give back what is free."""
    done = subprocess.run(
        [sys.executable, "-c", _PROCESS, str(budget * 2**20)],
        capture_output=True,
        text=True,
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"},
    )
    assert done.returncode == 0, done.stderr
    before, after, predicted, _ = map(int, done.stdout.split())
    assert after - before == pytest.approx(predicted, rel=0.2)

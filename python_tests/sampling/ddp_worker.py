"""One rank of test_ddp.py: a plain user loop around an accelerate-prepared UNet; saves its gradients."""

import copy

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from diffusers import DDIMScheduler
from models import UNETS, add_lora
from torch.distributed.fsdp import fully_shard

import rftcore
from rftcore.sampling import Plan

BATCH, STEPS = 4, 3


def problem():
    """(unet, prompts, negatives, noise) of the whole batch, the same on every rank."""
    torch.manual_seed(0)
    unet = add_lora(UNETS["sd1"]().double().eval())
    prompts, negatives = (torch.randn(BATCH, 5, 12, dtype=torch.float64) for _ in range(2))
    return unet, prompts, negatives, torch.randn(BATCH, 4, 8, 8, dtype=torch.float64)


def sampler_for(unet, **options):
    scheduler = DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    return rftcore.CheckpointedSampler(unet, scheduler, num_inference_steps=STEPS, guidance_scale=2.0, **options)


def stored_and_replayed(images):
    """The last step keeps its graph, two evaluate again, an image at a time: known without counting."""
    return Plan(images, stored=(None, None, 0), levels=(None,), replay_level=None, replay_batch=1, differentiated=STEPS)


def draft(unet, part, backward, backprop_steps=None):
    """The whole chain by a given plan, the last steps by one that the ranks make together."""
    _, prompts, negatives, noise = problem()
    plan = stored_and_replayed(part.stop - part.start) if backprop_steps is None else None
    sampler = sampler_for(unet, backprop_steps=backprop_steps, plan=plan)
    latents = sampler(prompts[part], negatives[part], latents=noise[part]).latents
    backward(latents.pow(2).flatten(1).mean(1).mean())


def policy(unet, part, backward, steps):
    """A loss of log-probabilities of trajectories that do not depend on how the batch is divided."""
    _, prompts, negatives, noise = problem()
    sampler = sampler_for(unet, eta=1.0)
    with torch.no_grad():
        trajectory = sampler(prompts, negatives, latents=noise, generator=torch.Generator().manual_seed(4))[part]
    log_prob, divergence = sampler.log_prob(trajectory, steps, reference="exact")
    backward(log_prob.mean() + divergence.mean())


def own_steps(unet, part, backward, single):
    """The same of steps that differ from sample to sample, and so from rank to rank."""
    _, prompts, negatives, noise = problem()
    sampler = sampler_for(unet, eta=1.0)
    with torch.no_grad():
        trajectory = sampler(prompts, negatives, latents=noise, generator=torch.Generator().manual_seed(4))[part]
    steps = torch.tensor([[2, 0], [1, 1], [0, 2], [0, 0]])[part]
    if single:
        log_prob, divergence = sampler.transition_log_prob(trajectory.transitions(steps), reference="exact")
    else:
        log_prob, divergence = sampler.log_prob(trajectory, steps, reference="exact")
    backward(log_prob.mean() + divergence.mean())


def gradients(unet):
    found = {name.removeprefix("module."): p.grad.clone() for name, p in unet.named_parameters() if p.grad is not None}
    unet.zero_grad()
    return found


def refusal_of_a_sharded_unet():
    try:
        sampler_for(fully_shard(problem()[0]))
    except TypeError as error:
        return str(error)


def main(folder, rank, *find_unused):
    """Once for each value, True or False, of DDP's `find_unused_parameters`."""
    results = {}
    for unused in (value == "True" for value in find_unused):
        accelerator = Accelerator(
            cpu=True, kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=unused)]
        )
        unet = accelerator.prepare(problem()[0])
        count = BATCH // accelerator.num_processes
        part = slice(accelerator.process_index * count, (accelerator.process_index + 1) * count)
        first, second = (slice(part.start + i * count // 2, part.start + (i + 1) * count // 2) for i in (0, 1))
        draft(unet, part, accelerator.backward)
        results[f"chain, unused={unused}"] = gradients(unet)
        draft(unet, part, accelerator.backward, backprop_steps=1)
        results[f"last step, unused={unused}"] = gradients(unet)
        for steps in ([1], [0, 2]):
            policy(unet, part, accelerator.backward, steps)
            results[f"log_prob {steps}, unused={unused}"] = gradients(unet)
        for single in (False, True):
            own_steps(unet, part, accelerator.backward, single)
            results[f"own steps, transitions={single}, unused={unused}"] = gradients(unet)
        with accelerator.no_sync(unet):
            draft(unet, first, lambda loss: accelerator.backward(loss / 2))
        if accelerator.num_processes > 1:
            results[f"not synchronised, unused={unused}"] = copy.deepcopy(
                {name: p.grad for name, p in unet.named_parameters() if p.grad is not None}
            )
        draft(unet, second, lambda loss: accelerator.backward(loss / 2))
        results[f"accumulated, unused={unused}"] = gradients(unet)
    if accelerator.num_processes > 1:
        results["sharded"] = refusal_of_a_sharded_unet()
    torch.save(results, folder / f"{rank}.pt")

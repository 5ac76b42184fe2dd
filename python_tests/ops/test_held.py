"""What is made of adapters, held for the length of a block."""

import sys

import torch
from diffusers import DDIMScheduler
from models import text_unet
from peft import LoraConfig

import rftcore
from rftcore.ops.held import held, made_of
from rftcore.sampling import Plan


def test_made_once_inside_and_each_time_outside():
    a, b = torch.randn(2, 3), torch.randn(4, 3)
    calls = []

    def join():
        calls.append(1)
        return torch.cat([a, b])

    made_of([a, b], "joined", join)
    made_of([a, b], "joined", join)
    assert len(calls) == 2
    with held():
        first = made_of([a, b], "joined", join)
        assert made_of([a.view_as(a), b], "joined", join) is first
        assert made_of([b, a], "joined", join) is not first
        assert made_of([a, b], torch.float64, lambda: join().double()).dtype == torch.float64
    assert len(calls) == 5
    with held():
        assert made_of([a, b], "joined", join) is not first


def test_a_freed_tensor_is_not_taken_for_another():
    with held():
        results = [made_of([t], None, lambda t=t: t + 1) for t in (torch.full((64,), float(i)) for i in range(32))]
    assert [int(t[0]) for t in results] == list(range(1, 33))


def test_a_chain_joins_each_layers_adapters_once_a_pass(monkeypatch):
    unet = text_unet().requires_grad_(False)
    unet.add_adapter(LoraConfig(r=7, target_modules=["to_q", "to_k", "to_v"], init_lora_weights=False))
    rftcore.accelerate(unet, backend="torch")  # the one that joins them
    prompts = torch.randn(2, 1, 5, 12)

    # The package has a function of the module's name.
    module = sys.modules["rftcore.ops.lora_linear"]
    joined, calls = module._joined, []
    monkeypatch.setattr(module, "_joined", lambda *args: calls.append(1) or joined(*args))

    def count(steps):
        calls.clear()
        sampler = rftcore.CheckpointedSampler(
            unet, DDIMScheduler(), num_inference_steps=steps, guidance_scale=2.0,
            plan=Plan.replayed(["full"] * steps, 1),
        )  # fmt: skip
        sampler(*prompts).latents.sum().backward()
        return len(calls)

    assert 0 < count(1) == count(4)

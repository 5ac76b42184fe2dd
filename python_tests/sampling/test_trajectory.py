"""Slicing, joining, moving and storing trajectories."""

import numpy
import pytest
import torch

import rftcore
from rftcore import Trajectory


@pytest.fixture
def rollout(make_unet, make_scheduler, conditioning):
    unet = make_unet("sdxl", torch.float32)

    def make(batch=4, steps=3, **options):
        sampler = rftcore.CheckpointedSampler(
            unet, make_scheduler(fp64=False), num_inference_steps=steps, guidance_scale=2.0, eta=1.0
        )
        return sampler, sampler(**conditioning("sdxl", batch, torch.float32), **options)

    return make


def tensors(trajectory):
    return [trajectory.latents, trajectory.states, trajectory.log_probs, *trajectory.conditioning.tensors()]


def test_shapes(rollout):
    _, trajectory = rollout(batch=2)
    assert len(trajectory) == 2
    assert trajectory.latents.shape == (2, 4, 8, 8)
    assert trajectory.states.shape == (4, 2, 4, 8, 8)
    assert trajectory.timesteps.shape == trajectory.stochastic.shape == (3,)
    assert trajectory.log_probs.shape == (2, 3)
    assert torch.equal(trajectory.states[-1], trajectory.latents)
    assert not trajectory.states.requires_grad and not trajectory.log_probs.requires_grad


def test_parts_join_to_the_whole(rollout):
    sampler, whole = rollout()
    joined = Trajectory.cat([whole[0], whole[1:3], whole[torch.tensor([3])]])
    assert all(torch.equal(a, b) for a, b in zip(tensors(joined), tensors(whole), strict=True))
    picked = whole[[2, 0]]
    assert torch.equal(picked.states[:, 1], whole.states[:, 0])
    mask = torch.tensor([True, False, True, False])
    assert torch.equal(whole[mask].log_probs, whole.log_probs[[0, 2]])
    with torch.no_grad():
        scored, _ = sampler.log_prob(joined, [0, 2])
    assert torch.equal(scored, whole.log_probs[:, [0, 2]])


def test_indices_and_joins_that_do_not_fit(rollout):
    _, three = rollout()
    _, four = rollout(steps=4)
    with pytest.raises(IndexError, match="index 4 is out of range for a trajectory of 4"):
        three[4]
    with pytest.raises(ValueError, match="different settings do not join: num_inference_steps 3 and 4"):
        Trajectory.cat([three, four])
    with pytest.raises(ValueError, match="parts is empty"):
        Trajectory.cat([])


def test_detach_and_to(rollout):
    _, trajectory = rollout()
    assert trajectory.latents.requires_grad and not trajectory.detach().latents.requires_grad
    moved = trajectory.to("meta")
    assert {t.device.type for t in [*tensors(moved), moved.timesteps, moved.stochastic]} == {"meta"}
    for bad in (lambda: trajectory.to(torch.bfloat16), lambda: trajectory.to("cpu", torch.float16)):
        with pytest.raises(ValueError, match="keeps its dtypes"):
            bad()


def test_stored_and_loaded(rollout, tmp_path):
    sampler, trajectory = rollout()
    torch.save(trajectory.state_dict(), tmp_path / "trajectory.pt")
    loaded = Trajectory.from_state_dict(torch.load(tmp_path / "trajectory.pt", weights_only=True))
    assert all(torch.equal(a, b) for a, b in zip(tensors(loaded), tensors(trajectory), strict=True))
    assert loaded.settings == trajectory.settings
    with torch.no_grad():
        assert torch.equal(sampler.log_prob(loaded, [1])[0][:, 0], trajectory.log_probs[:, 1])
    with pytest.raises(ValueError, match="not a Trajectory.state_dict"):
        Trajectory.from_state_dict({"latents": loaded.latents})


def test_seeded_generators(rollout):
    _, one = rollout(generator=torch.Generator().manual_seed(3), batch=2)
    _, same = rollout(generator=torch.Generator().manual_seed(3), batch=2)
    assert torch.equal(one.states[0], same.states[0])
    generators = [torch.Generator().manual_seed(i) for i in (1, 2)]
    _, each = rollout(generator=generators, batch=2)
    _, second = rollout(generator=[torch.Generator().manual_seed(2)], batch=1)
    assert torch.equal(each.states[0, 1], second.states[0, 0])


def test_size_of_the_latents(rollout):
    _, trajectory = rollout(sample_size=(4, 12), batch=1)
    assert trajectory.latents.shape == (1, 4, 4, 12)


def test_integers_of_every_kind_keep_the_batch(rollout):
    _, trajectory = rollout()
    for index in (1, torch.tensor(1), numpy.int64(1)):
        assert trajectory[index].latents.shape == (1, 4, 8, 8)

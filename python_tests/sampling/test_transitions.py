"""Single steps of any samples: scored like the batch they came from, and kept like trajectories."""

import pytest
import torch

import rftcore
from rftcore.sampling import GradientPath, Transitions

STEPS, BATCH = 4, 3


@pytest.fixture
def rollout(make_unet, make_scheduler, conditioning):
    def make(kind="sd1", dtype=torch.float64, accelerated=False, eta=1.0, gradient_path=None, **options):
        unet = make_unet(kind, dtype)
        if accelerated:
            rftcore.accelerate(unet)
        guidance = 1.0 if kind == "unconditional" else 3.0
        sampler = rftcore.CheckpointedSampler(
            unet, make_scheduler(**options), num_inference_steps=STEPS, guidance_scale=guidance, eta=eta
        )
        with torch.no_grad():
            trajectory = sampler(**conditioning(kind, BATCH, dtype), batch_size=BATCH, gradient_path=gradient_path)
        return unet, sampler, trajectory

    return make


def tensors(transitions):
    named = (transitions.x, transitions.next_x, transitions.steps, transitions.log_probs)
    return [*named, *transitions.conditioning.tensors()]


def assert_equal(one, other):
    assert one.settings == other.settings
    assert all(torch.equal(a, b) for a, b in zip(tensors(one), tensors(other), strict=True))


@pytest.mark.covering(1)
@pytest.mark.parametrize("accelerated", [False, True], ids=["stock", "accelerated"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["sd1", "sdxl", "unconditional"])
def test_of_a_whole_batch_they_are_log_probs_numbers_bit_for_bit(kind, dtype, accelerated, rollout):
    unet, sampler, trajectory = rollout(kind, dtype, accelerated)
    parameters = [p for p in unet.parameters() if p.requires_grad]
    steps = torch.tensor([[2], [0], [3]])
    transitions = trajectory.transitions(steps)
    log_prob, divergence = sampler.transition_log_prob(transitions)
    assert divergence is None and torch.equal(log_prob, trajectory.log_probs.gather(1, steps)[:, 0])
    assert torch.equal(transitions.log_probs, log_prob)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(torch.randn_like(parameter) * 0.1)
    for reference in (None, "exact", "uniform"):
        ours = sampler.transition_log_prob(transitions, reference)
        theirs = sampler.log_prob(trajectory, steps, reference)
        found = []
        for scores in (ours, [None if score is None else score[:, 0] for score in theirs]):
            loss = sum((torch.arange(1, 4) * score).sum() for score in scores if score is not None)
            found.append([*scores, *torch.autograd.grad(loss, parameters)])
        assert all(a is b is None or torch.equal(a, b) for a, b in zip(*found, strict=True)), reference


def test_any_steps_of_any_samples_in_one_evaluation(rollout):
    unet, sampler, trajectory = rollout()
    calls = []
    unet.register_forward_pre_hook(lambda _, inputs: calls.append(len(inputs[0])))
    steps = torch.tensor([[3, 0], [1, 2]])
    transitions = trajectory.transitions(steps, rows=[2, 0])
    assert len(transitions) == 4 and transitions.steps.tolist() == [3, 0, 1, 2]
    for place, (row, step) in enumerate([(2, 3), (2, 0), (0, 1), (0, 2)]):
        assert torch.equal(transitions.x[place], trajectory.states[step, row])
        assert torch.equal(transitions.next_x[place], trajectory.states[step + 1, row])
        assert transitions.log_probs[place] == trajectory.log_probs[row, step]
        for mine, whole in zip(transitions.conditioning.tensors(), trajectory.conditioning.tensors(), strict=True):
            assert torch.equal(mine[place], whole[row])
    log_prob, _ = sampler.transition_log_prob(transitions)
    assert calls == [2 * 4]
    torch.testing.assert_close(log_prob, transitions.log_probs, rtol=1e-12, atol=1e-12)
    assert_equal(trajectory.transitions([1, 3]), trajectory.transitions([[1, 3]] * BATCH))
    # What a replay buffer holds is no part of a whole trajectory.
    assert transitions.x.untyped_storage().nbytes() == transitions.x.nbytes


def test_indexed_joined_moved_and_stored(rollout, tmp_path):
    _, sampler, trajectory = rollout("sdxl")
    whole = trajectory.transitions(range(STEPS))
    assert_equal(Transitions.cat([whole[0], whole[1:5], whole[torch.arange(5, len(whole))]]), whole)
    assert whole[[7, 2]].steps.tolist() == [3, 2]
    mask = torch.arange(len(whole)) % 5 == 0
    assert_equal(whole[mask], whole[[0, 5, 10]])
    moved = whole.to("meta")
    assert {tensor.device.type for tensor in tensors(moved)} == {"meta", "cpu"} and moved.steps.device.type == "cpu"
    torch.save(whole[3:7].state_dict(), tmp_path / "transitions.pt")
    loaded = Transitions.from_state_dict(torch.load(tmp_path / "transitions.pt", weights_only=True))
    assert_equal(loaded, whole[3:7])
    assert (tmp_path / "transitions.pt").stat().st_size < sum(tensor.nbytes for tensor in tensors(whole))
    sampler.transition_log_prob(loaded)
    with pytest.raises(ValueError, match="a transition keeps its dtypes"):
        whole.to(torch.bfloat16)
    with pytest.raises(ValueError, match="not a Transitions.state_dict"):
        Transitions.from_state_dict({"x": whole.x})
    with pytest.raises(IndexError, match="index 12 is out of range for 12 transitions"):
        whole[12]
    with pytest.raises(ValueError, match="parts is empty"):
        Transitions.cat([])


def test_what_cannot_be_scored(rollout):
    unet, sampler, trajectory = rollout()
    _, other, guided_otherwise = rollout("unconditional")
    with pytest.raises(
        ValueError, match="transitions were made with other settings than this sampler's: guidance_scal"
    ):
        other.transition_log_prob(trajectory.transitions([1]))
    with pytest.raises(ValueError, match="transitions of different settings do not join: guidance_scale 3.0 and 1.0"):
        Transitions.cat([trajectory.transitions([1]), guided_otherwise.transitions([1])])
    with pytest.raises(ValueError, match="reference='kl'"):
        sampler.transition_log_prob(trajectory.transitions([1]), reference="kl")
    with pytest.raises(ValueError, match="transitions is empty"):
        sampler.transition_log_prob(trajectory.transitions([1])[:0])
    with pytest.raises(ValueError, match=r"transitions on meta and the UNet on cpu: call .to"):
        sampler.transition_log_prob(trajectory.transitions([1]).to("meta"))
    with torch.inference_mode():
        inferred = trajectory.transitions([1])
    with pytest.raises(ValueError, match="transitions was sampled under torch.inference_mode"):
        sampler.transition_log_prob(inferred)
    for parameter in unet.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(ValueError, match="nothing that it reaches requires grad"):
        sampler.transition_log_prob(trajectory.transitions([1]))
    with torch.no_grad():
        sampler.transition_log_prob(trajectory.transitions([1]))


@pytest.mark.parametrize(("arguments", "error", "message"), [
    (([4],), IndexError, "steps holds 4; the trajectory has steps 0 to 3"),
    (([-1],), IndexError, "steps holds -1"),
    (([],), ValueError, "steps is empty"),
    (([0.5],), ValueError, "whole numbers"),
    (([[0], [1]],), ValueError, "2 rows for 3 samples"),
    (([[0], [1]], [2]), ValueError, "2 rows for 1 samples"),
    (([0], [3]), IndexError, "rows holds 3; the trajectory has samples 0 to 2"),
    (([0], [[0]]), ValueError, r"rows must be whole numbers \(R,\)"),
    (([0], []), ValueError, "rows is empty"),
])  # fmt: skip
def test_bad_steps_and_rows(arguments, error, message, rollout):
    with pytest.raises(error, match=message):
        rollout()[2].transitions(*arguments)


def test_deterministic_steps_are_named(rollout):
    _, sampler, trajectory = rollout(set_alpha_to_one=True, steps_offset=0)
    with pytest.raises(ValueError, match=r"steps holds 3, which is deterministic.*steps with noise are 0-2"):
        sampler.transition_log_prob(trajectory.transitions([0, 3]))
    _, sampler, trajectory = rollout(eta=0.0)
    with pytest.raises(ValueError, match="steps holds 1, which is deterministic .* sample with eta > 0"):
        sampler.transition_log_prob(trajectory.transitions([1]))
    _, sampler, trajectory = rollout(gradient_path=GradientPath(("full",) * 3, stop=3, output="x0"))
    with pytest.raises(ValueError, match=r"steps holds 2, which is deterministic.*steps with noise are 0-1"):
        sampler.transition_log_prob(trajectory.transitions([2]))
    log_prob, _ = sampler.transition_log_prob(trajectory.transitions([1]))
    torch.testing.assert_close(log_prob, trajectory.log_probs[:, 1], rtol=1e-12, atol=1e-12)

"""Plans, trajectories and transitions of a file that this package did not write: a ValueError that names what is wrong."""

import json

import pytest
import torch

from rftcore.sampling.conditioning import Conditioning
from rftcore.sampling.plan import Plan
from rftcore.sampling.trajectory import Trajectory
from rftcore.sampling.transitions import Transitions

PLAN = Plan(
    2, (None, 0, 1), ({"a": ("b",)}, "block"), {}, 2, 3,
    budget=2**30, peak_bytes=2**20, kept_bytes=(8, 4), level_extra=(0.0, 50.0), forward_flops=10, plain_flops=30,
)  # fmt: skip
GUIDED = Conditioning({"prompt_embeds": torch.ones(2, 3, 4)}, {"prompt_embeds": torch.zeros(2, 3, 4)})
ROWS, CHAIN = torch.ones(2, 1, 2, 2), torch.ones(4, 2, 1, 2, 2)
TRANSITIONS = Transitions(ROWS, ROWS, torch.tensor([0, 1]), torch.ones(2), GUIDED, {"steps": 3})
TRAJECTORY = Trajectory(
    latents=ROWS, states=CHAIN, timesteps=torch.arange(3), log_probs=torch.ones(2, 3), stochastic=torch.ones(3).bool(),
    conditioning=GUIDED, settings={"steps": 3},
)  # fmt: skip


@pytest.mark.parametrize(
    "wrong",
    [
        {"batch": 2.5, "replay_batch": 2},
        {"batch": None},
        {"stored": [None, 0.0, 1]},
        {"stored": 3},
        {"stored": ["x", 0, 1]},
        {"levels": [{"a": 3}, "block"]},
        {"levels": [{"a": [1]}, "block"]},
        {"levels": [{"a": ["b"]}, 3]},
        {"kept_bytes": [8]},
        {"kept_bytes": "x"},
        {"level_extra": [0.0, float("nan")]},
        {"peak_bytes": "x"},
        {"budget": -1},
        {"reasons": [3]},
        {"reasons": {"a": [float("nan")]}},
        {"differentiated": 1},
        {"differentiated": 9},
        {"replay_extra": None},
        {"replay_extra": 10**400},
        {"replay_level": 3},
        {"forward_flops": 10**400},
        {"x": 1},
    ],
)
def test_plans_of_others(wrong):
    with pytest.raises(ValueError):
        Plan.from_dict(PLAN.to_dict() | wrong)


def test_a_plan_reads_back_and_says_what_it_is():
    again = Plan.from_dict(json.loads(json.dumps(PLAN.to_dict())))
    assert again == PLAN and hash(again.work) == hash(PLAN.work) and str(again) == str(PLAN)
    # One that was made by hand predicts nothing.
    bare = Plan(1, (0,), ("block",), None, 1, 1, plain_flops=1)
    assert Plan.from_dict(bare.to_dict()) == bare and bare.flops == 1 and "1 of 1 steps" in str(bare)


@pytest.mark.parametrize("record", [TRANSITIONS, TRAJECTORY], ids=["transitions", "trajectory"])
@pytest.mark.parametrize(
    "other", [None, 3, "x", [1.0], torch.tensor(1), torch.ones(9), torch.ones(2, 2).to_sparse(), {"a": 1}]
)
def test_records_of_others(record, other):
    state = record.state_dict()
    for name in state:
        if (name == "negative" and other is None) or (name == "settings" and isinstance(other, dict)):
            continue
        with pytest.raises(ValueError, match=f"state is not a {type(record).__name__}.state_dict"):
            type(record).from_state_dict(state | {name: other})
        with pytest.raises(ValueError, match="state is not a"):
            type(record).from_state_dict({key: value for key, value in state.items() if key != name})
    with pytest.raises(ValueError, match="state is not a"):
        type(record).from_state_dict(other)


@pytest.mark.parametrize("record", [TRANSITIONS, TRAJECTORY], ids=["transitions", "trajectory"])
def test_settings_that_cannot_be_compared(record):
    deep = []
    for _ in range(100_000):
        deep = [deep]
    for wrong in (torch.ones(2), [torch.ones(2)], float("nan"), deep):
        with pytest.raises(ValueError, match="settings are no plain values"):
            type(record).from_state_dict(record.state_dict() | {"settings": {"steps": wrong}})


@pytest.mark.parametrize("record", [TRANSITIONS, TRAJECTORY], ids=["transitions", "trajectory"])
def test_a_record_without_guidance_reads_back(record):
    state = record.state_dict() | {"negative": None}
    assert type(record).from_state_dict(state).conditioning.negative is None
    assert len(type(record).from_state_dict(state)) == 2

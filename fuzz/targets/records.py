"""Plans, trajectories, transitions, tables of winners and sizes in bytes, read back from what was stored."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from atheris import FuzzedDataProvider

from fuzz import drawn
from fuzz.guard import demand, tried
from rftcore.blocks.budget import bytes_of, text_of
from rftcore.ops import measured
from rftcore.sampling.conditioning import Conditioning
from rftcore.sampling.plan import Plan
from rftcore.sampling.trajectory import Trajectory
from rftcore.sampling.transitions import Transitions

_ERRORS = (ValueError,)
_PLAN = Plan(
    2, (None, 0, 1), ({"a": ("b",)}, "block"), {}, 2, 3,
    budget=2**30, peak_bytes=2**20, kept_bytes=(8, 4), level_extra=(0.0, 50.0), forward_flops=10, plain_flops=30,
).to_dict()  # fmt: skip
_TABLE = {"winners": {"geglu": {"1024x64 fp16": {"backend": "triton", "config": {"geglu": {"block": 64}}}}}}
_GUIDED = Conditioning({"prompt_embeds": torch.ones(2, 3, 4)}, {"prompt_embeds": torch.zeros(2, 3, 4)})
_TRANSITIONS = Transitions(
    torch.ones(2, 1, 2, 2), torch.ones(2, 1, 2, 2), torch.tensor([0, 1]), torch.ones(2), _GUIDED, {"steps": 2}
)
_TRAJECTORY = Trajectory(
    latents=torch.ones(2, 1, 2, 2), states=torch.ones(3, 2, 1, 2, 2), log_probs=torch.ones(2, 2),
    timesteps=torch.tensor([1, 0]), stochastic=torch.tensor([True, True]), conditioning=_GUIDED, settings={"steps": 2},
)  # fmt: skip
_TENSORS = (
    torch.ones(2), torch.ones(0), torch.tensor(1), torch.ones(2, 1, 2, 2), torch.ones(3, 2, 1, 2, 2),
    torch.ones(2, dtype=torch.int8), torch.tensor([-1, 7]), torch.ones(2, 3, 4).to_sparse(), torch.ones(3, 3, 4),
)  # fmt: skip


def check(data: bytes, folder: Path) -> None:
    source = FuzzedDataProvider(data[1:])
    form = (data[0] if data else 0) % 6
    if form == 0:
        _use_plan(tried(_ERRORS, Plan.from_dict, drawn.mutated(source, _PLAN)))
    elif form == 1:
        (folder / "sm_90.json").write_text(drawn.dumped(drawn.mutated(source, _TABLE)), errors="replace")
        for rows in tried(_ERRORS, measured.read, folder / "sm_90.json").values():
            for won in rows.values():
                measured.tile_sizes("geglu", won)
    elif form == 2:
        (folder / "sm_90.json").write_bytes(data[1:])
        tried(_ERRORS, measured.read, folder / "sm_90.json")
    elif form == 3:
        count = tried(_ERRORS, bytes_of, drawn.value(source, 1))
        demand(isinstance(count, int) and count > 0 and text_of(count), "no bytes")
    elif form == 4:
        found = tried(_ERRORS, Transitions.from_state_dict, _other(source, _TRANSITIONS.state_dict()))
        demand(len(found[0]) == 1 and len(Transitions.cat([found, found])) == 2 * len(found), "another number of rows")
        _same(Transitions.from_state_dict(found.state_dict()), found)
    else:
        found = tried(_ERRORS, Trajectory.from_state_dict, _other(source, _TRAJECTORY.state_dict()))
        demand(len(found[0]) == 1 and len(Trajectory.cat([found, found])) == 2 * len(found), "another number of rows")
        found.transitions([0])
        _same(Trajectory.from_state_dict(found.state_dict()), found)


def _use_plan(plan: Plan) -> None:
    text = json.dumps(plan.to_dict())
    demand(Plan.from_dict(json.loads(text)) == plan, "the plan does not read back")
    demand(bool(str(plan)) and isinstance(plan.flops, int), "the plan says nothing")
    hash(plan.work)
    tries = 0
    while plan is not None and tries < 200:
        plan, tries = plan.smaller(), tries + 1
    demand(tries < 200, "the plan never gets small")


def _other(source: FuzzedDataProvider, state: dict) -> object:
    for _ in range(source.ConsumeIntInRange(1, 2)):
        name = drawn.one_of(source, sorted(state))
        kind = source.ConsumeIntInRange(0, 5)
        if kind == 0:
            del state[name]
        elif kind == 1:
            state[name] = drawn.value(source, 2)
        elif kind == 2:
            state[drawn.text(source)] = drawn.value(source, 1)
        elif kind == 3 and isinstance(state[name], dict):
            state[name] = {drawn.text(source): drawn.one_of(source, _TENSORS)}
        else:
            state[name] = drawn.one_of(source, _TENSORS)
    return state if source.ConsumeIntInRange(0, 20) else drawn.value(source)


def _same(again, found) -> None:
    demand(again.settings == found.settings, "settings do not read back")
    for one, other in zip(again.conditioning.tensors(), found.conditioning.tensors(), strict=True):
        demand(torch.equal(one, other), "the conditioning does not read back")


def seeds() -> list[bytes]:
    drawn_ = [bytes([form % 6]) + bytes((23 * k * form + form + k) % 256 for k in range(60)) for form in range(1, 150)]
    return [*drawn_, b"\x02" + json.dumps(_TABLE).encode(), b"\x02" + b"[" * 3000, b"\x02{}"]

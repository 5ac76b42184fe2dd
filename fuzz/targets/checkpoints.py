"""A run's folder that was damaged or written by others: checkpoints, config, metrics, memory."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import tempfile
from pathlib import Path

import torch
from atheris import FuzzedDataProvider
from safetensors.torch import save
from torch import nn

from fuzz import drawn
from fuzz.guard import Refused, demand, tried
from rftcore.algorithms.advantages import PromptStatistics
from rftcore.errors import RunError, UsageError
from rftcore.sampling.plan import Plan
from rftcore.training import checkpoint, memory_plan
from rftcore.training.algorithm_configs import DraftConfig
from rftcore.training.ema import Ema
from rftcore.training.evaluation import reference
from rftcore.training.parsing import to_yaml
from rftcore.training.run_directory import CONFIG, METRICS, RunDirectory
from rftcore.training.transition_buffer import TransitionBuffer

_ERRORS = (UsageError, RunError)


class _Method:
    """The states that the algorithms have: statistics of prompts, and a buffer of transitions."""

    def __init__(self) -> None:
        self.statistics, self.buffer = PromptStatistics(4, 2), TransitionBuffer(8)

    def state_dict(self):
        return {"statistics": self.statistics.state_dict(), "buffer": self.buffer.state_dict()}

    def load_state_dict(self, state) -> None:
        self.statistics.load_state_dict(state["statistics"])
        self.buffer.load_state_dict(state["buffer"])


def _trained() -> checkpoint.Trained:
    unet = nn.Linear(2, 3)
    optimizer = torch.optim.AdamW(unet.parameters())
    unet(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    method = _Method()
    method.statistics.advantages(["a", "b"], torch.tensor([1.0, 2.0]))
    method.buffer.add({"x": torch.ones(2, 3)})
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    return checkpoint.Trained(unet, optimizer, rate, method, ema=Ema(unet.parameters(), 0.9))


_CONFIG = DraftConfig()
_BASE = Path(tempfile.mkdtemp(prefix="fuzz-run-")) / "run"
_BASE.mkdir()
(_BASE / CONFIG).write_text(to_yaml(_CONFIG))
(_BASE / METRICS).write_text('{"step": 1, "reward": 0.5}\n{"step": 2, "reward": 0.6}\n')
_PLAN = Plan.replayed(("full", "full"), 2)
(_BASE / memory_plan.NAME).write_text(json.dumps(memory_plan.content(memory_plan.Memory(2**30, 0), _PLAN, _CONFIG)))
_PROGRESS = checkpoint.Progress(2, evaluations={0: {"digits": [0.5, 0.25]}})
_SAVED = checkpoint.save(_BASE, _trained(), _PROGRESS, _CONFIG)
_FILES = [f"{_SAVED.name}/{path.name}" for path in sorted(_SAVED.iterdir())]
_FILES += [CONFIG, METRICS, memory_plan.NAME]
_STATE = torch.load(_SAVED / "state.pt", weights_only=True)


def check(data: bytes, folder: Path) -> None:
    source = FuzzedDataProvider(data[:200])
    run = folder / "run"
    shutil.copytree(_BASE, run)
    for _ in range(source.ConsumeIntInRange(1, 2)):
        path = run / drawn.one_of(source, _FILES)
        _damage(path, source, data[200:])
    if source.ConsumeIntInRange(0, 3):
        _sign(run / _SAVED.name)
    if source.ConsumeIntInRange(0, 9) == 0:
        (
            run / drawn.one_of(source, ("checkpoint-x", "checkpoint-007", "checkpoint-²", ".checkpoint-3.partial"))
        ).mkdir()
    before = _contents(run)
    begun = source.ConsumeIntInRange(0, 7) == 0
    if begun:
        shutil.rmtree(run / _SAVED.name)
        tried(_ERRORS, checkpoint.only_begun, run, _CONFIG)
        return
    directory = RunDirectory(run)
    try:
        place = tried(_ERRORS, checkpoint.find, "latest" if source.ConsumeBool() else str(run / _SAVED.name), run)
        progress = tried(_ERRORS, checkpoint.load, place, _trained(), _CONFIG)
        memory = tried(_ERRORS, memory_plan.load, directory, _CONFIG)
        reference.load(directory, {"pixels": torch.ones(2, 3)})
    except Refused:
        demand(before == _contents(run), "refused, and something was changed")
        raise
    demand(isinstance(progress.step, int) and progress.step >= 0, "a step that is none")
    demand(memory is None or memory.budget >= 0, "a budget that is none")
    tried(_ERRORS, directory.rewind_metrics, place)
    again = checkpoint.save(folder / "again", _trained(), progress, _CONFIG)
    demand(checkpoint.load(again, _trained(), _CONFIG) == progress, "the progress does not read back")


def _damage(path: Path, source: FuzzedDataProvider, tail: bytes) -> None:
    if not path.is_file():
        return
    kind, content = source.ConsumeIntInRange(0, 6), path.read_bytes()
    if kind == 0:
        path.write_bytes(tail)
    elif kind == 1:
        path.write_bytes(content[: source.ConsumeIntInRange(0, len(content))])
    elif kind == 2:
        path.unlink()
        if source.ConsumeBool():
            path.mkdir()
    elif kind == 3 and content:
        place = source.ConsumeIntInRange(0, len(content) - 1)
        path.write_bytes(content[:place] + bytes([source.ConsumeIntInRange(0, 255)]) + content[place + 1 :])
    elif path.name == "state.pt":
        buffer = io.BytesIO()
        try:
            torch.save(_other_state(source), buffer)
        except RecursionError as error:
            raise Refused from error
        path.write_bytes(buffer.getvalue())
    elif path.name == "trainable.safetensors":
        path.write_bytes(save({"weight": torch.ones(source.ConsumeIntInRange(0, 3), 2), "bias": torch.ones(3)}))
    elif path.suffix == ".json" or path.name == checkpoint.MARK:
        try:
            document = drawn.mutated(source, json.loads(content))
        except (ValueError, RecursionError):
            document = drawn.value(source)
        path.write_text(drawn.dumped(document), errors="replace")


def _other_state(source: FuzzedDataProvider):
    state = {name: dict(part) if isinstance(part, dict) else part for name, part in _STATE.items()}
    name = drawn.one_of(source, sorted(state))
    if source.ConsumeBool() and isinstance(state[name], dict):
        part = state[name]
        part[drawn.one_of(source, sorted(part))] = _plain(drawn.value(source, 2))
    else:
        state[name] = _plain(drawn.value(source, 2))
    return state


def _plain(found):
    # Neither text nor numbers of these kinds can be pickled by torch and read again.
    return "x" if isinstance(found, str) else found


def _sign(folder: Path) -> None:
    """Checksums that fit what is there, as those who write such files can make."""
    mark = folder / checkpoint.MARK
    if mark.is_file():
        rest = [path for path in folder.iterdir() if path.is_file() and path != mark]
        mark.write_text(json.dumps({path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in rest}))


def _contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def seeds() -> list[bytes]:
    drawn_ = [bytes((17 * k * form + 3 * form + k) % 256 for k in range(200)) for form in range(1, 160)]
    tails = (
        b"",
        b"{}",
        b"[]",
        b'{"format": 1, "algorithm": "draft", "config": [], "progress": {}}',
        b"1: x\n",
        b"[" * 2000,
    )
    return [start + tail for start in drawn_ for tail in tails[:1]] + [drawn_[n] + tail for n, tail in enumerate(tails)]

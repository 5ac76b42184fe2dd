"""The training steps that `benchmarks.gpu_chain` times, and what `rftcore plan` says of them."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import functools
import json
import multiprocessing
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.gpu_chain_models import save
from rftcore import published
from rftcore.commands.plan import predict
from rftcore.commands.plan_options import PlanOptions
from rftcore.sampling import Plan


@dataclasses.dataclass(frozen=True)
class Work:
    """A training step to be timed.

    Attributes:
        model: of `gpu_chain_models.CONFIGS`.
        memory: of the whole device, as `rftcore plan --device-memory` takes it; of several the first that is there.
        seconds: that it may take in the first of them; None: only the memory is asked for.
    """

    name: str
    model: str
    batch: int
    backprop_steps: int
    memory: tuple[str, ...]
    seconds: float | None = None


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is run.

    Attributes:
        exact: the model whose gradients are compared with fp64.
        steps: T of every other chain.
        sampled: the model that is sampled without a gradient; batches: how many images at a time.
        host_ms, lora_percent: that a step without a gradient may take of Python, and more with a LoRA than without;
            times_stock: how much faster one image is to be sampled; None: nothing is asked.
    """

    exact: str
    steps: int
    sampled: str
    batches: tuple[int, ...]
    works: tuple[Work, ...]
    host_ms: float | None = None
    lora_percent: float | None = None
    times_stock: float | None = None


FULL = Setting(
    "small",
    50,
    "sd15",
    (4, 1),
    (
        Work("DRaFT-1, SD1.5, 4 images", "sd15", 4, 1, ("7GiB",), 0.80),
        # The second for devices of 80 GB.
        Work("DRaFT-50, SD1.5, 4 images", "sd15", 4, 50, ("110GiB", "72GiB"), 1.80),
        Work("DRaFT-50, SD1.5, 4 images", "sd15", 4, 50, ("8GiB",), 2.4),
        Work("DRaFT-5, SDXL, 1 image", "sdxl", 1, 5, ("16GiB",)),
    ),
    host_ms=0.3,
    lora_percent=3.0,
    times_stock=3.0,
)
# Stored, stored and replayed, and with what SDXL is told besides.
TINY = Setting(
    "tiny",
    3,
    "tiny",
    (1,),
    (
        Work("DRaFT-3, tiny, 2 images", "tiny", 2, 3, ("1TiB", "64MiB")),
        Work("DRaFT-3, tiny, 2 images", "tiny", 2, 3, ("1.5MiB",)),
        Work("DRaFT-1, tiny SDXL, 1 image", "tiny-xl", 1, 1, ("64MiB",)),
    ),
)


class Planned(NamedTuple):
    """What `rftcore plan` says of a work.

    Attributes:
        decoder_level: `recompute` of the accelerated decoder.
        flops: of the training step.
    """

    plan: Plan
    decoder_level: str
    flops: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {**self._asdict(), "plan": self.plan.to_dict()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Planned:
        """The inverse of `to_dict`."""
        return cls(**{**values, "plan": Plan.from_dict(values["plan"])})


class Asked(NamedTuple):
    """What a plan depends on."""

    model: str
    batch: int
    steps: int
    backprop_steps: int
    device_memory: str


def asked(work: Work, steps: int, memory: str) -> Asked:
    """The plan that a work has on a device of that memory."""
    return Asked(work.model, work.batch, steps, work.backprop_steps, memory)


def plans(wanted: Sequence[Asked], file: Path | None, processes: int) -> dict[Asked, Planned]:
    """Those that `file` has, and the others made, in so many processes, and written to it."""
    known: dict[Asked, Planned] = {}
    if file is not None and file.exists():
        known = {Asked(*entry["of"]): Planned.from_dict(entry["planned"]) for entry in json.loads(file.read_text())}
    missing = [key for key in dict.fromkeys(wanted) if key not in known]
    if not missing:
        return known
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        run = map
        if min(processes, len(missing)) > 1:
            context = multiprocessing.get_context("spawn")
            run = stack.enter_context(concurrent.futures.ProcessPoolExecutor(processes, context)).map
        known |= zip(missing, run(functools.partial(_planned, folder=Path(folder)), missing), strict=True)
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        entries = [{"of": key, "planned": planned.to_dict()} for key, planned in known.items()]
        file.write_text(json.dumps(entries) + "\n")
    return known


def _planned(wanted: Asked, folder: Path) -> Planned:
    """Of a model that is known, or of one whose configs are written into `folder`."""
    options = wanted._asdict()
    if wanted.model not in published.UNETS:
        options["model"] = str(save(wanted.model, folder))
    found = predict(PlanOptions(**options, rank=4))
    return Planned(found.plan, found.decoder_level, found.flops)

"""The ways of doing a work, by name: stock diffusers + PEFT with its switches, torch.compile, and ours at a budget."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator
from dataclasses import dataclass, replace

from rftcore.blocks.budget import bytes_of
from rftcore.errors import UsageError, nearest

OURS = "rftcore"
LEAST = "least"
# Of torch's activation memory budget: what a compiled backward keeps, as a share of all.
COMPILED = (1.0, 0.5, 0.3)
_CHAINED = ("draft",)
_NO_GRADIENT = ("sampling",)


@dataclass(frozen=True)
class Method:
    """One way.

    Attributes:
        name: its row's.
        sampler: whether chains are `CheckpointedSampler`'s, and not a loop over diffusers' scheduler.
        fp32_lora: whether the LoRA is fp32 on the frozen weights' dtype.
        autocast: whether weights are fp32 and evaluations run under autocast, as accelerate's mixed precision does.
        steps: whether `torch.utils.checkpoint` is around each differentiated step.
        blocks: whether diffusers' gradient checkpointing is on, in the UNet and the decoder.
        images: whether `torch.utils.checkpoint` is around each image's decoding and reward.
        score: whether `rftcore.score` decodes and rewards.
        compiled: torch.compile's activation memory budget; None: not compiled.
        unet, decoder: levels of `rftcore.accelerate`; None: not accelerated.
        merged: whether sampling adds the LoRA to copies of the weights.
        replayed: every differentiated step of the sampler is replayed, the whole batch at once; nothing is planned.
        budget: of ours, "all", "least", bytes as a text, or another method's name, whose bytes it is.
    """

    name: str
    sampler: bool = False
    fp32_lora: bool = False
    autocast: bool = False
    steps: bool = False
    blocks: bool = False
    images: bool = False
    score: bool = False
    compiled: float | None = None
    unet: str | None = None
    decoder: str | None = None
    merged: bool = False
    replayed: bool = False
    budget: str | None = None

    @property
    def planned(self) -> bool:
        """Whether what it keeps is to be settled first, from bytes."""
        return self.budget is not None

    def refusal(self, dtype: str) -> str | None:
        """Why it is not run, where it would be another method again."""
        if dtype == "fp32" and (self.fp32_lora or self.autocast) and not self.sampler:
            return "in fp32 it is stock; give --dtype bf16"
        return None


def methods(work: str, batch: int) -> list[str]:
    """The names of what is there for a work, ours by budgets last."""
    found = []
    for base in ("stock", "fp32_lora", "autocast", *(_compiled(share) for share in COMPILED)):
        found += [base + suffix for suffix in _suffixes(base, work, batch)]
    if work in _NO_GRADIENT:
        return [*found, OURS, f"{OURS}+merged"]
    others = [name for name in found if name.startswith("stock") and "images" not in name]
    return [*found, OURS, *(f"{OURS}@{name}" for name in others), f"{OURS}@{LEAST}"]


def select(patterns: str, work: str, batch: int) -> list[Method]:
    """The methods that names and patterns, joined by commas, ask for, in the order of `methods`; bytes at the end.

    Raises: UsageError for one that names nothing.
    """
    known, chosen = methods(work, batch), []
    for pattern in filter(None, (part.strip() for part in patterns.split(","))):
        found = fnmatch.filter(known, pattern) or list(_budgeted(pattern, work))
        if not found:
            raise UsageError(
                f"--methods {pattern} names nothing that does {work}; {nearest(pattern, known)} (known: "
                f"{', '.join(known)}, and {OURS}@500MiB)"
            )
        chosen += [name for name in found if name not in chosen]
    return [method(name) for name in sorted(chosen, key=lambda name: _place(name, known))]


def method(name: str) -> Method:
    """Of a name that `methods` has, or a budget of ours."""
    if name == OURS or name.startswith(f"{OURS}@") or name == f"{OURS}+merged":
        budget = name.partition("@")[2] or "all"
        ours = Method(name, sampler=True, score=True, fp32_lora=True, unet="none", decoder="none", budget=budget)
        return replace(ours, merged=True, budget=None) if name.endswith("+merged") else ours
    base, *suffixes = name.split("+")
    kind, _, share = base.partition("@")
    made = Method(name, fp32_lora=kind == "fp32_lora", autocast=kind == "autocast")
    if kind == "compile":
        made = replace(made, compiled=float(share or 1.0))
    return replace(made, steps="steps" in suffixes, blocks="blocks" in suffixes, images="images" in suffixes)


def needed(chosen: list[Method]) -> list[Method]:
    """Methods that are not chosen, and whose bytes are asked for; stock, whose FLOPs all are compared with."""
    names = {each.name for each in chosen}
    wanted = {each.budget for each in chosen if each.budget and each.budget.startswith("stock")}
    return [method(name) for name in sorted({"stock", *wanted} - names)]


def _compiled(share: float) -> str:
    return "compile" if share == 1.0 else f"compile@{share:g}"


def _suffixes(base: str, work: str, batch: int) -> list[str]:
    if work in _NO_GRADIENT:
        # Nothing is kept, whatever a compiled backward would keep.
        return [] if base.startswith("compile@") else [""]
    if base.startswith("compile"):
        return ["", "+steps"] if work in _CHAINED else [""]
    if work not in _CHAINED:
        return ["", "+blocks"]
    return ["", "+steps", "+blocks", "+steps+blocks"] + (["+steps+blocks+images"] if batch > 1 else [])


def _budgeted(pattern: str, work: str) -> Iterator[str]:
    head, _, budget = pattern.partition("@")
    if head != OURS or work in _NO_GRADIENT:
        return
    try:
        bytes_of(budget)
    except ValueError:
        return
    yield pattern


def _place(name: str, known: list[str]) -> int:
    return known.index(name) if name in known else len(known)

"""What `rftcore bench` can be told. Imports no torch, so that `--help` is instant."""

from __future__ import annotations

import dataclasses
import math
import typing
from dataclasses import dataclass

from jsonargparse import ArgumentParser

from rftcore.errors import UsageError, nearest
from rftcore.training.config import option

MODELS = ("digits", "37m", "sd15", "sdxl", "tiny")
WORKS = ("train_step", "draft", "ddpo", "dpok", "sampling")
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
DEVICES = ("auto", "cpu", "cuda")
WARMUPS = ("short", "full", "none")
ANSWERS = ("auto", "yes", "no")


@dataclass
class BenchOptions:
    """Ours beside stock diffusers + PEFT and torch.compile: seconds, bytes, FLOPs and gradient errors, in one run."""

    model: str = option(
        "digits",
        "digits (ships with the package), 37m (SD's shape in the small), sd15, sdxl; random weights but digits'",
    )
    work: str = option(
        "draft",
        "train_step (the UNet's forward and backward), draft (sample, decode, reward, backward), ddpo or dpok (an epoch: "
        "sample, re-score, update), sampling",
    )
    backprop_steps: str = option("all", "of draft: how many of the last steps are differentiated, or all")
    methods: str = option(
        "stock*,rftcore*",
        "names or patterns, joined by commas, such as stock,fp32_lora*,autocast*,compile*,rftcore,rftcore@least,"
        "rftcore@500MiB,rftcore@stock+steps (the bytes of that one)",
    )
    steps: int = option(10, "sampling steps")
    batch: int | None = option(None, "images; none: 4 of digits, 2 of policy gradients, else 1")
    resolution: int | None = option(None, "image side in pixels; none: the model's own")
    dtype: str = option("fp32", f"of the frozen weights: {', '.join(DTYPES)}")
    rank: int = option(4, "of the LoRA")
    guidance_scale: float = option(7.5, "classifier-free guidance; 1.0 runs no negative branch")
    repeats: int = option(3, "measured rounds; methods take turns")
    warmup: str = option("short", "what comes before them: short (a chain with a step of each kind), full or none")
    threads: int | None = option(None, "of PyTorch; none: its own choice")
    device: str = option("auto", "auto (CUDA where there is one), cpu or cuda")
    gradient_error: str = option("auto", "against stock in fp64: auto (where that is small work), yes or no")
    count_only: bool = option(False, "counted columns alone, on tensors without data: any model on any machine")
    memory_limit: str | None = option(
        None, "what one method's process may hold before its row is OOM; none: 90% of what is available"
    )
    timeout: int = option(1800, "seconds after which a method's run is given up")
    output: str | None = option(None, "JSON file for the rows")

    def validate(self) -> None:
        """Raises UsageError with every problem found, not only the first."""
        found = self.problems()
        if found:
            raise UsageError("; ".join(found))

    def problems(self) -> list[str]:
        """Every value that cannot work, as a sentence that names it, what it is and what is allowed."""
        found = []
        for name, known in (
            ("model", MODELS), ("work", WORKS), ("dtype", DTYPES), ("device", DEVICES), ("warmup", WARMUPS),
            ("gradient_error", ANSWERS),
        ):  # fmt: skip
            value = getattr(self, name)
            if value not in known:
                found.append(f"--{name} {value} is unknown; {nearest(value, known)} ({', '.join(known)})")
        for name in ("steps", "batch", "resolution", "rank", "repeats", "threads", "timeout"):
            value = getattr(self, name)
            if value is not None and value < 1:
                found.append(f"--{name} {value} must be at least 1")
        if self.work in ("ddpo", "dpok") and self.batch == 1:
            found.append(f"--batch 1 with --work {self.work}: advantages compare samples; give at least 2")
        count = self.differentiated
        if not 1 <= count <= self.steps:
            found.append(f"--backprop_steps {self.backprop_steps} must be all or lie in [1, {self.steps}], of --steps")
        if not math.isfinite(self.guidance_scale):
            found.append(f"--guidance_scale {self.guidance_scale} must be a finite number; 1.0 is no guidance")
        if not any(name.strip() for name in self.methods.split(",")):
            found.append("--methods is empty; give names or patterns, such as 'stock*,rftcore*'")
        return found

    @property
    def differentiated(self) -> int:
        """K; 0 for a text that is no number."""
        if self.backprop_steps == "all":
            return self.steps
        return int(self.backprop_steps) if self.backprop_steps.isdigit() else 0

    @property
    def images(self) -> int:
        """B."""
        if self.batch is not None:
            return self.batch
        return {"digits": 4}.get(self.model, 2 if self.work in ("ddpo", "dpok") else 1)


def add_options(parser: ArgumentParser) -> None:
    """Adds one flag for each field of BenchOptions."""
    types = typing.get_type_hints(BenchOptions)
    for field in dataclasses.fields(BenchOptions):
        help_ = field.metadata["help"].replace("%", "%%")
        names = [f"--{field.name}"] + ([f"--{field.name.replace('_', '-')}"] if "_" in field.name else [])
        settings = {"action": "store_true"} if types[field.name] is bool else {"type": types[field.name]}
        parser.add_argument(*names, dest=field.name, default=field.default, help=help_, **settings)

"""Other people's training code with its sampling replaced: the same latents, log-probabilities, losses and gradients.

pip install -c constraints.txt pandas && pip install --no-deps trl==0.23.1    # or as benchmarks/programs.py says
python -m benchmarks.drop_in_sampler [--repeats 3] [--threads 1]

What a user changes is `SamplerPipeline` and `SamplerDDPOTrainer` of examples/trl_trainer.py for TRL, and
`SamplerLoop` of benchmarks/ddpo_loop.py for a loop of one's own. Without TRL only that loop runs.

The same noise: both sides draw the first latents and then each step's noise from the default generator, so one seed
serves both. (TRL's `generator` draws the first latents alone; the sampler's draws all noise. For TRL's, draw the
latents with it and give them as `latents=`.)

`latents` (every state), `log_probs`, `losses` and `gradients` are the largest relative differences of a tensor to
stock's in fp32, in the Frobenius norm; `fp64` is the largest of all of them in fp64, on a smaller latent. The
gradients are of all LoRA factors, in a trainer those its optimizer is given first. The adapters' B is not zero.
`saved_mib` is what a run has made and still holds where its loss is formed.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import accelerate
import torch
from accelerate.utils import set_seed
from torch import Tensor, nn

from benchmarks.ddpo_loop import Loop, SamplerLoop
from benchmarks.harness import Case, compare, report, table
from benchmarks.memory import PeakBytes
from benchmarks.programs import (
    LATENT_SIZE,
    LATENT_SIZE_FP64,
    NO_TRL,
    PROMPTS,
    AlignProp,
    Ddpo,
    Program,
    exact_tables,
    quiet,
    redness,
    save_pipeline,
)

if NO_TRL is None:
    from trl import DefaultDDPOStableDiffusionPipeline

    from examples.trl_trainer import SamplerDDPOTrainer, SamplerPipeline

STOCK, PLAIN, SAMPLER = "stock", "stock, gradient_checkpoint=False", "CheckpointedSampler"
SAMPLERS = {SAMPLER: {}}  # a row of AlignProp's sampling each -> more options of the sampler
COLUMNS = ("latents", "log_probs", "losses", "gradients")
STEPS, GUIDANCE, ETA = 4, 5.0, 1.0
SEED = 7  # with it, AlignProp's random truncation leaves out the first step and the third
Results = dict[str, list[Tensor]]


def fill_adapters(unet: nn.Module) -> None:
    """LoRA's B as after some training: where it is zero, A has no gradient."""
    torch.manual_seed(1)
    for name, parameter in unet.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.05)


class Run:
    """A piece of work that is timed and whose results are compared."""

    def step(self) -> None:
        """Does it once."""
        raise NotImplementedError

    def first_results(self) -> Results:
        """Does it for the first time."""
        raise NotImplementedError

    def saved_mib(self) -> float | str:
        """Empty where nothing is saved for a backward pass."""
        raise NotImplementedError


class Training(Run):
    """A step of a program's training."""

    def __init__(self, program: type[Program], folder: Path, dtype: torch.dtype) -> None:
        self.program = program(folder, fill_adapters, dtype=dtype)

    def step(self) -> None:
        self.program.step()

    def saved_mib(self) -> float:
        return self.program.held_mib()

    def first_results(self) -> Results:
        updates: list[list[Tensor]] = []

        def remember(optimizer, *_) -> None:
            updates.append(
                [p.grad.clone() for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
            )

        hook = self.program.optimizer.register_step_pre_hook(remember)
        self.program.step()
        hook.remove()
        results = {"losses": [torch.tensor(self.program.losses, dtype=torch.float64)], "gradients": updates[0]}
        if isinstance(self.program, Loop):
            results |= {"latents": list(self.program.states), "log_probs": [self.program.log_probs]}
        return results


class Call(Run):
    """One use of TRL's pipeline, or of one in its place, with a backward pass where there is a loss.

    Args:
        options: of the pipeline.
    """

    batch = 4  # prompts

    def __init__(self, pipeline: type, folder: Path, dtype: torch.dtype, **options: Any) -> None:
        device = accelerate.PartialState().device  # first: TRL's logger asks for it
        self.pipeline = pipeline(str(folder), **options)
        pipe = self.pipeline.sd_pipeline.to(device)
        pipe.set_progress_bar_config(disable=True)
        set_seed(0)
        self.pipeline.get_trainable_layers()
        fill_adapters(pipe.unet)
        for module in (pipe.unet, pipe.vae, pipe.text_encoder):
            module.to(dtype)
        if dtype is torch.float64:
            exact_tables(pipe.scheduler)
        prompts = ["", *PROMPTS[: self.batch]]
        ids = pipe.tokenizer(prompts, return_tensors="pt", padding="max_length", truncation=True).input_ids
        embeddings = pipe.text_encoder(ids.to(device))[0]
        self.arguments = {
            "prompt_embeds": embeddings[1:],
            "negative_prompt_embeds": embeddings[:1].repeat(self.batch, 1, 1),
            "num_inference_steps": STEPS,
            "guidance_scale": GUIDANCE,
            "eta": ETA,
            "output_type": "pt",
        }
        self.trained = [p for p in pipe.unet.parameters() if p.requires_grad]

    def forward(self) -> tuple[Tensor | None, Results]:
        """The loss, None where nothing is trained on, and what is compared."""
        raise NotImplementedError

    def step(self) -> None:
        loss, _ = self._forward()
        if loss is not None:
            loss.backward()

    def first_results(self) -> Results:
        loss, results = self._forward()
        results = {name: [tensor.detach().clone() for tensor in tensors] for name, tensors in results.items()}
        if loss is not None:
            loss.backward()
            results |= {"losses": [loss.detach()], "gradients": [p.grad for p in self.trained]}
        return results

    def saved_mib(self) -> float | str:
        with PeakBytes() as counter:
            loss, results = self._forward()
            del results
            return "" if loss is None else counter.live / 2**20

    def _forward(self) -> tuple[Tensor | None, Results]:
        set_seed(SEED)
        for parameter in self.trained:
            parameter.grad = None
        return self.forward()


class Alignment(Call):
    """AlignProp's sampling with gradient, its decoding and a reward.

    Args:
        truncation: of `rgb_with_grad`.
    """

    batch = 2

    def __init__(self, pipeline: type, folder: Path, dtype: torch.dtype, truncation: dict[str, Any], **options) -> None:
        super().__init__(pipeline, folder, dtype, **options)
        self.truncation = truncation

    def forward(self) -> tuple[Tensor, Results]:
        output = self.pipeline.rgb_with_grad(**self.arguments, **self.truncation)
        return -redness(output.images).mean(), {"latents": output.latents, "log_probs": output.log_probs}


class Sampling(Call):
    """DDPO's sampling and decoding."""

    def forward(self) -> tuple[None, Results]:
        output = self.pipeline(**self.arguments)
        return None, {"latents": output.latents, "log_probs": output.log_probs}


class Rescoring(Call):
    """DDPO's re-scoring of a step of each sample's own, as TRL's trainer does it."""

    steps = torch.tensor([2, 0, 3, 1])
    weights = torch.tensor([1.0, -2.0, 0.5, -1.0])

    def __init__(self, *args) -> None:
        super().__init__(*args)
        set_seed(0)
        self.states = torch.stack(self.pipeline(**self.arguments).latents)

    def forward(self) -> tuple[Tensor, Results]:
        log_prob = self.log_prob()
        return (self.weights.to(log_prob) * log_prob).mean(), {"log_probs": [log_prob]}

    def log_prob(self) -> Tensor:
        rows = torch.arange(self.batch)
        x, next_x = self.states[self.steps, rows], self.states[self.steps + 1, rows]
        t = self.pipeline.scheduler.timesteps[self.steps]
        embeddings = torch.cat([self.arguments["negative_prompt_embeds"], self.arguments["prompt_embeds"]])
        negative, positive = self.pipeline.unet(torch.cat([x, x]), torch.cat([t, t]), embeddings).sample.chunk(2)
        eps = negative + GUIDANCE * (positive - negative)
        return self.pipeline.scheduler_step(eps, t, x, eta=ETA, prev_sample=next_x).log_probs


class SamplerRescoring(Rescoring):
    def log_prob(self) -> Tensor:
        return self.pipeline.sampler.log_prob(self.pipeline.trajectory, self.steps[:, None])[0][:, 0]


class SamplerAlignProp(AlignProp):
    def load(self, folder: Path) -> None:
        self.trl_pipe = SamplerPipeline(str(folder))
        self.pipe = self.trl_pipe.sd_pipeline


class SamplerDdpo(Ddpo):
    load = SamplerAlignProp.load

    def make_trainer(self) -> SamplerDDPOTrainer:
        return SamplerDDPOTrainer(self.config(), self.redness, self.prompt, self.trl_pipe)


Make = Callable[[Path, torch.dtype], Run]


def comparisons() -> dict[str, dict[str, Make]]:
    """What is compared: its name -> the ways of doing it, stock first."""
    training = {Loop.name: (Loop, SamplerLoop)}
    ways: dict[str, dict[str, Make]] = {}
    if NO_TRL is None:
        stock, ours = DefaultDDPOStableDiffusionPipeline, SamplerPipeline
        for name, truncation in {
            "AlignProp's sampling, full chain": {"truncated_backprop": False},
            "AlignProp's sampling, truncated": {"truncated_backprop_rand": False, "truncated_backprop_timestep": 2},
            "AlignProp's sampling, truncated at random": {"truncated_rand_backprop_minmax": (0, STEPS - 1)},
        }.items():
            ways[f"TRL, {name}"] = {
                STOCK: partial(Alignment, stock, truncation=truncation),
                PLAIN: partial(Alignment, stock, truncation={**truncation, "gradient_checkpoint": False}),
            } | {
                sampler: partial(Alignment, ours, truncation=truncation, sampler_options=options)
                for sampler, options in SAMPLERS.items()
            }
        ways["TRL, DDPO's sampling"] = {STOCK: partial(Sampling, stock), SAMPLER: partial(Sampling, ours)}
        ways["TRL, DDPO's re-scoring"] = {STOCK: partial(Rescoring, stock), SAMPLER: partial(SamplerRescoring, ours)}
        training |= {AlignProp.name: (AlignProp, SamplerAlignProp), Ddpo.name: (Ddpo, SamplerDdpo)}
    for name, (theirs, replaced) in training.items():
        ways[name] = {STOCK: partial(Training, theirs), SAMPLER: partial(Training, replaced)}
    return ways


def difference(ours: list[Tensor], stock: list[Tensor]) -> float:
    """The largest relative one of a tensor, in the Frobenius norm; infinite for NaN."""
    tiny = torch.finfo(torch.float64).tiny
    pairs = [(a.double(), b.double()) for a, b in zip(ours, stock, strict=True)]
    relative = torch.stack([(a - b).norm() / b.norm().clamp(min=tiny) for a, b in pairs])
    return relative.nan_to_num(nan=math.inf).max().item()


@contextlib.contextmanager
def fp64() -> Iterator[None]:
    """Constants made inside are fp64: TRL's log-probability has one that is fp32 by default."""
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def differences(ways: dict[str, Make], folder: Path, dtype: torch.dtype) -> tuple[dict[str, Run], dict[str, dict]]:
    """Every way's run, and its differences to the first one's by column."""
    runs = {name: make(folder, dtype) for name, make in ways.items()}
    results = {name: run.first_results() for name, run in runs.items()}
    stock = results[STOCK]
    return runs, {
        name: {column: difference(result[column], stock[column]) for column in COLUMNS if column in stock}
        for name, result in results.items()
    }


def rows_of(program: str, ways: dict[str, Make], folder: Path, small: Path, repeats: int) -> list[dict[str, Any]]:
    """A row a way."""
    runs, seen = differences(ways, folder, torch.float32)
    with fp64():
        _, exact = differences(ways, small, torch.float64)
    measured = compare([Case(name, run.step) for name, run in runs.items()], repeats=repeats)
    rows = []
    for row in measured:
        name = row.pop("case")
        columns = {column: seen[name].get(column, "") for column in COLUMNS}
        rows.append(
            {
                "program": program,
                "sampling": name,
                **columns,
                "fp64": max(exact[name].values()),
                "saved_mib": runs[name].saved_mib(),
                **row,
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    quiet()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        large = save_pipeline(Path(folder, "large"), LATENT_SIZE)
        small = save_pipeline(Path(folder, "small"), LATENT_SIZE_FP64)
        for program, ways in comparisons().items():
            rows += rows_of(program, ways, large, small, arguments.repeats)
    if NO_TRL:
        print(table(rows))
        print(f"No rows of TRL: {NO_TRL}. See benchmarks/programs.py for how to install it. Nothing was written.")
    else:
        report("drop_in_sampler", rows, {**vars(arguments), "trl": version("trl")})


if __name__ == "__main__":
    main()

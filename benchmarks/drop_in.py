"""One added line in other people's training code: the same losses, in less memory.

pip install -c constraints.txt pandas && pip install --no-deps trl==0.23.1    # the last TRL with these two trainers
python -m benchmarks.drop_in [--repeats 3] [--threads 1]

Without TRL only diffusers' loop runs. A step is an update in diffusers' loop and in AlignProp; in DDPO it is an epoch:
the sampling, the reward and two updates. `peak_mib` is the whole step's; `saved_mib` is what autograd keeps for one
call of the UNet. `loss_difference` is the largest one to stock's losses, over all steps, in fp32;
`loss_difference_fp64` the largest over two steps on a smaller latent, with the line after and before the setting up.
"""

from __future__ import annotations

import argparse
import tempfile
from importlib.metadata import version
from pathlib import Path

import torch
from accelerate.utils import set_seed
from diffusers import DDPMScheduler, StableDiffusionPipeline
from peft import LoraConfig
from torch.nn import functional

import rftcore
from benchmarks.harness import Case, compare, report, table
from benchmarks.programs import (
    LATENT_SIZE,
    LATENT_SIZE_FP64,
    NO_TRL,
    PROMPTS,
    AlignProp,
    Ddpo,
    Line,
    Program,
    quiet,
    save_pipeline,
)

STOCK = "stock"
LINES: dict[str, Line] = {
    STOCK: lambda unet: None,
    "unet.enable_gradient_checkpointing()": lambda unet: unet.enable_gradient_checkpointing(),
    "rftcore.accelerate(unet)": lambda unet: rftcore.accelerate(unet),
    'rftcore.accelerate(unet, recompute="block")': lambda unet: rftcore.accelerate(unet, recompute="block"),
}


class Diffusers(Program):
    """The loop of diffusers' examples/text_to_image/train_text_to_image_lora.py."""

    name = "diffusers, text-to-image LoRA"

    def load(self, folder: Path) -> None:
        self.pipe = StableDiffusionPipeline.from_pretrained(folder).to(self.device)
        self.scheduler = DDPMScheduler.from_config(self.pipe.scheduler.config)

    def set_up(self) -> None:
        set_seed(0)
        unet, tokenizer = self.pipe.unet, self.pipe.tokenizer
        for module in (unet, self.pipe.vae, self.pipe.text_encoder):
            module.requires_grad_(False)
        targets = ["to_k", "to_q", "to_v", "to_out.0"]
        unet.add_adapter(LoraConfig(r=4, lora_alpha=4, init_lora_weights="gaussian", target_modules=targets))
        self.trained = [p for p in unet.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-3, weight_decay=1e-2)
        size = self.pipe.vae.config.sample_size
        self.pixels = torch.rand(len(PROMPTS), 3, size, size, device=self.device) * 2 - 1
        ids = tokenizer(PROMPTS, return_tensors="pt", padding="max_length", truncation=True).input_ids
        self.ids = ids.to(self.device)

    def train(self) -> None:
        unet, vae, scheduler = self.pipe.unet, self.pipe.vae, self.scheduler
        unet.train()
        latents = vae.encode(self.pixels.to(vae.dtype)).latent_dist.sample() * vae.config.scaling_factor
        noise = torch.randn_like(latents)
        timesteps = torch.randint(0, scheduler.config.num_train_timesteps, (len(latents),), device=self.device)
        noisy = scheduler.add_noise(latents, noise, timesteps)
        prediction = unet(noisy, timesteps, self.pipe.text_encoder(self.ids)[0], return_dict=False)[0]
        loss = functional.mse_loss(prediction, noise)
        self.record(loss)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


def difference(losses: list[float], stock: list[float]) -> float:
    """The largest one between two runs' losses."""
    return max(abs(ours - theirs) for ours, theirs in zip(losses, stock, strict=True))


def losses_fp64(program: type[Program], folder: Path, line: Line, *, first: bool = False) -> list[float]:
    """The losses of two steps."""
    run = program(folder, line, first=first, dtype=torch.float64)
    for _ in range(2):
        run.step()
    return run.losses


def rows_of(program: type[Program], folder: Path, small: Path, repeats: int) -> tuple[list[dict], dict[str, list]]:
    """A row a line, and the fp32 losses of every line."""
    runs = {name: program(folder, line) for name, line in LINES.items()}
    measured = compare([Case(name, run.step) for name, run in runs.items()], repeats=repeats)
    stock = losses_fp64(program, small, LINES[STOCK])
    rows = []
    for row in measured:
        name = row.pop("case")
        run = runs[name]
        placements = () if name == STOCK else (False, True)
        fp64 = [losses_fp64(program, small, LINES[name], first=first) for first in placements]
        rows.append(
            {
                "program": program.name,
                "line": name,
                "last_loss": f"{run.losses[-1]:.6f}",
                "loss_difference": difference(run.losses, runs[STOCK].losses),
                "loss_difference_fp64": max((difference(losses, stock) for losses in fp64), default=0.0),
                "saved_mib": run.saved_mib(),
                **row,
            }
        )
    return rows, {name: run.losses for name, run in runs.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    quiet()
    rows, losses = [], {}
    with tempfile.TemporaryDirectory() as folder:
        large = save_pipeline(Path(folder, "large"), LATENT_SIZE)
        small = save_pipeline(Path(folder, "small"), LATENT_SIZE_FP64)
        for program in (Diffusers,) if NO_TRL else (Diffusers, Ddpo, AlignProp):
            more, losses[program.name] = rows_of(program, large, small, arguments.repeats)
            rows += more
    if NO_TRL:
        print(table(rows))
        print(f"No rows of TRL: {NO_TRL}. See benchmarks/programs.py for how to install it. Nothing was written.")
    else:
        report("drop_in", rows, {**vars(arguments), "trl": version("trl"), "losses": losses})


if __name__ == "__main__":
    main()

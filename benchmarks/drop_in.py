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
import logging
import tempfile
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import accelerate
import diffusers
import torch
import transformers
from accelerate.utils import set_seed
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig
from torch import Tensor
from torch.nn import functional
from transformers import CLIPTokenizer

import rftcore
from benchmarks.harness import Case, compare, report, table
from benchmarks.memory import saved_bytes
from rftcore.digits.architecture import build_text_encoder

try:
    from trl import AlignPropConfig, AlignPropTrainer, DDPOConfig, DDPOTrainer, DefaultDDPOStableDiffusionPipeline

    NO_TRL = None
except (ImportError, RuntimeError) as error:  # RuntimeError is TRL's for a module of its own that does not import
    NO_TRL = str(error)

Line = Callable[[UNet2DConditionModel], object]
STOCK = "stock"
LINES: dict[str, Line] = {
    STOCK: lambda unet: None,
    "unet.enable_gradient_checkpointing()": lambda unet: unet.enable_gradient_checkpointing(),
    "rftcore.accelerate(unet)": lambda unet: rftcore.accelerate(unet),
    'rftcore.accelerate(unet, recompute="block")': lambda unet: rftcore.accelerate(unet, recompute="block"),
}
PROMPTS = ["a hand written seven", "a three", "a thin zero", "a bold four"]
LATENT_SIZE, LATENT_SIZE_FP64 = 24, 8


def save_pipeline(folder: Path, latent_size: int) -> Path:
    """Saves Stable Diffusion 1 in the small, untrained, in which the UNet's activations outweigh everything else."""
    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(f"{rftcore.digits.path()}/tokenizer", model_max_length=77)
    text_encoder = build_text_encoder(tokenizer)
    unet = UNet2DConditionModel(
        sample_size=latent_size,
        block_out_channels=(64, 128, 128),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=text_encoder.config.hidden_size,
        attention_head_dim=4,
    )
    vae = AutoencoderKL(
        block_out_channels=(16, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=8,
        sample_size=2 * latent_size,
    )
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
        clip_sample=False, set_alpha_to_one=False, steps_offset=1,
    )  # fmt: skip
    pipe = StableDiffusionPipeline(vae, text_encoder, tokenizer, unet, scheduler, None, None, None, False)
    pipe.save_pretrained(folder)
    return folder


class Program:
    """Somebody's training code, with one line for the UNet.

    Args:
        folder: of a saved pipeline.
        line: the added line.
        first: the line comes before adapter, optimizer and trainer are made, not after.
        dtype: of everything.
    """

    name: str
    pipe: StableDiffusionPipeline  # made by `load`

    def __init__(self, folder: Path, line: Line, *, first: bool = False, dtype: torch.dtype = torch.float32) -> None:
        self.losses: list[float] = []
        self._steps = 0
        self._call: tuple[Any, Any] = ((), {})
        self.device = accelerate.PartialState().device
        self.load(folder)
        if first:
            line(self.pipe.unet)
        self.set_up()
        self.pipe.set_progress_bar_config(disable=True)
        self.to(dtype)
        if not first:
            line(self.pipe.unet)
        self.pipe.unet.register_forward_pre_hook(self._remember, with_kwargs=True)

    def load(self, folder: Path) -> None:
        raise NotImplementedError

    def set_up(self) -> None:
        raise NotImplementedError

    def to(self, dtype: torch.dtype) -> None:
        for module in (self.pipe.unet, self.pipe.vae, self.pipe.text_encoder):
            module.to(dtype)

    def train(self) -> None:
        raise NotImplementedError

    def step(self) -> None:
        """One step of training, from a seed of its own: programs can take turns."""
        set_seed(self._steps)
        self.train()
        self._steps += 1

    def saved_mib(self) -> float:
        """What autograd saves for one call of the UNet as this program trains it."""
        args, kwargs = self._call
        with saved_bytes(self.pipe.unet.parameters()) as saved:
            self.pipe.unet(*args, **kwargs)
        return saved["bytes"] / 2**20

    def _remember(self, unet, args, kwargs) -> None:
        if torch.is_grad_enabled():
            self._call = args, kwargs


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
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.losses.append(loss.item())


class Trl(Program):
    """A trainer of TRL 0.23.1, with the LoRA and the pipeline that TRL makes.

    It runs on today's diffusers, transformers, peft and accelerate as it is, once `accelerate.PartialState()` has been
    called, for TRL's logger. Its default precision is fp16: `mixed_precision="no"` is fp32, and fp64 comes after.
    """

    def load(self, folder: Path) -> None:
        self.trl_pipe = DefaultDDPOStableDiffusionPipeline(str(folder))
        self.pipe = self.trl_pipe.sd_pipeline

    def set_up(self) -> None:
        self.trainer = self.make_trainer()
        calculate_loss = self.trainer.calculate_loss

        def recorded(*args):
            result = calculate_loss(*args)
            loss = result if isinstance(result, Tensor) else result[0]
            self.losses.append(loss.item())
            return result

        self.trainer.calculate_loss = recorded

    def make_trainer(self) -> Any:
        raise NotImplementedError

    def to(self, dtype: torch.dtype) -> None:
        super().to(dtype)
        self.trainer.neg_prompt_embed = self.trainer.neg_prompt_embed.to(dtype)

    def train(self) -> None:
        self.trainer.train(epochs=1)

    @staticmethod
    def prompt() -> tuple[str, dict]:
        return PROMPTS[int(torch.randint(len(PROMPTS), ()))], {}

    @staticmethod
    def redness(images, prompts, metadata) -> tuple[Tensor, dict]:
        red, green, blue = images.unbind(1)
        return 10 * (red - (green + blue) / 2).mean((1, 2)), {}


class Ddpo(Trl):
    name = "TRL, DDPOTrainer"

    def make_trainer(self) -> DDPOTrainer:
        config = DDPOConfig(
            mixed_precision="no", sample_num_steps=2, sample_batch_size=4, sample_num_batches_per_epoch=1,
            train_batch_size=2, train_learning_rate=1e-3,
        )  # fmt: skip
        return DDPOTrainer(config, self.redness, self.prompt, self.trl_pipe)


class AlignProp(Trl):
    """Keeps a checkpoint around every call of the UNet, as TRL does."""

    name = "TRL, AlignPropTrainer"

    def make_trainer(self) -> AlignPropTrainer:
        config = AlignPropConfig(
            mixed_precision="no", sample_num_steps=4, train_batch_size=2, train_gradient_accumulation_steps=1,
            truncated_backprop_rand=False, truncated_backprop_timestep=2, train_learning_rate=1e-3,
        )  # fmt: skip
        return AlignPropTrainer(config, lambda *args: self.redness(*args)[0], self.prompt, self.trl_pipe)


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
    warnings.simplefilter("ignore")
    logging.getLogger("trl").setLevel(logging.ERROR)
    for library in (diffusers.utils.logging, transformers.utils.logging):
        library.set_verbosity_error()
        library.disable_progress_bar()

    rows, losses = [], {}
    with tempfile.TemporaryDirectory() as folder:
        large = save_pipeline(Path(folder, "large"), LATENT_SIZE)
        small = save_pipeline(Path(folder, "small"), LATENT_SIZE_FP64)
        for program in (Diffusers,) if NO_TRL else (Diffusers, Ddpo, AlignProp):
            more, losses[program.name] = rows_of(program, large, small, arguments.repeats)
            rows += more
    if NO_TRL:
        print(table(rows))
        print(f"No rows of TRL: {NO_TRL}. See the top of this file for how to install it. Nothing was written.")
    else:
        report("drop_in", rows, {**vars(arguments), "trl": version("trl"), "losses": losses})


if __name__ == "__main__":
    main()

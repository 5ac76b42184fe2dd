"""Other people's training code, small enough for a benchmark: TRL's trainers on a small Stable Diffusion.

pip install -c constraints.txt pandas && pip install --no-deps trl==0.23.1    # the last TRL with these two trainers

Or leave the environment as it is: `pip install --target FOLDER ...` in place of `pip install ...`, and
PYTHONPATH=FOLDER. Without TRL, `NO_TRL` says why its classes are missing.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import diffusers
import torch
import transformers
from accelerate.utils import set_seed
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTokenizer

import rftcore
from benchmarks.memory import PeakBytes, saved_bytes
from rftcore.digits.architecture import build_text_encoder

try:
    from trl import AlignPropConfig, AlignPropTrainer, DDPOConfig, DDPOTrainer, DefaultDDPOStableDiffusionPipeline

    NO_TRL = None
except (ImportError, RuntimeError) as error:  # RuntimeError is TRL's for a module of its own that does not import
    NO_TRL = str(error)

Line = Callable[[UNet2DConditionModel], object]
PROMPTS = ["a hand written seven", "a three", "a thin zero", "a bold four"]
LATENT_SIZE, LATENT_SIZE_FP64 = 24, 8


def quiet() -> None:
    """Leaves the screen to the benchmark."""
    warnings.simplefilter("ignore")
    logging.getLogger("trl").setLevel(logging.ERROR)
    for library in (diffusers.utils.logging, transformers.utils.logging):
        library.set_verbosity_error()
        library.disable_progress_bar()


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


def redness(images: Tensor) -> Tensor:
    """(B,) reward points of images (B, 3, H, W)."""
    red, green, blue = images.unbind(1)
    return 10 * (red - (green + blue) / 2).mean((1, 2))


def exact_tables(scheduler: DDIMScheduler) -> None:
    """The same table in fp64: a step forms its coefficients in the table's dtype."""
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    scheduler.final_alpha_cumprod = scheduler.final_alpha_cumprod.double()


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
        self.counter: PeakBytes | None = None  # of the step that `held_mib` counts
        self._held = 0
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
        if dtype is torch.float64:
            exact_tables(self.pipe.scheduler)

    def train(self) -> None:
        raise NotImplementedError

    def step(self) -> None:
        """One step of training, from a seed of its own: programs can take turns."""
        set_seed(self._steps)
        self.train()
        self._steps += 1

    def record(self, loss: Tensor) -> None:
        """Takes note of a loss, between its forward and its backward pass."""
        self.losses.append(loss.item())
        if self.counter is not None:
            self._held = max(self._held, self.counter.live)

    def held_mib(self) -> float:
        """What one more step has made and still holds where a loss is formed: trajectories, and what autograd keeps."""
        with PeakBytes() as self.counter:
            self.step()
        self.counter = None
        return self._held / 2**20

    def saved_mib(self) -> float:
        """What autograd saves for one call of the UNet as this program trains it."""
        args, kwargs = self._call
        with saved_bytes(self.pipe.unet.parameters()) as saved:
            self.pipe.unet(*args, **kwargs)
        return saved["bytes"] / 2**20

    def _remember(self, unet, args, kwargs) -> None:
        if torch.is_grad_enabled():
            self._call = args, kwargs


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
        self.optimizer = self.trainer.optimizer.optimizer
        calculate_loss = self.trainer.calculate_loss

        def recorded(*args):
            result = calculate_loss(*args)
            loss = result if isinstance(result, Tensor) else result[0]
            self.record(loss)
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
        return redness(images), {}


class Ddpo(Trl):
    name = "TRL, DDPOTrainer"

    @staticmethod
    def config() -> DDPOConfig:
        return DDPOConfig(
            mixed_precision="no", sample_num_steps=2, sample_batch_size=4, sample_num_batches_per_epoch=1,
            train_batch_size=2, train_learning_rate=1e-3,
        )  # fmt: skip

    def make_trainer(self) -> DDPOTrainer:
        return DDPOTrainer(self.config(), self.redness, self.prompt, self.trl_pipe)


class AlignProp(Trl):
    """Keeps a checkpoint around every call of the UNet, as TRL does."""

    name = "TRL, AlignPropTrainer"

    def make_trainer(self) -> AlignPropTrainer:
        config = AlignPropConfig(
            mixed_precision="no", sample_num_steps=4, train_batch_size=2, train_gradient_accumulation_steps=1,
            truncated_backprop_rand=False, truncated_backprop_timestep=2, train_learning_rate=1e-3,
        )  # fmt: skip
        return AlignPropTrainer(config, self.redness, self.prompt, self.trl_pipe)

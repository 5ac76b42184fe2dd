"""What `rftcore sample` can be told. Imports no torch, so that `--help` is instant."""

from __future__ import annotations

import dataclasses
import math
import typing
from dataclasses import dataclass

from jsonargparse import ArgumentParser

from rftcore.errors import UsageError, nearest
from rftcore.training.config import option
from rftcore.training.schedulers import SCHEDULERS

DTYPES = ("fp32", "bf16", "fp16")
# Of an interpolation, where the user names no points: the share of the second LoRA.
INTERPOLATION = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass
class SampleOptions:
    """Sample images from prompts, with LoRAs, at inference speed."""

    output_dir: str | None = option(None, "folder for the images, a grid and metadata.json; empty or not there yet")
    model: str = option(
        "rftcore.digits",
        "a Stable Diffusion 1.x, 2.x or XL or an unconditional DDPM pipeline: hub name, folder, checkpoint file, or "
        "rftcore.digits (ships with the package)",
    )
    revision: str | None = option(None, "revision on the hub")
    variant: str | None = option(None, "weight file variant, e.g. fp16")
    original_config: str | None = option(None, "of a checkpoint file: the pipeline whose configs it is built with")
    vae: str | None = option(None, "another VAE: hub name, folder or file; none: the model's own")
    lora: list[str] | None = option(
        None, "LoRAs: .safetensors files or folders in diffusers', PEFT's or kohya's layout, each with :scale"
    )
    lora_scales: list[float] | None = option(
        None, "a grid with a column for each of these: every LoRA's own scale times it, the noise the same"
    )
    interpolate: bool = option(
        False,
        "the grid's columns go from the first of two LoRAs to the second, their scales times 1 - s and s for each s of "
        f"lora_scales, none: {' '.join(f'{share:g}' for share in INTERPOLATION)}",
    )
    merge_lora: bool = option(
        False, "merge the LoRAs into the UNet's weights for each batch: faster, equal to rounding"
    )
    prompt: list[str] | None = option(None, "prompts, each in quotation marks")
    prompts: str | None = option(None, "prompts: a .txt (one a line, # comments) or .jsonl (key prompt) file")
    negative_prompt: str | None = option(
        None, "prompt of the negative branch; none or empty: the model's own empty one"
    )
    clip_skip: int | None = option(None, "layers left out at the text encoders' ends, as diffusers counts them")
    images_per_prompt: int = option(1, "images for each prompt, each from noise of its own")
    seed: int = option(0, "of the noise; an image's is the same whatever the batch size and the other prompts' number")
    scheduler: str | None = option(None, f"{', '.join(SCHEDULERS)}; none: the pipeline's own")
    num_inference_steps: int = option(50, "sampling steps")
    guidance_scale: float | None = option(
        None, "classifier-free guidance; 1.0 runs no negative branch; none: 7.5, or 1.0 where the model takes no prompt"
    )
    eta: float | None = option(None, "DDIM's noise level, 0 to 1; none: 0")
    resolution: int | None = option(None, "image side in pixels; none: the model's own")
    batch_size: int = option(4, "images sampled at once: more need more memory")
    dtype: str = option("fp32", f"of the weights: {', '.join(DTYPES)}")

    @property
    def columns(self) -> bool:
        """Whether the LoRAs' scales vary."""
        return self.interpolate or self.lora_scales is not None

    def validate(self) -> None:
        """Raises UsageError with every problem found, not only the first."""
        found = self.problems()
        if found:
            raise UsageError("; ".join(found))

    def problems(self) -> list[str]:
        """Every value that cannot work, as a sentence that names it, what it is and what is allowed."""
        found = []
        if not self.output_dir or not self.output_dir.strip():
            found.append("--output_dir is missing; give the folder that the images go into")
        if self.prompt is not None and self.prompts is not None:
            found.append("--prompt and --prompts are both given; write all prompts into the file, or leave it out")
        if self.scheduler is not None and self.scheduler not in SCHEDULERS:
            found.append(f"--scheduler {self.scheduler} is unknown; {nearest(self.scheduler, SCHEDULERS)}")
        if self.dtype not in DTYPES:
            found.append(f"--dtype {self.dtype} is unknown; {nearest(self.dtype, DTYPES)}")
        if self.merge_lora and not self.lora:
            found.append("--merge_lora has nothing to merge; give --lora")
        if self.lora_scales is not None and not self.lora:
            found.append("--lora_scales has nothing to scale; give --lora")
        if not all(map(math.isfinite, self.lora_scales or ())):
            found.append(f"--lora_scales {self.lora_scales} must be finite numbers")
        if self.interpolate and len(self.lora or ()) != 2:
            found.append(f"--interpolate goes from one LoRA to another, and there are {len(self.lora or ())}; give two")
        for name in ("images_per_prompt", "num_inference_steps", "batch_size", "resolution"):
            value = getattr(self, name)
            if value is not None and value < 1:
                found.append(f"--{name} {value} must be at least 1")
        if self.seed < 0:
            found.append(f"--seed {self.seed} must not be negative")
        if self.guidance_scale is not None and not 1 <= self.guidance_scale < math.inf:
            found.append(f"--guidance_scale {self.guidance_scale} must be a number of at least 1; 1.0 is no guidance")
        if self.eta is not None and not 0 <= self.eta <= 1:
            found.append(f"--eta {self.eta} must lie in [0, 1]")
        return found


def add_options(parser: ArgumentParser) -> None:
    """Adds one flag for each field of SampleOptions."""
    types = typing.get_type_hints(SampleOptions)
    for field in dataclasses.fields(SampleOptions):
        kind = types[field.name]
        settings = {"type": kind}
        if kind in (list[str] | None, list[float] | None):
            # Extends: a flag that is given twice must not lose what it was given first.
            settings = {"type": typing.get_args(typing.get_args(kind)[0])[0], "nargs": "+", "action": "extend"}
        elif kind is bool:
            settings = {"action": "store_true"}
        help_ = field.metadata["help"].replace("%", "%%")
        parser.add_argument(f"--{field.name}", default=field.default, help=help_, **settings)

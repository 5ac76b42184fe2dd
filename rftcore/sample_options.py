"""What `rftcore sample` can be told. Imports no torch, so that `--help` is instant."""

from __future__ import annotations

import dataclasses
import math
import typing
from dataclasses import dataclass

from jsonargparse import ArgumentParser

from rftcore.training.config import option
from rftcore.training.errors import UsageError, nearest

# Of a scheduler's name, the diffusers class and what it is told besides the model's own scheduler config.
SCHEDULERS = {
    "ddim": ("DDIMScheduler", {}),
    "ddpm": ("DDPMScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_ancestral": ("EulerAncestralDiscreteScheduler", {}),
    "dpmsolver++": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),
    "unipc": ("UniPCMultistepScheduler", {}),
}
DTYPES = ("fp32", "bf16", "fp16")


@dataclass
class SampleOptions:
    """Sample images from prompts, with LoRAs, at inference speed."""

    output_dir: str | None = option(None, "folder for the images, a grid and metadata.json; empty or not there yet")
    model: str = option(
        "rftcore.digits",
        "a Stable Diffusion 1.x, 2.x or XL pipeline: hub name, folder, or rftcore.digits (ships with the package)",
    )
    revision: str | None = option(None, "revision on the hub")
    variant: str | None = option(None, "weight file variant, e.g. fp16")
    lora: list[str] | None = option(
        None, "LoRAs in diffusers' layout: .safetensors files or folders that rftcore train wrote, each with :scale"
    )
    merge_lora: bool = option(
        False, "merge the LoRAs into the UNet's weights for each batch: faster, equal to rounding"
    )
    prompt: list[str] | None = option(None, "prompts, each in quotation marks")
    prompts: str | None = option(None, "prompts: a .txt (one a line, # comments) or .jsonl (key prompt) file")
    negative_prompt: str | None = option(None, "prompt of the negative branch; none: the model's own empty one")
    images_per_prompt: int = option(1, "images for each prompt, each from noise of its own")
    seed: int = option(0, "of the noise; an image's is the same whatever the batch size and the other prompts' number")
    scheduler: str | None = option(None, f"{', '.join(SCHEDULERS)}; none: the pipeline's own")
    num_inference_steps: int = option(50, "sampling steps")
    guidance_scale: float = option(7.5, "classifier-free guidance; 1.0 runs no negative branch")
    eta: float | None = option(None, "DDIM's noise level, 0 to 1; none: 0")
    resolution: int | None = option(None, "image side in pixels; none: the model's own")
    batch_size: int = option(4, "images sampled at once: more need more memory")
    dtype: str = option("fp32", f"of the weights: {', '.join(DTYPES)}")

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
        if self.prompt is None and self.prompts is None:
            found.append('there are no prompts; give --prompt "a text" or --prompts file.txt')
        if self.prompt is not None and self.prompts is not None:
            found.append("--prompt and --prompts are both given; write all prompts into the file, or leave it out")
        if self.scheduler is not None and self.scheduler not in SCHEDULERS:
            found.append(f"--scheduler {self.scheduler} is unknown; {nearest(self.scheduler, SCHEDULERS)}")
        if self.dtype not in DTYPES:
            found.append(f"--dtype {self.dtype} is unknown; {nearest(self.dtype, DTYPES)}")
        if self.merge_lora and not self.lora:
            found.append("--merge_lora has nothing to merge; give --lora")
        for name in ("images_per_prompt", "num_inference_steps", "batch_size", "resolution"):
            value = getattr(self, name)
            if value is not None and value < 1:
                found.append(f"--{name} {value} must be at least 1")
        if self.seed < 0:
            found.append(f"--seed {self.seed} must not be negative")
        if not math.isfinite(self.guidance_scale) or self.guidance_scale < 0:
            found.append(f"--guidance_scale {self.guidance_scale} must be a number of at least 0; 1.0 is no guidance")
        if self.eta is not None and not 0 <= self.eta <= 1:
            found.append(f"--eta {self.eta} must lie in [0, 1]")
        return found


def add_options(parser: ArgumentParser) -> None:
    """Adds one flag for each field of SampleOptions."""
    types = typing.get_type_hints(SampleOptions)
    for field in dataclasses.fields(SampleOptions):
        kind = types[field.name]
        settings = {"type": kind}
        if kind == list[str] | None:
            settings = {"type": str, "nargs": "+"}
        elif kind is bool:
            settings = {"action": "store_true"}
        help_ = field.metadata["help"].replace("%", "%%")
        parser.add_argument(f"--{field.name}", default=field.default, help=help_, **settings)

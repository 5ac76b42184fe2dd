"""The yardstick that needs no training: the best of n images of the pretrained model, and what the held-out judge says.

python -m benchmarks.best_of_n --seed 0 --output folder [--<option of the sampling> value ...]
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline

from rftcore import CheckpointedSampler, decode, digits
from rftcore.algorithms.best_of_n import expected_at_best, expected_best
from rftcore.training import load_config
from rftcore.training.batches import generator
from rftcore.training.config import SamplingConfig
from rftcore.training.run_directory import replace_file, to_json

ROW = "best_of_n"
# Images of each held-out prompt; the mean over all choices of n among them is unbiased for any n up to it.
DRAWN = 64
NS = (1, 2, 4, 8, 16, 32, 64)
SHOWN = (4, 16)
_AT_ONCE = 64


def command(seed: int, folder: Path, options: Mapping[str, Any]) -> list[str]:
    """The command line of one seed's figures, written to `folder/results.json`."""
    flags = [f"--{name}={value}" for name, value in options.items()]
    return [sys.executable, "-m", "benchmarks.best_of_n", "--seed", str(seed), "--output", str(folder), *flags]


def figures(r: torch.Tensor, held_out: torch.Tensor) -> list[dict[str, float]]:
    """For each n the expected reward and held-out score of the chosen image, of scores (P, N): means over prompts."""
    return [
        {
            "n": n,
            "reward": statistics.fmean(float(expected_best(row, n)) for row in r),
            "held_out": statistics.fmean(
                float(expected_at_best(row, other, n)) for row, other in zip(r, held_out, strict=True)
            ),
        }
        for n in NS
        if n <= r.shape[1]
    ]


@torch.no_grad()
def scores(sampling: SamplingConfig, seed: int, drawn: int = DRAWN) -> tuple[torch.Tensor, torch.Tensor]:
    """The reward's and the held-out judge's scores (P, drawn) of the pretrained model's images of the held-out prompts."""
    pipe = StableDiffusionPipeline.from_pretrained(digits.path(), safety_checker=None)
    sampler = CheckpointedSampler(
        pipe.unet,
        pipe.scheduler,
        num_inference_steps=sampling.num_inference_steps,
        guidance_scale=sampling.guidance_scale,
        eta=sampling.eta,
        backprop_steps=0,
    )
    prompts = digits.held_out_prompts()
    wanted = [(prompt, number) for prompt in prompts for number in range(drawn)]
    r, held_out = [], []
    for start in range(0, len(wanted), _AT_ONCE):
        names = [prompt for prompt, _ in wanted[start : start + _AT_ONCE]]
        noise = [generator(seed, "best of n", *key) for key in wanted[start : start + _AT_ONCE]]
        embeds = pipe.encode_prompt(names, "cpu", 1, True, negative_prompt=[sampling.negative_prompt] * len(names))
        images = decode(pipe.vae, sampler(*embeds, generator=noise).latents)  # (b, 3, H, W)
        r.append(digits.reward(images, names).double())
        held_out.append(digits.held_out(images, names).double())
    return torch.cat(r).reshape(len(prompts), drawn), torch.cat(held_out).reshape(len(prompts), drawn)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--output", type=Path, required=True)
    options, overrides = parser.parse_known_args()
    started = time.perf_counter()
    config = load_config("draft", "digits_draft", *overrides)
    torch.set_num_threads(config.cpu_threads)
    r, held_out = scores(config.sampling, options.seed)
    content = {"points": figures(r, held_out), "drawn": r.numel(), "seconds": time.perf_counter() - started}
    replace_file(options.output / "results.json", to_json(content))


if __name__ == "__main__":
    main()

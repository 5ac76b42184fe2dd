"""JPEG: how near the codec and the size estimate are to real files, and what fine-tuning for or against size does.

python -m benchmarks.jpeg [--seeds 0 1 2] [--only codec] [--output runs/jpeg]

One run after another, of one thread each. One that is finished is not repeated: the same command, given again, carries
on.
"""

from __future__ import annotations

import argparse
import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.stats import spearmanr

from benchmarks.harness import RESULTS, environment, table
from rftcore.digits import data
from rftcore.rewards.jpeg import Incompressibility
from rftcore.rewards.jpeg_codec import decoded
from rftcore.rewards.jpeg_size import size
from rftcore.training import Trainer, load_config, recipes

NAME = "jpeg"
QUALITIES = (25, 50, 75, 95)
# Which way real files are to go, by the recipe.
WAYS = {
    "digits_draft_jpeg_smaller": -1,
    "digits_draft_jpeg_larger": +1,
    "digits_ddpo_jpeg_smaller": -1,
    "digits_ddpo_jpeg_larger": +1,
}
# Not the recipes' own: they were tuned on seed 100 and on the evaluation noise that they name.
EVALUATION_SEED = 2000
# A change of the mean that noise alone hardly makes, in standard errors.
BEYOND_NOISE = 3


def synthetic_images(count: int, side: int = 64, seed: int = 0) -> torch.Tensor:
    """Images (count, 3, side, side) in [0, 1]: smooth, textured, noisy, mixed in turn, the same for a seed."""
    generator = torch.Generator().manual_seed(seed)
    makers = (_smooth, _textured, _noisy, _mixed)
    return torch.stack([makers[i % len(makers)](side, generator).clamp(0, 1) for i in range(count)])


def _smooth(side: int, generator: torch.Generator, cells: int | None = None) -> torch.Tensor:
    """Random colours on a grid of cells, of 2 to 7 a side where not given, and gradual changes between them."""
    cells = cells or int(torch.randint(2, 8, (1,), generator=generator))
    colours = torch.rand(1, 3, cells, cells, generator=generator)
    return F.interpolate(colours, size=(side, side), mode="bicubic", align_corners=False)[0]


def _textured(side: int, generator: torch.Generator) -> torch.Tensor:
    """Sharp stripes of one direction and width, of a strength and a place of their own in each channel."""
    across, down = (1.5 * torch.rand(2, generator=generator)).tolist()
    place = 2 * torch.pi * torch.rand(3, 1, 1, generator=generator)
    at = torch.arange(side)
    waves = torch.sin(across * at + down * at[:, None] + place)
    return 0.5 + 0.5 * torch.rand(3, 1, 1, generator=generator) * waves.sign()


def _noisy(side: int, generator: torch.Generator) -> torch.Tensor:
    strength = 0.25 * torch.rand(1, generator=generator)
    return 0.25 + 0.5 * _smooth(side, generator) + strength * torch.randn(3, side, side, generator=generator)


def _mixed(side: int, generator: torch.Generator) -> torch.Tensor:
    """Smooth in some regions, of much detail and with grey noise in the others, with sharp borders between."""
    detail = _smooth(side, generator, cells=max(2, side * 3 // 8))
    detail = detail + 0.1 * torch.rand(1, generator=generator) * torch.randn(1, side, side, generator=generator)
    return torch.where(_smooth(side, generator).mean(0) > 0.5, _smooth(side, generator), detail)


def real_files(images: torch.Tensor, quality: int) -> tuple[torch.Tensor, numpy.ndarray]:
    """What PIL makes of images (B, 3, H, W) in [0, 1]: the decoded ones in grey levels, and the files' bytes (B,)."""
    pixels, sizes = [], []
    for image in (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy():
        file = io.BytesIO()
        Image.fromarray(image).save(file, format="JPEG", quality=quality)
        sizes.append(file.tell())
        pixels.append(numpy.array(Image.open(file)))
    return torch.from_numpy(numpy.stack(pixels)).permute(0, 3, 1, 2).float(), numpy.array(sizes)


def codec_row(name: str, images: torch.Tensor, quality: int) -> dict[str, Any]:
    """RMS differences of decoded images in grey levels, and rank correlations with the sizes of files."""
    real, bytes_ = real_files(images, quality)
    errors = {}
    for exact in (True, False):
        errors[exact] = (decoded(images, quality, exact=exact) * 255 - real).square().mean(dim=(1, 2, 3))
    lost = Incompressibility(quality=quality)(images, [""] * len(images))
    return {
        "images": name,
        "number": len(images),
        "quality": quality,
        "RMS": float(errors[True].mean().sqrt()),
        "RMS of the worst image": float(errors[True].max().sqrt()),
        "RMS, smooth": float(errors[False].mean().sqrt()),
        "Spearman of size": _spearman(size(images, quality), bytes_),
        "Spearman of size, smooth": _spearman(size(images, quality, exact=False), bytes_),
        "Spearman of reconstruction": _spearman(lost, bytes_),
    }


def _spearman(estimate: torch.Tensor, bytes_: numpy.ndarray) -> float:
    return float(spearmanr(estimate.numpy(), bytes_).statistic)


def codec_rows() -> list[dict[str, Any]]:
    sets = {"digits": data.load().images, "synthetic": synthetic_images(200)}
    return [codec_row(name, images, quality) for name, images in sets.items() for quality in QUALITIES]


def run(recipe: str, seed: int, folder: Path) -> dict[str, Any]:
    """The figures of one run of one thread, or of the one that is there."""
    folder = folder / recipe / str(seed)
    if (folder / "results.json").is_file():
        return json.loads((folder / "results.json").read_text())
    # What a run left that was stopped.
    shutil.rmtree(folder, ignore_errors=True)
    overrides = {"seed": seed, "eval.seed": EVALUATION_SEED, "output_dir": folder}
    flags = [f"--{name}={value}" for name, value in overrides.items()]
    return Trainer(load_config(recipes.algorithm(recipe), recipe, *flags)).train()


def run_row(recipe: str, seed: int, figures: dict[str, Any]) -> dict[str, Any]:
    """Real files' kilobytes at quality 95 before and after, on validation prompts and the same noise."""
    judged = figures["rewards"]
    name = next(name for name in judged if name.startswith("file_size_"))
    # As a reward, the size of small files is counted below zero.
    sign = -1 if name == "file_size_compressibility" else 1
    other = next(reward for reward in judged if reward.startswith("jpeg_"))
    change = sign * judged[name]["change"]["mean"]
    error = judged[name]["change"]["standard_error"]
    return {
        "recipe": recipe,
        "seed": seed,
        "kB before": sign * judged[name]["before"]["mean"],
        "kB after": sign * judged[name]["after"]["mean"],
        "change": change,
        "standard error": error,
        "right way beyond noise": "yes" if WAYS[recipe] * change > BEYOND_NOISE * error else "no",
        "differentiable measure before": judged[other]["before"]["mean"],
        "differentiable measure after": judged[other]["after"]["mean"],
        "held-out judge before": judged["digits_held_out"]["before"]["mean"],
        "held-out judge after": judged["digits_held_out"]["after"]["mean"],
        "reward queries": figures["reward_queries"],
        "wall-clock s": figures["wall_clock_s"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", choices=["codec"], help="these figures, and no runs; nothing is written")
    parser.add_argument("--output", type=Path, default=Path("runs/jpeg"), help="where the runs are kept")
    options = parser.parse_args()
    torch.set_num_threads(1)
    codec = codec_rows()
    print(table(codec))
    if options.only:
        return
    runs = [(recipe, seed) for seed in options.seeds for recipe in WAYS]
    rows = [run_row(recipe, seed, run(recipe, seed, options.output)) for recipe, seed in runs]
    print(table(rows))
    content = {
        "environment": environment(),
        "settings": {"recipes": list(WAYS), "seeds": options.seeds, "evaluation_seed": EVALUATION_SEED},
        "rows": rows,
        "codec": codec,
    }
    path = RESULTS / f"{NAME}.json"
    path.write_text(json.dumps(content, indent=2) + "\n")
    print(f"written to {path.relative_to(RESULTS.parent.parent)}")


if __name__ == "__main__":
    main()

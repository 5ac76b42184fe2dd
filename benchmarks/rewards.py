"""Rewards with a model: their values on the published weights, and the time and memory of score and gradient.

`python -m benchmarks.rewards --models DIR` runs each reward whose files DIR holds, and says what to fetch for others.
Each hub repository is a folder of its last name, as `hf download OWNER/NAME --local-dir DIR/NAME` makes it.

    DIR/clip-vit-large-patch14              clip_score, aesthetic
    DIR/ddpo-aesthetic-predictor            aesthetic: its head, or LAION's sac+logos+ava1-l14-linearMSE.pth
    DIR/PickScore_v1                        pickscore
    DIR/HPSv2                               hpsv2, hpsv2_1
    DIR/CLIP-ViT-H-14-laion2B-s32B-b79K     pickscore, hpsv2, hpsv2_1: the tokenizer
    DIR/ImageReward, DIR/bert-base-uncased  imagereward: the latter is the tokenizer
    DIR/owlvit-base-patch32                 owlvit_addition, owlvit_removal
    DIR/resnet-50                           adversarial
    DIR/llava-1.5-7b-hf, DIR/deberta-xlarge-mnli  vlm_alignment

The images are those of `--images FOLDER`, whose prompts are their names ("a_red_car.png": "a red car"), or else four
that are drawn by NumPy, the same everywhere. `--random` takes CLIP ViT-L/14 and ViT-H/14 of random weights instead: its
times and bytes are those of the published ones.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from benchmarks import harness
from benchmarks.memory import PeakBytes
from rftcore import rewards
from rftcore.commands.plan_reward import HUGE, LARGE
from rftcore.rewards import (
    RewardSpecError,
    adversarial,
    aesthetic,
    clip_score,
    hps,
    imagereward,
    owlvit,
    pickscore,
    text_similarity,
    vlm_alignment,
)
from rftcore.rewards.checkpoints import DTYPES
from rftcore.rewards.clip import Clip

# Of each reward, the options that are hub names, and those that are something else.
PLACES: dict[str, dict[str, str]] = {
    "aesthetic": {"model": aesthetic.MODEL, "head": aesthetic.HEAD},
    "clip_score": {"model": clip_score.MODEL},
    "pickscore": {"model": pickscore.MODEL, "tokenizer": pickscore.TOKENIZER},
    "hpsv2": {"model": hps.MODEL, "tokenizer": hps.TOKENIZER},
    "hpsv2_1": {"model": hps.MODEL, "tokenizer": hps.TOKENIZER},
    "imagereward": {"model": imagereward.HUB, "tokenizer": imagereward.TOKENIZER},
    "owlvit_addition": {"model": owlvit.HUB},
    "owlvit_removal": {"model": owlvit.HUB},
    "adversarial": {"model": adversarial.HUB},
    "vlm_alignment": {"model": vlm_alignment.MODEL, "similarity": text_similarity.MODEL},
}
EXTRA: dict[str, dict[str, Any]] = {
    "owlvit_addition": {"queries": "a cat"},
    "owlvit_removal": {"queries": "a cat"},
    # "tabby, tabby cat" of ImageNet.
    "adversarial": {"target": 281},
}
PROMPTS = ("a cat on a chair", "a photo of the sea at night", "a red circle", "noise")
SHAPES = {"ViT-L/14": LARGE, "ViT-H/14": HUGE}


class Judged(NamedTuple):
    """A reward to be measured: its name, itself, whether it has a gradient, and further columns."""

    name: str
    function: Callable[[Tensor, Sequence[str]], Tensor]
    differentiable: bool
    columns: dict[str, Any]


def drawn_images(size: int) -> Iterator[tuple[str, Tensor]]:
    """Four images (3, size, size) of 8 bits, each with a prompt: smooth colours, darker ones, a disc, and noise."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[-1 : 1 : size * 1j, -1 : 1 : size * 1j]
    angles = [rng.uniform(0, 6, 3) for _ in range(3)]
    waves = np.stack([0.5 + 0.5 * np.sin(a * 3 * x + b * 2 * y + c) for a, b, c in angles], -1)
    disc = np.where((x**2 + y**2 < 0.4)[..., None], (0.9, 0.1, 0.1), (0.95, 0.95, 0.9))
    for prompt, image in zip(PROMPTS, (waves, 0.3 * waves**3, disc, rng.random((size, size, 3))), strict=True):
        yield prompt, as_tensor((image * 255).round().astype(np.uint8))


def images_of(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Those of a folder, each with the prompt that its name is."""
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp"):
            yield path.stem.replace("_", " "), as_tensor(np.array(Image.open(path).convert("RGB")))


def as_tensor(image: np.ndarray) -> Tensor:
    return torch.from_numpy(image).permute(2, 0, 1).float() / 255


def published(models: Path, dtype: str, device: str) -> Iterator[Judged | dict[str, str]]:
    """The rewards whose files are there, and rows of those that lack one."""
    for name, places in PLACES.items():
        # Of each hub repository, the folder; never the hub itself, which could be asked for minutes.
        folders = {option: models / hub.rpartition("/")[2] for option, hub in places.items()}
        absent = [places[option] for option, folder in folders.items() if not folder.exists()]
        if absent:
            commands = " and ".join(f"hf download {hub} --local-dir {hub.rpartition('/')[2]}" for hub in absent)
            yield {"reward": name, "skipped": f"not in {models}: {commands}"}
            continue
        options = {option: str(folder) for option, folder in folders.items()} | EXTRA.get(name, {}) | {"dtype": dtype}
        try:
            reward = rewards.load(name, options=options).to(device)
        except RewardSpecError as error:
            yield {"reward": name, "skipped": str(error)}
            continue
        yield Judged(name, reward, reward.differentiable, {"dtype": dtype})


def random_towers(dtype: str, device: str) -> Iterator[Judged]:
    """CLIP's vision towers of the published shapes, checkpointed and not."""
    for name, shape in SHAPES.items():
        config = CLIPVisionConfig(**shape["vision_config"], projection_dim=shape["projection_dim"])
        tower = CLIPVisionModelWithProjection(config).to(device, DTYPES[dtype])
        # The second one wraps the first one's tower, whose layers are then checkpointed.
        for checkpointing in (False, True):
            clip = Clip(tower, checkpointing=checkpointing)
            yield Judged(
                f"random {name}",
                lambda images, prompts, clip=clip: clip.image_features(images).mean(-1),
                True,
                {"dtype": dtype, "checkpointing": checkpointing},
            )


def measured(judged: Judged, pairs: Sequence[tuple[str, Tensor]], device: str, repeats: int) -> dict[str, Any]:
    """One row: values and gradients of each image, and medians of the seconds that one of them takes."""
    values, slopes, forward, backward, peak = [], [], [], [], 0
    for turn in range(1 + repeats):
        for prompt, image in pairs:
            images = image[None].to(device).requires_grad_(judged.differentiable)
            with PeakBytes() if turn == 0 else _nothing() as live:
                start = _now(device)
                value = judged.function(images, [prompt])
                between = _now(device)
                if judged.differentiable:
                    (slope,) = torch.autograd.grad(value.sum(), images)
                end = _now(device)
            # The first turn, in which texts are encoded, counts the bytes.
            if turn == 0:
                values.append(float(value.detach()))
                slopes += [float(slope.norm())] if judged.differentiable else []
                peak = max(peak, live.peak)
            else:
                forward.append(between - start)
                backward.append(end - between)
    row = {"reward": judged.name, **judged.columns, "values": [round(value, 5) for value in values]}
    row |= {"forward_s": float(np.median(forward)), "peak_mib": peak / 2**20}
    if judged.differentiable:
        row |= {"backward_s": float(np.median(backward)), "gradient_norms": [float(f"{slope:.4g}") for slope in slopes]}
    return row


class _nothing:
    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: Any) -> None:
        return None


def _now(device: str) -> float:
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--models", type=Path, help="folder of the published models' folders")
    source.add_argument("--random", action="store_true", help="full-sized towers of random weights")
    parser.add_argument("--images", type=Path, help="folder of images, named by their prompts")
    parser.add_argument("--size", type=int, default=512, help="pixels of the drawn images' sides")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="fp32", help="of the models")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    pairs = list(images_of(options.images) if options.images else drawn_images(options.size))
    if not pairs:
        parser.error(f"--images {options.images} holds no .png, .jpg, .jpeg or .webp")
    if options.random:
        pairs = pairs[:1]
        found = random_towers(options.dtype, options.device)
    else:
        if not options.models.is_dir():
            parser.error(f"--models {options.models} is no folder")
        found = published(options.models, options.dtype, options.device)
    torch.manual_seed(0)
    rows = []
    for judged in found:
        rows.append(measured(judged, pairs, options.device, options.repeats) if isinstance(judged, Judged) else judged)
    settings = {"prompts": [prompt for prompt, _ in pairs], "sizes": [list(image.shape[1:]) for _, image in pairs]}
    harness.report("rewards_random" if options.random else "rewards", rows, settings | {"repeats": options.repeats})


if __name__ == "__main__":
    main()

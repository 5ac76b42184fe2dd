"""Makes the weights that ship with rftcore.digits: ``python -m rftcore.digits.pretrain``.

Trains the autoencoder, the denoiser with its text model, and the two judges, then reloads what it wrote and reports
how well it does. The same seed and number of threads on the same machine and versions give the same bytes.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from transformers import CLIPTokenizer

from rftcore.digits import judges
from rftcore.digits.architecture import build_scheduler
from rftcore.digits.autoencoder_training import fit_vae, reconstruction_psnr
from rftcore.digits.data import Digits, halves, load
from rftcore.digits.diffusion_training import Denoiser, fit_denoiser
from rftcore.digits.evaluation import agreement, sample
from rftcore.digits.judge_training import fit_kernel, fit_reader
from rftcore.digits.prompts import held_out_prompts, label, train_prompts
from rftcore.digits.vocabulary import write_tokenizer

PACKAGE = Path(__file__).parent
Part = TypeVar("Part")


@dataclass(frozen=True)
class Budget:
    """How many optimizer steps each part gets. The defaults take 12 to 20 minutes on one core."""

    autoencoder: int = 1000
    denoiser: int = 2000
    reward: int = 1500


@dataclass(frozen=True)
class Pretrained:
    """Everything that pretraining makes, in fp32."""

    tokenizer: CLIPTokenizer
    vae: AutoencoderKL
    denoiser: Denoiser
    reader: judges.Reader
    kernel: judges.Kernel


def train(digits: Digits, tokenizer: CLIPTokenizer, budget: Budget, seed: int) -> Pretrained:
    """Train every part from random weights; the caller's random state is left as it was."""

    def seeded(fit: Callable[..., Part], *arguments: object) -> Part:
        # Each part starts from the seed afresh: a change to one does not change the others.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return fit(*arguments)

    first, second = halves(digits)
    reader = seeded(fit_reader, first, budget.reward)
    kernel = seeded(fit_kernel, second)
    vae = seeded(fit_vae, digits, budget.autoencoder)
    denoiser = seeded(fit_denoiser, digits, vae, tokenizer, budget.denoiser)
    return Pretrained(tokenizer, vae, denoiser, reader, kernel)


def save(trained: Pretrained, output: Path) -> None:
    """Write ``pipeline/`` and ``judges.safetensors`` into a folder, replacing what is there at the end."""
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output) as scratch:
        folder = Path(scratch) / "pipeline"
        pipeline = StableDiffusionPipeline(
            vae=deepcopy(trained.vae).half(),
            text_encoder=trained.denoiser.text_encoder,
            tokenizer=trained.tokenizer,
            unet=deepcopy(trained.denoiser.unet).half(),
            scheduler=build_scheduler(),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        # The text model stays in fp32: transformers 5 would load it in the precision on disk, unlike diffusers.
        pipeline.save_pretrained(folder)
        _name_as_transformers_4(folder / "text_encoder" / "model.safetensors")
        # transformers 5 would write tokenizer.json, which transformers 4's CLIPTokenizer does not read.
        shutil.rmtree(folder / "tokenizer")
        write_tokenizer(folder / "tokenizer")
        shutil.rmtree(output / "pipeline", ignore_errors=True)
        folder.rename(output / "pipeline")
    parts = {"reward": trained.reader, "held_out": trained.kernel}
    weights = {f"{name}.{key}": value for name, part in parts.items() for key, value in part.state_dict().items()}
    save_file({key: value.half().contiguous() for key, value in weights.items()}, output / judges.WEIGHTS.name)


def _name_as_transformers_4(file: Path) -> None:
    """Give the text model's weights the prefix of transformers 4; 5 drops it on saving and reads both."""
    weights = {f"text_model.{name.removeprefix('text_model.')}": weight for name, weight in load_file(file).items()}
    save_file(weights, file, metadata={"format": "pt"})


def report(trained: Pretrained, digits: Digits, output: Path) -> None:
    """Print what the judges say of each other's half of the data, and of samples from the pipeline on disk."""
    first, second = halves(digits)
    print(f"autoencoder: {reconstruction_psnr(trained.vae, digits.images):.1f} dB")
    print(f"reward judge on the held-out judge's half: {agreement(trained.reader, second.images, second.labels):.1%}")
    print(f"held-out judge on the reward judge's half: {agreement(trained.kernel, first.images, first.labels):.1%}")
    pipeline = StableDiffusionPipeline.from_pretrained(output / "pipeline")
    prompts = 4 * (train_prompts() + held_out_prompts())
    labels = torch.tensor([label(prompt) for prompt in prompts])
    for guidance in (1.0, 2.0, 3.0):
        images = sample(pipeline, prompts, guidance_scale=guidance, steps=20, seed=0)
        shares = [f"{agreement(judge, images, labels):.1%}" for judge in (trained.kernel, trained.reader)]
        print(f"guidance {guidance}, 20 DDIM steps: held-out judge agrees {shares[0]}, reward judge {shares[1]}")
    size = sum(file.stat().st_size for file in [*(output / "pipeline").rglob("*.*"), output / judges.WEIGHTS.name])
    print(f"size on disk: {size / 1e6:.2f} MB")


def main(arguments: list[str] | None = None) -> None:
    """Pretrain from the command line."""
    parser = argparse.ArgumentParser(prog="python -m rftcore.digits.pretrain", description=__doc__.split("\n\n")[1])
    parser.add_argument("--output", type=Path, default=PACKAGE, help="folder to write into (default: the package's)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="changes rounding, so also the bytes (default: 1)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    started = time.perf_counter()
    digits = load()
    with tempfile.TemporaryDirectory() as folder:
        write_tokenizer(Path(folder))
        tokenizer = CLIPTokenizer.from_pretrained(folder)
    trained = train(digits, tokenizer, Budget(), options.seed)
    save(trained, options.output)
    print(f"training: {(time.perf_counter() - started) / 60:.1f} minutes")
    report(trained, digits, options.output)


if __name__ == "__main__":
    main()

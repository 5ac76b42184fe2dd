"""The LoRA adapter: added by PEFT, mastered in fp32, saved in diffusers' layout, proven by reloading."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig as PeftLoraConfig
from peft import get_peft_model_state_dict
from torch import nn

from rftcore.training.batches import derived_seed, generator
from rftcore.training.config import LoraConfig
from rftcore.training.errors import RunError, UsageError

FILE = "pytorch_lora_weights.safetensors"
ADAPTER = "default"


def attach(unet: UNet2DConditionModel, config: LoraConfig, seed: int) -> None:
    """Freezes the UNet and adds a trainable adapter, the same for every process and run of this seed.

    Masters are fp32, or the UNet's dtype where that is wider.
    Raises: UsageError when no module has one of the names.
    """
    unet.requires_grad_(False)
    with torch.random.fork_rng():
        torch.manual_seed(derived_seed(seed, "lora"))
        try:
            unet.add_adapter(
                PeftLoraConfig(
                    r=config.rank,
                    lora_alpha=config.rank if config.alpha is None else config.alpha,
                    target_modules=list(config.target_modules),
                    init_lora_weights=True,
                ),
                adapter_name=ADAPTER,
            )
        except ValueError as error:
            raise UsageError(f"lora.target_modules={config.target_modules}: {error}") from error
    for parameter in trainable(unet).values():
        parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))


def trainable(unet: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are trained, by name."""
    return {name: parameter for name, parameter in unet.named_parameters() if parameter.requires_grad}


def save(unet: UNet2DConditionModel, folder: Path) -> Path:
    """Writes the adapter into `folder` in diffusers' layout, with rank and alpha as metadata, in one replacement."""
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        StableDiffusionPipeline.save_lora_weights(
            temporary,
            unet_lora_layers=get_peft_model_state_dict(unet, adapter_name=ADAPTER),
            unet_lora_adapter_metadata=unet.peft_config[ADAPTER].to_dict(),
        )
        os.replace(Path(temporary, FILE), folder / FILE)
    return folder / FILE


@torch.no_grad()
def verify_reload(unet: UNet2DConditionModel, folder: Path) -> float:
    """Loads the saved adapter into a fresh pipeline as a user would and compares its output with the trained UNet's.

    Returns the difference relative to the adapter's own effect, for one random input.
    Raises: RunError when the reloaded adapter does something else than the trained one.
    """
    fresh = _fresh_pipeline(unet)
    was_training = unet.training
    unet.eval()
    trained, base = _probe(unet), _probe(fresh.unet)
    unet.train(was_training)
    fresh.load_lora_weights(folder)
    reloaded = _probe(fresh.unet)
    effect, difference = torch.linalg.norm(trained - base), torch.linalg.norm(trained - reloaded)
    low_precision = unet.dtype in (torch.bfloat16, torch.float16)
    # The reloaded adapter is rounded to a low-precision UNet's dtype, the trained one is not.
    tolerance = (5e-2 if low_precision else 1e-4) * effect + torch.finfo(unet.dtype).eps * torch.linalg.norm(base) * 8
    if not difference <= tolerance:
        raise RunError(
            f"{folder / FILE} does not reload: its output differs from the trained UNet's by {difference:.3g}, the "
            f"adapter's own effect being {effect:.3g}. The weights are in the checkpoint; please report this"
        )
    return float(difference / effect) if effect > 0 else 0.0


def _fresh_pipeline(unet: UNet2DConditionModel) -> StableDiffusionPipeline:
    base = UNet2DConditionModel.from_config(unet.config).to(unet.device, unet.dtype).eval()
    weights = {
        name.replace(".base_layer.", "."): value for name, value in unet.state_dict().items() if ".lora_" not in name
    }
    base.load_state_dict(weights)
    return StableDiffusionPipeline(
        vae=None,
        text_encoder=None,
        tokenizer=None,
        unet=base,
        scheduler=None,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _probe(unet: UNet2DConditionModel) -> torch.Tensor:
    side = unet.config.sample_size if isinstance(unet.config.sample_size, int) else 64
    source = generator("lora probe")
    sample = torch.randn(1, unet.config.in_channels, side, side, generator=source)
    context = torch.randn(1, 8, unet.config.cross_attention_dim, generator=source)
    like = {"device": unet.device, "dtype": unet.dtype}
    return unet(sample.to(**like), 500, encoder_hidden_states=context.to(**like), return_dict=False)[0].float()

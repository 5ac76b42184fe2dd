"""The untrained parts of the digits pipeline: Stable Diffusion 1 in the small."""

from __future__ import annotations

from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from rftcore.digits.data import RESOLUTION

LATENT_CHANNELS = 4
LATENT_SIZE = 8
_TEXT_WIDTH = 64


def build_vae() -> AutoencoderKL:
    """Build the autoencoder, 0.4 M parameters: (B, 3, 32, 32) in [-1, 1] to latents (B, 4, 8, 8)."""
    return AutoencoderKL(
        block_out_channels=(16, 16, 48),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=RESOLUTION,
        force_upcast=False,
    )


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Build the text model, 0.1 M parameters: token ids (B, 12) to hidden states (B, 12, 64)."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=_TEXT_WIDTH,
        intermediate_size=2 * _TEXT_WIDTH,
        projection_dim=_TEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    text_encoder = CLIPTextModel(config)
    # CLIP's own 0.02 would drown the words in what the random layers add to them, and prompts be learnt late.
    nn.init.normal_(text_encoder.get_input_embeddings().weight)
    return text_encoder


def build_unet() -> UNet2DConditionModel:
    """Build the denoiser, 2.3 M parameters: latents (B, 4, 8, 8) and text (B, 12, 64) to v (B, 4, 8, 8).

    The last block has no attention: at 64 tokens it would cost a fifth of the forward on a CPU.
    """
    return UNet2DConditionModel(
        sample_size=LATENT_SIZE,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=(48, 96),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=_TEXT_WIDTH,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def build_scheduler() -> DDIMScheduler:
    """Build Stable Diffusion's noise schedule, 1,000 training steps, with version 2's prediction of v.

    On 8 x 8 latents group normalisation hides the exact scale of its input, without which epsilon cannot be told in
    the noisiest steps, where the digit is decided; v can.
    """
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        timestep_spacing="leading",
        prediction_type="v_prediction",
    )

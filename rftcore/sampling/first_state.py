"""Where a chain starts: the noise that is given, or drawn."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from rftcore.sampling.denoiser import Denoiser

_Generators = torch.Generator | Sequence[torch.Generator] | None


def first_state(
    denoiser: Denoiser,
    sigma: float,
    latents: Tensor | None,
    sample_size: int | tuple[int, int] | None,
    batch_sizes: dict[str, int | None],
    generator: _Generators,
) -> Tensor:
    """(B, C, h, w) noise of standard deviation sigma, on the UNet's device and in its states' dtype.

    Args:
        latents: (B, C, h, w) noise of unit variance; None draws it.
        sample_size: (h, w) of what is drawn, None for the UNet's own.
        batch_sizes: B, as other arguments say it by their names; None where they do not.
        generator: one, or one a sample; None uses the default one.

    Raises:
        ValueError: when B is not known or not one, or the arguments do not fit the UNet or each other.
    """
    count = _batch_size({**batch_sizes, "latents": None if latents is None else latents.shape[0]})
    if isinstance(generator, Sequence) and len(generator) != count:
        raise ValueError(f"generator is a list of {len(generator)} for {count} samples; give one, or one a sample.")
    channels = denoiser.config.in_channels
    if latents is not None:
        if latents.ndim != 4 or latents.shape[1] != channels:
            raise ValueError(f"latents has shape {tuple(latents.shape)}; the UNet takes (B, {channels}, h, w).")
        if sample_size is not None:
            raise ValueError(f"give latents or sample_size={sample_size}, not both: latents have their own.")
        latents = latents.to(denoiser.device, denoiser.state_dtype)
    else:
        size = sample_size if sample_size is not None else denoiser.config.sample_size
        if size is None:
            raise ValueError("sample_size=None and the UNet's config has none; give the latents' (h, w).")
        height, width = (size, size) if isinstance(size, int) else size
        like = torch.empty((), dtype=denoiser.state_dtype, device=denoiser.device)
        latents = draw((count, channels, height, width), generator, like)
    return latents if sigma == 1.0 else latents * sigma


def draw(shape: Sequence[int], generator: _Generators, like: Tensor) -> Tensor:
    """Noise of unit variance, on the device and in the dtype of `like`."""
    generator = list(generator) if isinstance(generator, Sequence) else generator
    return randn_tensor(tuple(shape), generator=generator, device=like.device, dtype=like.dtype)


def _batch_size(said: dict[str, int | None]) -> int:
    known = {name: size for name, size in said.items() if size is not None}
    if not known:
        raise ValueError("batch_size=None: say how many samples to draw, by batch_size= or latents=.")
    if len(set(known.values())) > 1:
        raise ValueError(f"the batch sizes do not agree: {known}; give one row for each sample.")
    count = next(iter(known.values()))
    if count < 1:
        raise ValueError(f"the batch holds {count} samples; sample at least one.")
    return count

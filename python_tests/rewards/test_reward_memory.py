"""A reward at the end of a decoder, at full size: counted on tensors without data."""

import pytest
import torch
from diffusers import AutoencoderKL
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

import rftcore
from rftcore import published
from rftcore.commands.plan_reward import LARGE
from rftcore.counting import PeakBytes
from rftcore.rewards import declare
from rftcore.rewards.clip import Clip

MOST = 1.3 * 2**30


class AllFinite(TorchDispatchMode):
    """Answers what `score` asks of its values, which have no data."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._local_scalar_dense.default:
            return True
        return function(*args, **(kwargs or {}))


def without_data(module, mode):
    for child in module.modules():
        for tensors in (child._parameters, child._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    with mode:
                        fake = torch.empty(tensor.shape, dtype=tensor.dtype)
                    tensors[name] = nn.Parameter(fake, requires_grad=False) if child._parameters is tensors else fake
    return module.eval()


@pytest.fixture(scope="module")
def tail():
    mode = FakeTensorMode()
    with torch.device("meta"):
        vae = AutoencoderKL.from_config(published.AUTOENCODER).to(torch.bfloat16)
        tower = CLIPVisionModelWithProjection(CLIPVisionConfig(**LARGE["vision_config"], projection_dim=768))
    vae = without_data(vae, mode)
    clip = Clip(without_data(tower, mode))
    return rftcore.accelerate(vae), clip, mode


def counted_peak(tail, batch):
    vae, clip, mode = tail

    @declare(differentiable=True)
    def reward(images, prompts, metadata=None):
        return clip.image_features(images).sum(-1)

    with mode, sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]):
        latents = torch.empty(batch, 4, 64, 64, requires_grad=True)
        with PeakBytes() as live, AllFinite():
            rftcore.score(vae, latents, reward, [""] * batch).sum().backward()
            assert latents.grad.shape == latents.shape
    return live.peak, latents.nbytes


def test_reward_and_decoder_at_512_px(tail):
    """ViT-L/14 in fp32 and SD's VAE in bf16, their weights apart: for one image, and each further one its latents."""
    one, latent = counted_peak(tail, 1)
    two, _ = counted_peak(tail, 2)
    assert one <= MOST
    assert two - one <= 4 * latent

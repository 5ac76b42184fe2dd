"""Tiny CLIP models on disk, and images as PIL has them."""

import json

import numpy as np
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

try:
    from transformers import CLIPImageProcessorPil as ClipProcessor
except ImportError:  # transformers 4
    from transformers import CLIPImageProcessor as ClipProcessor

LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,!'"
BOS, EOS = "<|startoftext|>", "<|endoftext|>"
SIZE, TOKENS = 28, 16


def as_images(array):
    """(1, 3, H, W) in [0, 1] of (H, W, 3) in 8 bits."""
    return torch.from_numpy(np.ascontiguousarray(array)).permute(2, 0, 1)[None].float() / 255


def as_pil(images):
    """Images (B, 3, H, W) in [0, 1] as PIL images of 8 bits."""
    arrays = (images.detach().permute(0, 2, 3, 1) * 255).round().to(torch.uint8).numpy()
    return [Image.fromarray(array) for array in arrays]


def eight_bit_images(count, height, width, seed=0):
    """(count, 3, height, width) of smooth noise on the grey levels of 8 bits."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 5, 5, generator=generator)
    images = torch.nn.functional.interpolate(coarse, size=(height, width), mode="bicubic").clamp(0, 1)
    return (images * 255).round() / 255


def pil_clip_processor(size=224):
    return ClipProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size})


def save_tokenizer(folder):
    """A CLIP tokenizer of single letters; a prompt's last letter has its own token, as in CLIP's vocabulary."""
    tokens = [*LETTERS, *(letter + "</w>" for letter in LETTERS), BOS, EOS]
    (folder / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": TOKENS}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    CLIPTokenizer.from_pretrained(folder).save_pretrained(folder)
    return len(tokens)


def clip_config(vocabulary, *, activation="quick_gelu", projection=24, eos=None):
    """CLIP's shapes in small; `eos` is what its config says the end token is, 2 in the oldest ones."""
    eos = vocabulary - 1 if eos is None else eos
    text = {
        "vocab_size": vocabulary,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": TOKENS,
        "hidden_act": activation,
        "bos_token_id": vocabulary - 2,
        "eos_token_id": eos,
        "pad_token_id": vocabulary - 1,
        "projection_dim": projection,
    }
    vision = {
        "image_size": SIZE,
        "patch_size": 7,
        "hidden_size": 40,
        "intermediate_size": 80,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "hidden_act": activation,
        "projection_dim": projection,
    }
    return CLIPConfig(text_config=text, vision_config=vision, projection_dim=projection)


def smooth_filters(width, generator):
    """(width, 3, 7, 7): planes, not noise."""
    level, down, right = (torch.randn(width, 3, 1, 1, generator=generator) * 0.05 for _ in range(3))
    ramp = torch.linspace(-1, 1, 7)
    return level + down * ramp.view(7, 1) + right * ramp


def save_clip(folder, **options):
    """A CLIP folder: model, tokenizer and processor."""
    folder.mkdir(parents=True, exist_ok=True)
    model = CLIPModel(clip_config(save_tokenizer(folder), **options)).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        # In an order that transformers does not choose.
        for name, parameter in sorted(model.named_parameters()):
            if name != "logit_scale":
                scale = 0.1 if parameter.ndim < 2 or "embedding" in name else 0.6 * parameter[0].numel() ** -0.5
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
            if "norm" in name and name.endswith("weight"):
                parameter.add_(1)
        # As trained filters, these see what is smooth rather than the rounding of single pixels to 8 bits.
        model.vision_model.embeddings.patch_embedding.weight.copy_(smooth_filters(40, generator))
    model.save_pretrained(folder)
    pil_clip_processor(SIZE).save_pretrained(folder)
    return model


def cosines(folder, images, prompts):
    """cos (B,) of images, seen one by one as PIL's, and their prompts, by stock classes; exp(logit_scale)."""
    model = CLIPModel.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer, processor = CLIPTokenizer.from_pretrained(folder), pil_clip_processor(SIZE)
    found = []
    with torch.no_grad():
        for image, prompt in zip(as_pil(images), prompts, strict=True):
            pixels = processor(images=image, return_tensors="pt")["pixel_values"]
            words = tokenizer(prompt, padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt")
            logits = model(**words, pixel_values=pixels).logits_per_image
            found.append(logits[0, 0] / model.logit_scale.exp())
    return torch.stack(found).double(), model.logit_scale.exp().item()


def pixel_gradient(reward, images, prompts):
    """Of the sum of rewards."""
    images = images.clone().requires_grad_()
    return torch.autograd.grad(reward(images, prompts).sum(), images)[0]


def assert_same(found, wanted):
    """But for the order of sums, which depends on where weights lie in memory."""
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))

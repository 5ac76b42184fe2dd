"""HPSv2 and HPSv2.1: CLIP ViT-H/14, trained on which images people prefer."""

from __future__ import annotations

import os.path
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from rftcore.rewards import checkpoints
from rftcore.rewards.clip import Clip, load_clip
from rftcore.rewards.preprocessing import CLIP_MEAN, CLIP_STD, letterbox, normalise
from rftcore.rewards.reward import declare

MODEL = "xswu/HPSv2"
TOKENIZER = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
# Of both of ViT-H/14's towers, which its tensors do not tell.
_HEADS = 16
_LICENCE = "Apache-2.0 (tgxs002/HPSv2)"
# Of open_clip's names, transformers' ones: of a tower, then of its layers.
_VISION = {
    "class_embedding": "embeddings.class_embedding",
    "conv1.weight": "embeddings.patch_embedding.weight",
    "positional_embedding": "embeddings.position_embedding.weight",
    "ln_pre.weight": "pre_layrnorm.weight",
    "ln_pre.bias": "pre_layrnorm.bias",
    "ln_post.weight": "post_layernorm.weight",
    "ln_post.bias": "post_layernorm.bias",
}
_TEXT = {
    "token_embedding.weight": "embeddings.token_embedding.weight",
    "positional_embedding": "embeddings.position_embedding.weight",
    "ln_final.weight": "final_layer_norm.weight",
    "ln_final.bias": "final_layer_norm.bias",
}
_LAYER = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


class _HumanPreference(nn.Module):
    """cos(image, prompt) of one of the versions."""

    name: str
    file: str

    def __init__(
        self,
        model: str = MODEL,
        tokenizer: str | None = TOKENIZER,
        *,
        checkpointing: bool = True,
        dtype: str = "fp32",
        revision: str | None = None,
    ) -> None:
        super().__init__()
        options: dict[str, Any] = {"checkpointing": checkpointing, "dtype": dtype, "revision": revision}
        if os.path.isfile(os.path.join(os.path.expanduser(model), "config.json")):
            self.clip = load_clip(self.name, model, tokenizer=tokenizer, **options)
        else:
            self.clip = self._from_open_clip(model, tokenizer, **options)

    def forward(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[dict] | None = None) -> Tensor:
        """Rewards (B,) of images (B, 3, H, W) in [0, 1]."""
        pixels = normalise(letterbox(images, self.clip.image_size), CLIP_MEAN, CLIP_STD)
        return self.clip.cosines(self.clip.pixel_features(pixels), prompts)

    def _from_open_clip(
        self, model: str, tokenizer: str | None, *, checkpointing: bool, dtype: str, revision: str | None
    ) -> Clip:
        path = checkpoints.file(
            self.name, "model", model, self.file.replace(".pt", ".safetensors"), self.file, revision=revision
        )
        tensors = checkpoints.tensors(path, self.name, "model")
        try:
            found = from_open_clip(tensors, checkpoints.named_dtype(self.name, dtype))
        except (KeyError, RuntimeError) as error:
            raise checkpoints.refuse(self.name, "model", path, f"it is no open_clip ViT-H-14: {error}") from error
        words = checkpoints.load(CLIPTokenizer, self.name, "tokenizer", path.parent if tokenizer is None else tokenizer)
        return Clip(found, words, checkpointing=checkpointing)


@declare(
    differentiable=True,
    unit="cos",
    range=(0.2, 0.4),
    downloads=(f"{MODEL} (HPS_v2_compressed.pt, up to 4 GB)", f"{TOKENIZER} (the tokenizer alone, about 3 MB)"),
    licence=_LICENCE,
)
class HPSv2(_HumanPreference):
    """How people would prefer an image for its prompt, by HPSv2: a cosine, .25 to .30 for what is drawn today.

    Its values are not comparable with HPSv2.1's. An image that is no square is seen whole, with black beside it, as by
    its authors' code with a current torchvision.

    Args:
        model: a hub name; HPS_v2_compressed.pt, or a folder with it, also as .safetensors; or a folder of transformers.
        tokenizer: hub name or folder; None: the model's own folder.
        checkpointing: the vision tower's layers are computed again in the backward, which keeps their memory small.
        dtype: of the model, "fp32", "fp16" or "bf16"; the score is fp32.
        revision: of the model's repository.

    Raises: RewardSpecError where one of them does not load.

    Source: Wu et al. 2023 (arXiv:2306.09341), github.com/tgxs002/HPSv2.
    """

    name, file = "hpsv2", "HPS_v2_compressed.pt"


@declare(
    differentiable=True,
    unit="cos",
    range=(0.2, 0.4),
    downloads=(f"{MODEL} (HPS_v2.1_compressed.pt, up to 4 GB)", f"{TOKENIZER} (the tokenizer alone, about 3 MB)"),
    licence=_LICENCE,
)
class HPSv21(_HumanPreference):
    """How people would prefer an image for its prompt, by HPSv2.1, which saw better data: a cosine, .20 to .40.

    Its values are not comparable with HPSv2's. Arguments and errors are those of `HPSv2`; the file is
    HPS_v2.1_compressed.pt.

    Source: github.com/tgxs002/HPSv2, released on 9 February 2024.
    """

    name, file = "hpsv2_1", "HPS_v2.1_compressed.pt"


def from_open_clip(tensors: Mapping[str, Tensor], dtype: torch.dtype = torch.float32) -> CLIPModel:
    """transformers' CLIPModel of an open_clip ViT-H-14's tensors, or of one that differs in widths and depths alone.

    The activation is the exact GELU; of a prompt the end token's output is taken, the first one of the highest id.

    Raises: KeyError where a tensor is missing, RuntimeError where one has another shape.
    """
    tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    converted = {
        "logit_scale": tensors["logit_scale"].reshape(()),
        "visual_projection.weight": tensors["visual.proj"].T.contiguous(),
        "text_projection.weight": tensors["text_projection"].T.contiguous(),
    }
    for ours, theirs, names in (("vision_model.", "visual.", _VISION), ("text_model.", "", _TEXT)):
        for old, new in names.items():
            converted[ours + new] = tensors[theirs + old]
        for layer in range(_depth(tensors, theirs)):
            before, after = f"{theirs}transformer.resblocks.{layer}.", f"{ours}encoder.layers.{layer}."
            for kind in ("weight", "bias"):
                for old, new in _LAYER.items():
                    converted[f"{after}{new}.{kind}"] = tensors[f"{before}{old}.{kind}"]
                for name, part in zip("qkv", tensors[f"{before}attn.in_proj_{kind}"].chunk(3), strict=True):
                    converted[f"{after}self_attn.{name}_proj.{kind}"] = part.clone()
    # Nothing is drawn for weights that are replaced.
    with torch.device("meta"):
        model = CLIPModel(_config(tensors))
    model.load_state_dict(converted, assign=True)
    for embeddings in (model.vision_model.embeddings, model.text_model.embeddings):
        count = embeddings.position_embedding.num_embeddings
        embeddings.register_buffer("position_ids", torch.arange(count).expand((1, -1)), persistent=False)
    return model


def _depth(tensors: Mapping[str, Tensor], tower: str) -> int:
    prefix = f"{tower}transformer.resblocks."
    return len({name[len(prefix) :].partition(".")[0] for name in tensors if name.startswith(prefix)})


def _config(tensors: Mapping[str, Tensor]) -> CLIPConfig:
    vocabulary, text_width = tensors["token_embedding.weight"].shape
    patch = tensors["visual.conv1.weight"].shape[-1]
    patches, width = tensors["visual.positional_embedding"].shape
    shared = {"num_attention_heads": _HEADS, "hidden_act": "gelu", "projection_dim": tensors["visual.proj"].shape[1]}
    text = shared | {
        "vocab_size": vocabulary,
        "hidden_size": text_width,
        "intermediate_size": tensors["transformer.resblocks.0.mlp.c_fc.weight"].shape[0],
        "num_hidden_layers": _depth(tensors, ""),
        "max_position_embeddings": tensors["positional_embedding"].shape[0],
        "bos_token_id": vocabulary - 2,
        "eos_token_id": vocabulary - 1,
        "pad_token_id": 0,
    }
    vision = shared | {
        "image_size": patch * round((patches - 1) ** 0.5),
        "patch_size": patch,
        "hidden_size": width,
        "intermediate_size": tensors["visual.transformer.resblocks.0.mlp.c_fc.weight"].shape[0],
        "num_hidden_layers": _depth(tensors, "visual."),
    }
    return CLIPConfig(text_config=text, vision_config=vision, projection_dim=shared["projection_dim"])

"""The layouts of LoRA files, diffusers', PEFT's and kohya's: from their keys to layers, and back."""

from __future__ import annotations

import functools
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

from rftcore import documents
from rftcore.errors import UsageError
from rftcore.lora import kohya_names
from rftcore.lora.layers import COMPONENTS, Layer, Lora, base, split

# diffusers' place for PEFT's config, in a file's metadata.
CONFIG_KEY = "lora_adapter_metadata"
_PEFT_PREFIX = "base_model.model."
_UNET_PARTS = ("down_blocks", "mid_block", "up_blocks", "conv_in", "conv_out", "time_embedding", "add_embedding")
_TEXT_PARTS = ("text_model", "text_projection", "encoder", "embeddings")
# What else is called a LoRA, by a piece of its keys.
_OTHERS = {
    "dora_scale": "a DoRA",
    "lora_magnitude_vector": "a DoRA",
    "hada_": "a LoHa",
    "lokr_": "a LoKr",
    "lora_mid": "a LoCon in Tucker form",
    "lora_B.bias": "a LoRA with biases",
    "oft_": "an OFT",
    "glora": "a GLoRA",
    "transformer.": "the LoRA of a transformer (SD3, Flux)",
    "lora_unet_double_blocks": "the LoRA of a transformer (Flux)",
}
# Ways of writing a key's end: the pattern, what it says about the layer's name, and the layout that it is of.
_ENDS = (
    (re.compile(r"(?P<name>.+)\.lora_(?P<part>[AB])(\.default)?\.weight"), "", "diffusers"),
    (
        re.compile(r"(?P<name>.+)\.(?P<last>to_q|to_k|to_v|to_out)_lora\.(?P<part>down|up)\.weight"),
        "last",
        "diffusers-old",
    ),
    (re.compile(r"(?P<name>.+)\.lora(_linear_layer)?\.(?P<part>down|up)\.weight"), "", "diffusers-old"),
    (re.compile(r"(?P<name>.+)\.lora_(?P<part>down|up)\.weight"), "", "kohya"),
    (re.compile(r"(?P<name>.+)\.(?P<part>alpha)"), "", ""),
)
_PARTS = {"A": "down", "down": "down", "B": "up", "up": "up", "alpha": "alpha"}
# What a LoRA's matrices may be of: those that arithmetic is served for.
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# Of fp32: what is beyond it no model can hold, and its square no number.
_LARGEST = torch.finfo(torch.float32).max
# Of a layer's name, in letters; a model's have a third of it.
_LONGEST = 300
# In a regular expression.
_REPETITION, _CHOICE, _REPEATED_GROUP = re.compile(r"(?<!\\)[*+{]"), re.compile(r"(?<!\\)[?|]"), re.compile(r"\)[*+?{]")
# The oldest names of a text encoder's projections.
_OLD_TEXT = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}


def read(
    state: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    where: object,
    config: Mapping[str, Any] | None = None,
    component: str | None = None,
) -> Lora:
    """The LoRA that a file's tensors and metadata are.

    Args:
        where: the file, for messages.
        config: what PEFT's adapter_config.json says.
        component: what the LoRA is of, where its keys do not say.

    Raises: UsageError for what is no LoRA, is one of another kind, is incomplete, or has a value that is not finite.
    """
    if not state:
        raise UsageError(f"{where} holds no weights")
    _refuse_others(state, config or {}, where)
    found: dict[str, dict[str, tuple[str, Tensor]]] = {}
    layouts = set()
    for key, value in state.items():
        name, part, layout = _read_key(key, where, config, component)
        layouts.add(layout)
        parts = found.setdefault(name, {})
        if part in parts:
            raise UsageError(f"{where} has {name} twice: {parts[part][0]} and {key}; it was put together of two files")
        parts[part] = (key, value)
    extra = dict(metadata)
    configs = {} if config is None else {split(next(iter(found)))[0]: dict(config)}
    configs |= _split_config(extra.pop(CONFIG_KEY, None), where)
    for component_config in configs.values():
        _refuse_others({}, component_config, where)
    extra.pop("format", None)
    alphas = {component: _Alphas(own) for component, own in configs.items()}
    layers = {name: _layer(name, parts, alphas.get(split(name)[0]), where) for name, parts in found.items()}
    # A layer's own alpha goes before the config's, which would be written on as it is.
    for name, parts in found.items():
        if "alpha" in parts:
            configs.pop(split(name)[0], None)
    layout = next((known for known in ("kohya", "peft", "diffusers-old") if known in layouts), "diffusers")
    return Lora(layers, layout, configs, extra)


def to_diffusers(lora: Lora) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of diffusers' layout, which `load_lora_weights` reads with every layer's alpha."""
    configs = {
        f"{component}.{key}": value for component in lora.components for key, value in config(lora, component).items()
    }
    metadata = {**lora.metadata, CONFIG_KEY: config_text(configs), "format": "pt"}
    return _tensors(lora.layers), metadata


def to_peft(lora: Lora, component: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the config of PEFT's layout, for the LoRA of one component, named as transformers has it here."""
    layers = lora.of(component)
    if component == "text_encoder" and not _has_text_model():
        layers = {name.removeprefix("text_model."): layer for name, layer in layers.items()}
    return _tensors({_PEFT_PREFIX + name: layer for name, layer in layers.items()}), config(lora, component)


def to_kohya(lora: Lora, where: object) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of kohya's layout; an SDXL model's in the names that its UNet has there.

    Raises: UsageError for a layer of which kohya has no name.
    """
    xl, state = base(lora) == "sdxl", dict[str, Tensor]()
    for name, layer in lora.layers.items():
        component, module = split(name)
        try:
            key = kohya_names.to_kohya(component, module, xl)
        except ValueError as error:
            raise UsageError(f"{where} cannot be written in kohya's layout: {error}; --to diffusers serves") from error
        alpha = torch.tensor(layer.alpha, dtype=layer.down.dtype)
        if alpha.item() != layer.alpha:
            alpha = torch.tensor(layer.alpha, dtype=torch.float32)
        if not math.isclose(alpha.item(), layer.alpha, rel_tol=1e-6):
            alpha = torch.tensor(layer.alpha, dtype=torch.float64)
        state |= {f"{key}.lora_down.weight": layer.down, f"{key}.lora_up.weight": layer.up, f"{key}.alpha": alpha}
    return state, {**lora.metadata, "format": "pt"}


def config_text(config: Mapping[str, Any]) -> str:
    """JSON, sorted by the settings' names; their patterns stay in order: PEFT takes the first that matches a layer."""
    return json.dumps(dict(sorted(config.items())), indent=2)


def config(lora: Lora, component: str) -> dict[str, Any]:
    """PEFT's config of a component: the file's own, or made from the layers' ranks and alphas."""
    if component in lora.configs:
        return dict(lora.configs[component])
    # Without "text_model.", which transformers 5 has in no CLIPTextModel: PEFT compares the ends of names.
    layers = {name.removeprefix("text_model."): layer for name, layer in lora.of(component).items()}
    # The longest names first: one that is the end of another would match that, too.
    names = sorted(layers, key=lambda name: (-len(name), name))
    ranks = {name: layers[name].rank for name in names}
    # As integers where they are: that is what most have.
    alphas = {name: _whole(layers[name].alpha) for name in names}
    rank, alpha = _commonest(ranks.values()), _commonest(alphas.values())
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {name: value for name, value in ranks.items() if value != rank},
        "alpha_pattern": {name: value for name, value in alphas.items() if value != alpha},
        "target_modules": sorted(layers),
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
    }


def _whole(alpha: float) -> float:
    return int(alpha) if abs(alpha) < 2**53 and alpha == int(alpha) else alpha


def tells_component(component: str, module: str) -> bool:
    """Whether a key of PEFT's layout says by itself what it is of."""
    return _component(module, None) == component


def _commonest(values: Iterable[float]) -> float:
    """The most frequent value, of several the smallest: not the first, so that the layers' order says nothing."""
    counts = Counter(values)
    return max(sorted(counts), key=counts.__getitem__)


@functools.cache
def _has_text_model() -> bool:
    """Whether a CLIPTextModel has its layers in a module "text_model": in transformers 4 it does, in 5 it is flat."""
    tiny = CLIPTextConfig(
        vocab_size=3,
        hidden_size=1,
        intermediate_size=1,
        num_hidden_layers=1,
        num_attention_heads=1,
        bos_token_id=0,
        eos_token_id=1,
    )
    with torch.device("meta"):
        return hasattr(CLIPTextModel(tiny), "text_model")


def _tensors(layers: Mapping[str, Layer]) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for name, layer in layers.items():
        state |= {f"{name}.lora_A.weight": layer.down, f"{name}.lora_B.weight": layer.up}
    return state


def _refuse_others(state: Mapping[str, Tensor], config: Mapping[str, Any], where: object) -> None:
    for key in state:
        for piece, kind in _OTHERS.items():
            if piece in key:
                raise UsageError(f"{where} is {kind} ({key}), and plain LoRAs are served; train or look for one")
    if config.get("peft_type", "LORA") != "LORA" or config.get("use_dora"):
        kind = "a DoRA" if config.get("use_dora") else f"a {config['peft_type']}"
        raise UsageError(f"{where} is {kind}, by its adapter config, and plain LoRAs are served; train or look for one")


def _read_key(key: str, where: object, config: Mapping[str, Any] | None, component: str | None) -> tuple[str, str, str]:
    """The layer's name, which of its tensors this is, and the layout that the key is of."""
    for pattern, _, layout in _ENDS:  # noqa: B007  # that of the match
        match = pattern.fullmatch(key)
        if match:
            break
    else:
        raise UsageError(
            f"{where}: {key} is no LoRA weight; every key must end as lora_A.weight, lora_up.weight or alpha do"
        )
    name, part = match["name"], _PARTS[match["part"]]
    if len(name) > _LONGEST:
        raise UsageError(
            f"{where}: {key[:80]}... is {len(key)} letters long, and no layer's name is; the file is broken"
        )
    if name.startswith("lora_"):
        try:
            found, module = kohya_names.from_kohya(name)
        except ValueError as error:
            raise UsageError(f"{where}: {key} belongs to no model that is served: {error}") from error
        return f"{found}.{_canonical(found, module)}", part, "kohya"
    if name.startswith(_PEFT_PREFIX):
        layout = "peft"
    name = name.removeprefix(_PEFT_PREFIX).removesuffix(".processor")
    found, module = split(name)
    if found not in COMPONENTS:
        found, module = component or _component(name, config) or "", name
    if not found:
        raise UsageError(
            f"{where}: {key} belongs to no part of a Stable Diffusion pipeline; in diffusers' layout every key begins "
            f"with one of {', '.join(f'{known}.' for known in COMPONENTS)}"
        )
    if "last" in match.re.groupindex:
        last = match["last"]
        module += "." + (_OLD_TEXT[last] if found != "unet" else "to_out.0" if last == "to_out" else last)
    return f"{found}.{_canonical(found, module)}", part, layout


def _component(name: str, config: Mapping[str, Any] | None) -> str | None:
    first = name.partition(".")[0]
    if first in _UNET_PARTS:
        return "unet"
    if first not in _TEXT_PARTS:
        return None
    mapping = (config or {}).get("auto_mapping")
    of = mapping.get("base_model_class") if isinstance(mapping, Mapping) else None
    return "text_encoder_2" if "Projection" in str(of) or first == "text_projection" else "text_encoder"


def _canonical(component: str, module: str) -> str:
    """A text encoder's module as transformers 4 names it."""
    is_bare = component != "unet" and module.startswith(("encoder.", "embeddings."))
    return f"text_model.{module}" if is_bare else module


def _split_config(text: str | None, where: object) -> dict[str, dict[str, Any]]:
    """diffusers' metadata, {"unet.r": 4, ...} -> {"unet": {"r": 4, ...}}."""
    if not text:
        return {}
    try:
        flat = documents.from_json(text)
        configs: dict[str, dict[str, Any]] = {}
        for key, value in flat.items():
            component, name = split(key)
            configs.setdefault(component, {})[name] = value
    except (ValueError, AttributeError) as error:
        raise UsageError(f"{where}: its metadata {CONFIG_KEY} is no JSON object of settings: {error}") from error
    return configs


def _layer(name: str, parts: Mapping[str, tuple[str, Tensor]], alphas: _Alphas | None, where: object) -> Layer:
    missing = [part for part in ("down", "up") if part not in parts]
    if missing:
        raise UsageError(
            f"{where} is incomplete: {next(iter(parts.values()))[0]} is there, and {name} has no {missing[0]} matrix"
        )
    for part, (key, value) in parts.items():
        # An alpha may be a whole number, as diffusers' own converter to kohya's names writes the rank.
        if part == "alpha" and value.numel() != 1:
            raise UsageError(f"{where}: {key} is {tuple(value.shape)}, and an alpha is one number; the file is broken")
        if part != "alpha" and value.dtype not in _DTYPES:
            raise UsageError(
                f"{where}: {key} is of {value.dtype}, and a LoRA's weights are of fp32, bf16 or fp16; convert them, or "
                "look for such a file"
            )
        # Compared in fp64: other kinds of numbers, which an alpha may be of, have no infinity to be asked for.
        if value.is_complex() or not (value.double().abs() <= _LARGEST).all():
            raise UsageError(
                f"{where}: {key} has values that are NaN, infinite or beyond fp32; the file is broken or its training was"
            )
    (down_key, down), (up_key, up) = parts["down"], parts["up"]
    fits = down.ndim in (2, 4) and up.ndim == down.ndim and up.shape[1] == down.shape[0] and up.shape[2:].numel() == 1
    if not (fits and down.numel() and up.numel()):
        raise UsageError(
            f"{where}: {down_key} is {tuple(down.shape)} and {up_key} is {tuple(up.shape)}; (rank, inputs) and "
            "(outputs, rank) are expected, or a convolution's"
        )
    if "alpha" in parts:
        return Layer(down, up, float(parts["alpha"][1].item()))
    try:
        # Without a config it is the rank, as diffusers takes it.
        rank = down.shape[0]
        return Layer(down, up, float(rank) if alphas is None else alphas.of(split(name)[1], rank))
    except (TypeError, ValueError, AttributeError, OverflowError, re.error) as error:
        raise UsageError(
            f"{where}: the adapter config gives {name} no alpha that can be read (lora_alpha or alpha_pattern): {error}"
        ) from error


class _Alphas:
    """The layers' alphas by PEFT's config, as those of one without rslora.

    A pattern is matched as PEFT does, but compiled once: an alpha for each of SDXL's layers took 10 s.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._config = config
        self._patterns: list[tuple[re.Pattern[str], Any]] | None = None

    def of(self, module: str, rank: int) -> float:
        """Raises: TypeError, ValueError, AttributeError, OverflowError or re.error where there is none to be read."""
        if self._patterns is None:
            given = (self._config.get("alpha_pattern") or {}).items()
            self._patterns = [(_compiled(pattern), alpha) for pattern, alpha in given]
        own = (alpha for pattern, alpha in self._patterns if pattern.match(module))
        alpha = float(next(own, self._config.get("lora_alpha", 8)))
        if not abs(alpha) <= _LARGEST:
            raise ValueError(f"{alpha} is no number for it")
        return alpha * math.sqrt(rank) if self._config.get("use_rslora") else alpha


def _compiled(pattern: str) -> re.Pattern[str]:
    """Raises ValueError for an expression that could be matched for hours; PEFT's are names, or parts of them."""
    many = len(_REPETITION.findall(pattern)) > 2 or len(_CHOICE.findall(pattern)) > 4
    if len(pattern) > _LONGEST or many or _REPEATED_GROUP.search(pattern):
        raise ValueError(f"the expression {pattern[:80]!r} repeats too much; write the layers' names")
    return re.compile(rf"(.*\.)?({pattern})$")

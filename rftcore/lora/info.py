"""What a LoRA file is: its layout, base model, ranks, targets, size of its changes, and what its trainer wrote."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rftcore import documents
from rftcore.lora import algebra
from rftcore.lora.layers import Lora, base, block, ending, split

_BASES = {
    "sd1": "Stable Diffusion 1.x",
    "sd2": "Stable Diffusion 2.x",
    "sdxl": "Stable Diffusion XL",
    "pixels": "an unconditional pixel-space model",
    None: "unknown",
}
# What trainers and hubs write, in the order in which it is shown.
_SHOWN = (
    "modelspec.title",
    "modelspec.trigger_phrase",
    "modelspec.architecture",
    "ss_output_name",
    "ss_base_model_version",
    "ss_sd_model_name",
    "ss_network_module",
    "ss_num_train_images",
    "ss_steps",
)
_TAGS = 10


def describe(lora: Lora, path: Path) -> str:
    """The answer of `rftcore lora info`, a line for each thing."""
    layers = lora.layers.values()
    norms = {name: algebra.norm((1.0, layer)) for name, layer in lora.layers.items()}
    lines = {
        "file": str(path),
        "size": f"{_bytes(path) / 2**20:.2f} MiB, {sum(a.down.numel() + a.up.numel() for a in layers):,} parameters",
        "layout": lora.layout,
        "base": f"{_BASES[base(lora)]} (by the layers' names and shapes)",
        "layers": ", ".join(f"{name} {len(lora.of(name))}" for name in lora.components),
        "rank": _counted(layer.rank for layer in layers),
        "alpha": _counted(layer.alpha for layer in layers),
        "scale": _counted(layer.scale for layer in layers),
        "dtype": _counted(str(layer.up.dtype).removeprefix("torch.") for layer in layers),
        "targets": _counted(ending(split(name)[1]) for name in lora.layers),
        "norm": f"{_root(norms.values()):.4g}, the Frobenius norm of all changes at scale 1",
    }
    blocks: dict[str, list[float]] = {}
    for name, norm in norms.items():
        blocks.setdefault(block(name), []).append(norm)
    lines |= {f"  {name}": f"{_root(values):.4g}" for name, values in sorted(blocks.items())}
    lines |= {name: lora.metadata[name] for name in _SHOWN if lora.metadata.get(name)}
    if words := trained_words(lora):
        lines["trained words"] = ", ".join(words)
    width = max(len(name) for name in lines)
    return "\n".join(f"{name:<{width}}  {text}" for name, text in lines.items())


def trained_words(lora: Lora) -> list[str]:
    """The captions' most frequent tags, of which kohya's trainer keeps the counts by folder; none where it did not."""
    try:
        folders = documents.from_json(lora.metadata.get("ss_tag_frequency", "{}"))
        counts: Counter[str] = Counter()
        for tags in folders.values():
            counts.update({tag.strip(): int(count) for tag, count in tags.items()})
    except (ValueError, AttributeError, TypeError, OverflowError):
        return []
    return [tag for tag, _ in counts.most_common(_TAGS)]


def _bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*.safetensors")) if path.is_dir() else path.stat().st_size


def _counted(values: Iterable[Any]) -> str:
    """4 (30 layers), 8 (2)"""
    counts = Counter(values).most_common()
    shown = [f"{value:g}" if isinstance(value, int | float) else value for value, _ in counts]
    return (
        shown[0] if len(counts) == 1 else ", ".join(f"{text} ({n})" for text, (_, n) in zip(shown, counts, strict=True))
    )


def _root(norms: Iterable[float]) -> float:
    return math.sqrt(sum(norm**2 for norm in norms))

"""LoRA as part of the base weights for the length of a chain: the adapted model at the speed of the base model."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import NamedTuple, cast

import torch
from peft.tuners import lora
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from rftcore.blocks import modules
from rftcore.blocks.modules import Unserved
from rftcore.blocks.served import served
from rftcore.ops import Adapter, autocast
from rftcore.ops.compiled import DTYPES

_PLAIN = {lora.Linear: nn.Linear, lora.Conv2d: nn.Conv2d}


class MergedBytes(NamedTuple):
    """What merging takes beyond what is there.

    Attributes:
        kept: bytes of the merged weights, as long as they live.
        transient: bytes of the one wide copy that is worked on at a time.
    """

    kept: int
    transient: int


class _Site(NamedTuple):
    """An adapted layer whose adapters act now, and the name of its base weight."""

    name: str
    layer: BaseTunerLayer
    base: nn.Module
    adapters: tuple[Adapter, ...]

    @property
    def weight(self) -> Tensor:
        # None of those that are served is without a weight.
        return cast(Tensor, self.base._parameters["weight"])

    @property
    def wide_dtype(self) -> torch.dtype:
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        for a, b, _ in self.adapters:
            dtype = torch.promote_types(dtype, torch.promote_types(a.dtype, b.dtype))
        return dtype


@contextlib.contextmanager
def merged(module: nn.Module, scale: float = 1.0) -> Iterator[dict[str, Tensor]]:
    """Runs the block with every LoRA that acts merged into the base weights, and gives these by name.

    The merged weights stand in the module itself, its adapters are off, and it is called as always; afterwards it holds
    the very tensors and switches that it held before. What is no LoRA of its own (disabled adapters, ones that PEFT
    merged, `modules_to_save`, frozen weights without an adapter) stays as it is and is not copied.

    A merged model is the adapted one up to rounding: in bf16 an adapter is rounded with the weight that it is added to.
    A rollout of it has to be scored again by the unmerged path before it is trained on.

    Args:
        module: a UNet with PEFT's adapters, as a chain calls it; not its DDP wrapper.
        scale: of all adapters, besides their own; a UNet call's `cross_attention_kwargs={"scale": ...}`, which acts on
            adapters alone and does nothing in the block.

    Raises:
        ValueError: for adapters that are no addition to a weight (DoRA, other PEFT methods and variants, lora_bias,
            active dropout), for weights that cannot be added to (quantised, shared, offloaded), and under grad mode.
    """
    sites = _sites(module)
    weights = _weights(sites, scale)
    originals = [site.weight for site in sites]
    try:
        for site in sites:
            site.base._parameters["weight"] = cast(nn.Parameter, weights[site.name])
            site.layer._disable_adapters = True
        yield weights
    finally:
        for site, original in zip(sites, originals, strict=True):
            site.base._parameters["weight"] = cast(nn.Parameter, original)
            site.layer._disable_adapters = False


def merged_weights(module: nn.Module, scale: float = 1.0) -> dict[str, Tensor]:
    """W + sum_i scale_i B_i A_i of every layer with an acting LoRA, by the name of W in `module`.

    Computed in fp32 (fp64 where a weight or an adapter is fp64; TF32 products where torch was told to use them),
    whatever autocast says, and rounded once to W's dtype, in W's memory format.

    Args, Raises: as `merged`.
    """
    return _weights(_sites(module), scale)


def merged_bytes(module: nn.Module) -> MergedBytes:
    """What `merged` and `merged_weights` take for this module as it is now.

    Raises: ValueError as `merged`.
    """
    sites = _sites(module)
    wide = [site.weight.numel() * site.wide_dtype.itemsize for site in sites if _is_copied(site)]
    return MergedBytes(sum(site.weight.nbytes for site in sites), max(wide, default=0))


def _weights(sites: list[_Site], scale: float) -> dict[str, Tensor]:
    if torch.is_grad_enabled():
        raise ValueError(
            "merged weights carry no gradient to the adapters: merge under torch.no_grad(), for a chain without a "
            "gradient, and differentiate through the unmerged adapters."
        )
    if not math.isfinite(scale):
        raise ValueError(f"scale={scale} must be a finite number; 1.0 leaves the adapters as they are.")
    return {site.name: _merge(site, scale) for site in sites}


def _merge(site: _Site, scale: float) -> Tensor:
    weight = site.weight
    with autocast.disabled(weight.device):
        wide = weight.to(site.wide_dtype, copy=True, memory_format=torch.contiguous_format)
        rows = wide.view(wide.shape[0], -1)  # (out, in * kernel)
        for a, b, own_scale in site.adapters:
            rows.addmm_(b.to(wide.dtype).flatten(1), a.to(wide.dtype).flatten(1), alpha=own_scale * scale)
        return torch.empty_like(weight).copy_(wide) if _is_copied(site) else wide


def _is_copied(site: _Site) -> bool:
    """Whether the wide copy cannot be the merged weight itself."""
    weight = site.weight
    # Of sizes of 1 too: a convolution reads its memory format off them, which is_contiguous() overlooks.
    contiguous = torch.empty(weight.shape, device="meta").stride()
    return site.wide_dtype != weight.dtype or weight.stride() != contiguous


def _sites(module: nn.Module) -> list[_Site]:
    sites = []
    for name, layer in module.named_modules():
        if not isinstance(layer, BaseTunerLayer):
            continue
        try:
            adapters = _acting(layer)
            if adapters:
                base = layer._modules["base_layer"]
                _check_base(base, layer)
                sites.append(_Site(f"{name}.base_layer.weight", layer, base, adapters))
        except Unserved as reason:
            raise ValueError(
                f"the LoRA of {name!r} cannot be merged: {reason}; sample with the adapters unmerged."
            ) from None
    _check_not_shared(module, sites)
    return sites


def _acting(layer: BaseTunerLayer) -> tuple[Adapter, ...]:
    """What is to be merged into a layer's weight: nothing where its adapters are off or merged already.

    Raises: Unserved.
    """
    plain = _PLAIN.get(type(layer))
    if plain is None:
        if layer.disable_adapters and not layer.merged:
            return ()
        raise Unserved(f"it is a {type(layer).__module__}.{type(layer).__name__}, not LoRA of a Linear or Conv2d")
    adapters = []
    for p, adapter in modules.active_adapters(layer, plain):
        if p > 0:
            raise Unserved(f"its dropout p={p} is active (call .eval())")
        adapters.append(adapter)
    return tuple(adapters)


def _check_base(base: nn.Module, layer: BaseTunerLayer) -> None:
    """Raises: Unserved where adding to the base layer's weight is not what the adapted layer does."""
    # A hook may bring other weights (offloading), a forward of its own may not use this one.
    modules.expect(base, _PLAIN[type(layer)], own=True)
    if "forward" in layer.__dict__ and not served(layer):
        raise Unserved(f"its {type(layer).__name__} has a forward of its own")
    # PEFT's A is a convolution of all channels, neither dilated nor padded but with zeros.
    if isinstance(base, nn.Conv2d):
        if base.groups != 1 or base.dilation != (1, 1) or base.padding_mode != "zeros":
            raise Unserved(
                f"its convolution has groups={base.groups}, dilation={base.dilation}, "
                f"padding_mode={base.padding_mode!r}, which the adapter does not share"
            )
    kind, weight = type(base).__name__, base._parameters.get("weight")
    if weight is None or type(weight) not in modules.TENSORS:
        found = "computed (a parametrization)" if weight is None else f"a {type(weight).__name__}"
        raise Unserved(f"the weight of its {kind} is {found}, not a plain parameter")
    if weight.dtype not in DTYPES or weight.layout != torch.strided:
        raise Unserved(f"the weight of its {kind} is {weight.dtype}, {weight.layout}")


def _check_not_shared(module: nn.Module, sites: list[_Site]) -> None:
    adapted = {id(site.weight): site.name for site in sites}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if adapted.get(id(parameter), name) != name:
            raise ValueError(
                f"the LoRA of {adapted[id(parameter)]!r} cannot be merged: {name!r} is the same weight, which the "
                "adapter does not act on; sample with the adapters unmerged."
            )

"""Operations: a file per op, each with its contract, its plain-PyTorch reference and its backends."""

from rftcore.ops.attention import attention, attention_backward, attention_forward, attention_reference
from rftcore.ops.frozen_conv2d import Geometry, frozen_conv2d, frozen_conv2d_reference
from rftcore.ops.gated_linear import gated_linear, gated_linear_reference
from rftcore.ops.geglu import geglu, geglu_reference
from rftcore.ops.group_norm_silu import group_norm_silu, group_norm_silu_reference
from rftcore.ops.layer_norm import layer_norm, layer_norm_reference
from rftcore.ops.lora_conv2d import lora_conv2d, lora_conv2d_reference
from rftcore.ops.lora_linear import lora_linear, lora_linears, lora_linears_reference
from rftcore.ops.projections import Adapter, Norm, Projection
from rftcore.ops.sampler_step import Coefficient, SamplerStep, sampler_step, sampler_step_reference

__all__ = [
    "Adapter",
    "Coefficient",
    "Geometry",
    "Norm",
    "Projection",
    "SamplerStep",
    "attention",
    "attention_backward",
    "attention_forward",
    "attention_reference",
    "frozen_conv2d",
    "frozen_conv2d_reference",
    "gated_linear",
    "gated_linear_reference",
    "geglu",
    "geglu_reference",
    "group_norm_silu",
    "group_norm_silu_reference",
    "layer_norm",
    "layer_norm_reference",
    "lora_conv2d",
    "lora_conv2d_reference",
    "lora_linear",
    "lora_linears",
    "lora_linears_reference",
    "sampler_step",
    "sampler_step_reference",
]

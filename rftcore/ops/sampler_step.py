"""One step of a diffusion sampler: guidance, prediction, mean, noise, log-probability, divergence, and the backward."""

import math
from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor

from rftcore.ops import backends, compiled


class Coefficient(IntEnum):
    """Columns of `coefficients`: what a scheduler, its prediction type and the guidance scale fold into.

    With x the sample and m the (guided) model output:
    x0 = X0_FROM_SAMPLE x + X0_FROM_OUTPUT m, clamped to +-CLIP (inf: not clamped);
    mean = MEAN_FROM_X0 x0 + MEAN_FROM_SAMPLE x + MEAN_FROM_OUTPUT m; next = mean + SIGMA noise;
    eps = EPS_FROM_OUTPUT m + (a multiple of x), before any clamp; m = negative + GUIDANCE (positive - negative).
    """

    X0_FROM_SAMPLE = 0
    X0_FROM_OUTPUT = 1
    CLIP = 2
    MEAN_FROM_X0 = 3
    MEAN_FROM_SAMPLE = 4
    MEAN_FROM_OUTPUT = 5
    SIGMA = 6
    EPS_FROM_OUTPUT = 7
    GUIDANCE = 8


class SamplerStep(NamedTuple):
    """`next_sample` (B, ...) in the sample's dtype; `log_prob` and `divergence` (B,), nats per element, maths dtype."""

    next_sample: Tensor
    log_prob: Tensor
    divergence: Tensor | None


# Codes shared with csrc/common.
_DIVERGENCES = {None: 0, "exact": 1, "uniform": 2}


def sampler_step(
    sample: Tensor,
    model_output: Tensor,
    coefficients: Tensor,
    *,
    noise: Tensor | None = None,
    next_sample: Tensor | None = None,
    reference_output: Tensor | None = None,
    divergence: str | None = None,
    backend: str = "auto",
) -> SamplerStep:
    """Takes one sampler step (`next_sample` None) or scores one already taken, in one pass over memory.

    Gradients flow to `sample` and `model_output`, exactly, once. The log-probability is taken of the *rounded*
    next sample, so scoring a stored one with the same inputs gives the same bits.

    Args:
        sample: x_t, (B, ...), fp64, fp32, bf16 or fp16.
        model_output: (B, ...), or (2B, ...) with the B negative (unconditional) outputs first: guided.
        coefficients: (9,), (1, 9) or (B, 9), on the sample's device, fp64 where sample or model_output is, else fp32;
            columns: `Coefficient`.
        noise: like `sample`. None: the mean is taken.
        next_sample: like `sample`, the step to score. Returned as it is; no gradient flows to it.
        reference_output: the frozen model's, like `model_output`; needed for a divergence. No gradient flows to it.
        divergence: None; "exact": KL(step || reference step); "uniform": the squared difference of their eps.
        backend: "auto", "cuda", "cpu" or "reference".

    Shapes: log_prob and divergence (B,), means over all other dimensions; 0 where SIGMA is 0 or there is no element.
    Units: nats per element ("uniform": squared eps).
    Raises: ValueError for inputs that do not fit; RuntimeError where `backend` cannot serve them.
    """
    _check(sample, model_output, coefficients, noise, next_sample, reference_output, divergence)
    inputs = (sample, model_output, coefficients, noise, next_sample, reference_output, divergence)
    if OP.choose(backend, sample, model_output) == "reference":
        return sampler_step_reference(*inputs)
    if torch.is_grad_enabled() and (sample.requires_grad or model_output.requires_grad):
        outputs = _Step.apply(*inputs)
    else:
        outputs = _forward(*inputs[:-1], _DIVERGENCES[divergence])
    stepped, log_prob, distance = outputs
    return SamplerStep(
        stepped if next_sample is None else next_sample.detach(), log_prob, None if divergence is None else distance
    )


def sampler_step_reference(
    sample, model_output, coefficients, noise=None, next_sample=None, reference_output=None, divergence=None
) -> SamplerStep:
    """The specification, in plain PyTorch. Arguments as in `sampler_step`, unchecked."""
    dtype = compiled.maths_dtype(sample, model_output)
    batch, elements = sample.shape[0], math.prod(sample.shape[1:])
    x = sample.to(dtype)

    def per_sample(coefficient):
        return coefficients[..., coefficient].reshape(-1)  # (B,) or (1,)

    def column(coefficient):
        return per_sample(coefficient).reshape(-1, *[1] * (sample.dim() - 1))  # (B, 1, ...) or (1, 1, ...)

    def mean_of_elements(values):
        return values.reshape(batch, elements).sum(1) / max(elements, 1)

    def predict(output):
        m = output.to(dtype)
        if m.shape[0] != batch:
            negative, positive = m.chunk(2)
            m = negative + column(Coefficient.GUIDANCE) * (positive - negative)
        x0 = column(Coefficient.X0_FROM_SAMPLE) * x + column(Coefficient.X0_FROM_OUTPUT) * m
        x0 = x0.clamp(-column(Coefficient.CLIP), column(Coefficient.CLIP))
        mean = (
            column(Coefficient.MEAN_FROM_X0) * x0
            + column(Coefficient.MEAN_FROM_SAMPLE) * x
            + column(Coefficient.MEAN_FROM_OUTPUT) * m
        )
        return m, mean

    m, mean = predict(model_output)
    if next_sample is None:
        stepped = mean if noise is None else mean + column(Coefficient.SIGMA) * noise.to(dtype)
        stepped = stepped.to(sample.dtype)
    else:
        stepped = next_sample.detach()

    deterministic = (per_sample(Coefficient.SIGMA) == 0) | (elements == 0)
    # 1 in place of sigma = 0, so that what torch.where leaves out is finite: 0 * inf would be a NaN gradient.
    sigma = torch.where(deterministic, 1, per_sample(Coefficient.SIGMA))
    sigma_column = sigma.reshape(-1, *[1] * (sample.dim() - 1))

    z = (stepped.detach().to(dtype) - mean) / sigma_column
    log_prob = -0.5 * mean_of_elements(z * z) - sigma.log() - 0.5 * math.log(2 * math.pi)
    log_prob = torch.where(deterministic, 0, log_prob)

    if divergence is None:
        return SamplerStep(stepped, log_prob, None)
    reference_m, reference_mean = predict(reference_output.detach())
    if divergence == "exact":
        z = (mean - reference_mean) / sigma_column
        distance = 0.5 * mean_of_elements(z * z)
    else:
        eps = column(Coefficient.EPS_FROM_OUTPUT) * (m - reference_m)
        distance = mean_of_elements(eps * eps)
    return SamplerStep(stepped, log_prob, torch.where(deterministic, 0, distance))


class _Step(torch.autograd.Function):
    """The forward in one launch, its exact backward in another."""

    @staticmethod
    def forward(ctx, sample, model_output, coefficients, noise, next_sample, reference_output, divergence):
        code = _DIVERGENCES[divergence]
        outputs = _forward(sample, model_output, coefficients, noise, next_sample, reference_output, code)
        stepped, _, distance = outputs
        ctx.divergence = divergence
        ctx.sampled = next_sample is None
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(
            sample, model_output, coefficients, stepped if next_sample is None else next_sample, reference_output
        )
        ctx.mark_non_differentiable(
            *([] if ctx.sampled else [stepped]), *([] if divergence is not None else [distance])
        )
        return outputs

    @staticmethod
    def backward(ctx, grad_next, grad_log_prob, grad_divergence):
        needs = ctx.needs_input_grad[:2]
        grads = compiled.backward(
            _StepBackward,
            grad_next if ctx.sampled else None,
            grad_log_prob,
            grad_divergence if ctx.divergence is not None else None,
            *ctx.saved_tensors,
            _DIVERGENCES[ctx.divergence],
            *needs,
        )
        grad_sample, grad_output = (grad if needed else None for grad, needed in zip(grads, needs, strict=True))
        return grad_sample, grad_output, None, None, None, None, None


class _StepBackward(torch.autograd.Function):
    """The backward as a node of its own, so that differentiating it again is an error and not a wrong number."""

    @staticmethod
    def forward(ctx, *inputs):
        return _backward(*inputs)

    @staticmethod
    def backward(ctx, *grads):
        raise compiled.differentiated_twice("sampler_step")


def _forward_outputs(sample, model_output, coefficients, noise, next_sample, reference_output, divergence):
    """Uninitialised results of the op; empty where there is none (`next_sample` given, `divergence` 0)."""
    dtype, batch = compiled.maths_dtype(sample, model_output), sample.shape[0]
    stepped = sample.new_empty(sample.shape if next_sample is None else (0,))
    return stepped, sample.new_empty(batch, dtype=dtype), sample.new_empty(batch if divergence else 0, dtype=dtype)


def _backward_outputs(
    grad_next, grad_log_prob, grad_divergence, sample, model_output, coefficients, stepped, reference_output,
    divergence, needs_sample, needs_output,
):  # fmt: skip
    return (
        sample.new_empty(sample.shape if needs_sample else (0,)),
        model_output.new_empty(model_output.shape if needs_output else (0,)),
    )


def _launch_forward(*inputs):
    outputs = _forward_outputs(*inputs)
    *tensors, divergence = inputs
    _launch("sampler_step_forward", tensors, divergence, inputs=tensors, outputs=outputs)
    return outputs


def _launch_backward(*inputs):
    outputs = _backward_outputs(*inputs)
    grads, tensors, divergence = inputs[:3], inputs[3:8], inputs[8]
    _launch("sampler_step_backward", tensors, divergence, inputs=(*tensors, *grads), outputs=outputs)
    return outputs


def _launch(name, tensors, divergence, inputs, outputs):
    """Calls the compiled function with raw pointers."""
    sample, model_output, coefficients = tensors[:3]
    batch = sample.shape[0]
    # Logical order in memory, whatever the strides: it fixes the order of the sums. Held here until the call returns.
    inputs = [None if t is None else t.contiguous() for t in inputs]
    compiled.launch(
        name, sample.device, compiled.DTYPES[sample.dtype], compiled.DTYPES[model_output.dtype], batch,
        math.prod(sample.shape[1:]), model_output.shape[0] != batch,
        coefficients.dim() == 2 and coefficients.shape[0] != 1, divergence,
        *map(compiled.address, (*inputs, *outputs)),
    )  # fmt: skip


_forward = compiled.define(
    "sampler_step(Tensor sample, Tensor model_output, Tensor coefficients, Tensor? noise, Tensor? next_sample, "
    "Tensor? reference_output, int divergence) -> (Tensor, Tensor, Tensor)",
    _launch_forward, _forward_outputs, ["CPU", "CUDA"],
)  # fmt: skip
_backward = compiled.define(
    "sampler_step_backward(Tensor? grad_next, Tensor? grad_log_prob, Tensor? grad_divergence, Tensor sample, "
    "Tensor model_output, Tensor coefficients, Tensor stepped, Tensor? reference_output, int divergence, "
    "bool needs_sample, bool needs_output) -> (Tensor, Tensor)",
    _launch_backward, _backward_outputs, ["CPU", "CUDA"],
)  # fmt: skip


def _example(device: torch.device | str, dtype: torch.dtype):
    sample = torch.empty(2, 4, 64, 64, device=device, dtype=dtype)
    return sample, torch.empty(4, 4, 64, 64, device=device, dtype=dtype)


OP = backends.register(
    backends.Op(
        "sampler_step",
        {
            "cuda": compiled.reasons("_cuda", "cuda", "sample"),
            "cpu": compiled.reasons("_cpu", "cpu", "sample"),
            "reference": lambda sample, model_output: [],
        },
        _example,
    )
)


def _check(sample, model_output, coefficients, noise, next_sample, reference_output, divergence):
    for name, tensor in (("sample", sample), ("model_output", model_output)):
        compiled.check_tensor("sampler_step", name, tensor)
    if sample.dim() == 0:
        raise ValueError("sampler_step: sample has no dimension; it must be (B, ...). Try sample[None].")
    shape, batch, dtype = sample.shape, sample.shape[0], compiled.maths_dtype(sample, model_output)
    if model_output.shape not in (shape, (2 * batch, *shape[1:])):
        raise ValueError(
            f"sampler_step: model_output is {tuple(model_output.shape)}; for a sample of {tuple(shape)} it must have "
            f"that shape, or for guidance {(2 * batch, *shape[1:])}: torch.cat([negative, positive])."
        )
    if coefficients.shape not in ((9,), (1, 9), (batch, 9)) or coefficients.dtype != dtype:
        raise ValueError(
            f"sampler_step: coefficients are {tuple(coefficients.shape)}, {coefficients.dtype}; for this input they "
            f"must be (9,), (1, 9) or {(batch, 9)}, {dtype}. Columns: rftcore.ops.Coefficient."
        )
    if noise is not None and next_sample is not None:
        raise ValueError(
            "sampler_step: noise and next_sample were both given; give noise to take a step, next_sample to score one."
        )
    for name, tensor in (("noise", noise), ("next_sample", next_sample)):
        if tensor is not None and (tensor.shape != shape or tensor.dtype != sample.dtype):
            raise ValueError(
                f"sampler_step: {name} is {tuple(tensor.shape)}, {tensor.dtype}; it must be like sample: "
                f"{tuple(shape)}, {sample.dtype}."
            )
    if divergence not in _DIVERGENCES:
        raise ValueError(f'sampler_step: divergence={divergence!r} is unknown; choose None, "exact" or "uniform".')
    if (reference_output is None) != (divergence is None):
        missing = "reference_output" if reference_output is None else "divergence"
        raise ValueError(f"sampler_step: {missing} is missing; reference_output and divergence go together.")
    if reference_output is not None and (
        reference_output.shape != model_output.shape or reference_output.dtype != model_output.dtype
    ):
        raise ValueError(
            f"sampler_step: reference_output is {tuple(reference_output.shape)}, {reference_output.dtype}; it must be "
            f"like model_output: {tuple(model_output.shape)}, {model_output.dtype}."
        )
    for name, tensor in (
        ("model_output", model_output), ("coefficients", coefficients), ("noise", noise),
        ("next_sample", next_sample), ("reference_output", reference_output),
    ):  # fmt: skip
        if tensor is not None and tensor.device != sample.device:
            raise ValueError(
                f"sampler_step: {name} is on {tensor.device}, sample on {sample.device}; "
                f"move it: {name}.to(sample.device)."
            )
    for name, tensor in (("coefficients", coefficients), ("noise", noise)):
        if tensor is not None and tensor.requires_grad:
            raise ValueError(
                f"sampler_step: {name} requires a gradient, and gradients flow to sample and model_output only; "
                f"pass {name}.detach()."
            )

"""A sampler step's inputs, and the step by its definition."""

import math

import torch
from torch.distributions import Normal, kl_divergence

from rftcore.ops import Coefficient

C = Coefficient


def make_coefficients(rows, clip=math.inf, dtype=torch.float64):
    """Random rows (None: a single one without a batch dimension) of the size that real schedules have."""
    c = torch.rand(rows or 1, len(C), dtype=dtype) * 0.8 + 0.2
    c[:, C.X0_FROM_OUTPUT] *= -1
    c[:, C.CLIP] = clip
    c[:, C.GUIDANCE] = 3.5
    return c if rows else c[0]


def make_inputs(shape, dtype=torch.float64, output_dtype=None, guided=True, rows=True, clip=math.inf):
    """(sample, model_output, coefficients) with gradients."""
    output_dtype = output_dtype or dtype
    maths = torch.float64 if torch.float64 in (dtype, output_dtype) else torch.float32
    x = torch.randn(shape, dtype=torch.float64).to(dtype)
    m = torch.randn((1 + guided) * shape[0], *shape[1:], dtype=torch.float64).to(output_dtype)
    c = make_coefficients(shape[0] if rows else None, clip, maths)
    return x.requires_grad_(), m.requires_grad_(), c


def truth(x, m, c, noise=None, next_sample=None, reference_output=None, divergence=None):
    """sampler_step sample by sample from its definition, with PyTorch's Normal."""
    batch = x.shape[0]
    results = []
    for i, row in enumerate(c if c.dim() == 2 and len(c) == batch else c.reshape(1, -1).expand(batch, -1)):

        def predict(output, i=i, row=row):
            out = output[i] if len(output) == batch else output[i].lerp(output[batch + i], row[C.GUIDANCE])
            clip = row[C.CLIP].item()
            x0 = (row[C.X0_FROM_SAMPLE] * x[i] + row[C.X0_FROM_OUTPUT] * out).clamp(-clip, clip)
            mean = row[C.MEAN_FROM_X0] * x0 + row[C.MEAN_FROM_SAMPLE] * x[i] + row[C.MEAN_FROM_OUTPUT] * out
            return row[C.EPS_FROM_OUTPUT] * out, mean

        sigma = row[C.SIGMA]
        eps, mean = predict(m)
        stepped = next_sample[i] if next_sample is not None else mean if noise is None else mean + sigma * noise[i]
        log_prob = Normal(mean, sigma).log_prob(stepped.detach()).mean() if sigma > 0 else mean.sum() * 0
        distance = mean.sum() * 0
        if divergence and sigma > 0:
            reference_eps, reference_mean = predict(reference_output.detach())
            if divergence == "exact":
                distance = kl_divergence(Normal(mean, sigma), Normal(reference_mean, sigma)).mean()
            else:
                distance = (eps - reference_eps).square().mean()
        results.append((stepped, log_prob, distance))
    stepped, log_prob, distance = (torch.stack(column) for column in zip(*results, strict=True))
    return stepped, log_prob, distance if divergence else None

"""Best of n: draw n images, keep the one that scores best; the yardstick that needs no training."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def best(scores: Tensor) -> Tensor:
    """argmax_n of each row; a tie goes to the first.

    Shapes: scores (P, n), n draws for each of P prompts; result (P,) indices. Raises: ValueError for another shape, NaN.
    """
    if scores.ndim != 2 or not scores.shape[1]:
        raise ValueError(
            f"scores must have shape (P, n) with n >= 1, not {tuple(scores.shape)}; give n scores a prompt"
        )
    if scores.isnan().any():
        raise ValueError("scores hold NaN, which no score is better than; drop these images or stop")
    return scores.sort(dim=1, descending=True, stable=True).indices[:, 0]


def expected_best(scores: Tensor, n: int) -> Tensor:
    """E[max of n draws], unbiased, from N >= n draws: the mean over all C(N, n) subsets of their best.

    Shapes: scores (N,) of one prompt; scalar result, fp64. Units: the scores'.
    Raises: ValueError for another shape, NaN, or n outside [1, N].
    """
    return expected_at_best(scores, scores, n)


def expected_at_best(scores: Tensor, others: Tensor, n: int) -> Tensor:
    """E[other score of the best of n draws], unbiased, from N >= n draws: what a held-out judge gives the chosen image.

    Sorted upwards, the i-th is the best of C(i-1, n-1) of the C(N, n) subsets:
    w_N = n / N, and w_{i-1} = w_i (1 - (n-1) / (i-1)). Samples that tie are chosen equally often.
    Shapes: scores and others (N,) of one prompt; scalar result, fp64. Units: the others'.
    Raises: as `expected_best`; ValueError for shapes that differ.
    """
    N = len(scores) if scores.ndim else 0
    if scores.ndim != 1 or others.shape != scores.shape or not 1 <= n <= N:
        raise ValueError(
            f"scores and others must have one shape (N,), and n={n} must lie in [1, N], not {tuple(scores.shape)} and "
            f"{tuple(others.shape)}; draw at least n images, or lower n"
        )
    if scores.isnan().any():
        raise ValueError("scores hold NaN, which no score is better than; drop these images or stop")
    order = scores.argsort()
    _, tied, counts = scores[order].unique_consecutive(return_inverse=True, return_counts=True)
    sums = torch.zeros(len(counts), dtype=torch.float64, device=scores.device)
    value = (sums.index_add(0, tied, others[order].double()) / counts)[tied]  # (N,) the mean of those that tie
    i = torch.arange(N, n, -1, dtype=torch.float64, device=scores.device)  # N, ..., n + 1
    log_w = torch.cat([i.new_zeros(1), torch.log1p(-(n - 1) / (i - 1)).cumsum(0)]) + math.log(n / N)  # w_N, ..., w_n
    return (log_w.exp() * value.flip(0)[: N - n + 1]).sum()

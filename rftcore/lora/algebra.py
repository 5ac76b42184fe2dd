"""Norms and products of low-rank matrices, without forming them, in fp64."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rftcore.lora.layers import Layer


def factors(layer: Layer) -> tuple[Tensor, Tensor]:
    """up (outputs, rank) with the layer's scale, and down (rank, inputs x kernel): dW = up @ down. In fp64."""
    return layer.up.double().flatten(1) * layer.scale, layer.down.double().flatten(1)


def stacked(terms: Sequence[tuple[float, Layer]]) -> tuple[Tensor, Tensor]:
    """The factors of the sum of weight * dW."""
    pairs = [factors(layer) for _, layer in terms]
    up = torch.cat([weight * up for (weight, _), (up, _) in zip(terms, pairs, strict=True)], dim=1)
    return up, torch.cat([down for _, down in pairs])


def core(up: Tensor, down: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Q (outputs, k), M (k, l) and P (inputs, l) with up @ down = Q M P^T and orthonormal columns in Q and P."""
    left, r_left = torch.linalg.qr(up)
    right, r_right = torch.linalg.qr(down.T)
    return left, r_left @ r_right.T, right


def norm(*terms: tuple[float, Layer]) -> float:
    """The Frobenius norm of the sum of weight * dW.

    By QR, and not by the factors' products, whose squares would hide a difference of less than 1e-8.
    """
    _, middle, _ = core(*stacked(terms))
    return float(torch.linalg.norm(middle))


def inner(first: Layer, second: Layer) -> float:
    """The sum of the products of two changes' elements."""
    (up_1, down_1), (up_2, down_2) = factors(first), factors(second)
    return float(((up_1.T @ up_2) * (down_1 @ down_2.T)).sum())

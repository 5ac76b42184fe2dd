"""The 1,797 scanned handwritten digits of scikit-learn, as pen strokes on white paper.

Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI (1998), as shipped in
``sklearn.datasets.load_digits``. Needed for pretraining and for tests only, never to use the shipped pipeline.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

RESOLUTION = 32
"""Side of an image in pixels."""

# Ink density at the edge of a stroke, which sets how wide strokes come out, and the steepness of that edge.
_THRESHOLD = 0.6
_CONTRAST = 8.0


@dataclass(frozen=True)
class Digits:
    """Images and what is known of them.

    *Shapes* ``images`` (N, 3, 32, 32) in [0, 1], black ink on white; ``labels`` (N,) in 0 to 9; ``weight`` (N,):
    -1 thin, 0 regular, +1 bold.
    """

    images: torch.Tensor
    labels: torch.Tensor
    weight: torch.Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: torch.Tensor) -> Digits:
        return Digits(self.images[index], self.labels[index], self.weight[index])


def load() -> Digits:
    """Load all 1,797 digits in scikit-learn's order.

    *Raises* ``ImportError`` where scikit-learn is missing.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            "the scans of handwritten digits come with scikit-learn, which pretraining needs: "
            'pip install "rftcore[digits]" (the shipped pipeline works without it)'
        ) from error
    scans, targets = load_digits(return_X_y=True)
    ink = torch.from_numpy(scans).float().view(-1, 1, 8, 8) / 16
    labels = torch.from_numpy(targets).long()
    return Digits(strokes(ink), labels, stroke_weight(ink, labels))


def strokes(ink: torch.Tensor) -> torch.Tensor:
    """Turn coarse ink densities into sharp black strokes on white paper.

    *Shapes* (N, 1, 8, 8) in [0, 1], 1 is ink, to (N, 3, 32, 32) in [0, 1], 0 is ink.
    """
    # The scans touch all four edges: a pixel of paper round them lets strokes end in the round.
    framed = F.pad(ink, [1] * 4)
    smooth = F.interpolate(framed, size=(RESOLUTION, RESOLUTION), mode="bicubic", align_corners=False)
    # A logistic curve through (0, 0) and (1, 1): it hardens the edge that upsampling has blurred.
    low, high = torch.sigmoid(_CONTRAST * (torch.tensor([0.0, 1.0]) - _THRESHOLD))
    curve = (torch.sigmoid(_CONTRAST * (smooth - _THRESHOLD)) - low) / (high - low)
    return (1 - curve).clamp(0, 1).expand(-1, 3, -1, -1).contiguous()


def stroke_weight(ink: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Sort every digit's scans by their mass of ink: -1 for the lightest third, +1 for the heaviest, 0 between.

    *Shapes* (N, 1, h, w) and (N,) to (N,).
    """
    mass = ink.flatten(1).sum(dim=1)
    weight = torch.zeros_like(labels)
    for digit in labels.unique():
        members = (labels == digit).nonzero().squeeze(1)
        thin, bold = mass[members].quantile(torch.tensor([1 / 3, 2 / 3]))
        weight[members[mass[members] < thin]] = -1
        weight[members[mass[members] > bold]] = 1
    return weight


def halves(digits: Digits) -> tuple[Digits, Digits]:
    """Split into two disjoint halves with equal shares of every digit: one for each judge.

    Neighbouring scans come from one writer, so each digit's first half, in scikit-learn's order, goes to the first
    half and the rest to the second.
    """
    first = torch.zeros(len(digits), dtype=torch.bool)
    for digit in digits.labels.unique():
        members = (digits.labels == digit).nonzero().squeeze(1)
        first[members[: len(members) // 2]] = True
    return digits[first], digits[~first]

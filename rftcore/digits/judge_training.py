"""Fits the two judges, each to its own half of the data."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from tqdm.auto import tqdm

from rftcore.digits import augment
from rftcore.digits.data import Digits
from rftcore.digits.judges import Kernel, Reader, coarsen, ink_of

_BATCH = 64
_LEARNING_RATE = 2e-3
# Keeps the log-probability of a good image away from 0, where it would have no gradient.
_LABEL_SMOOTHING = 0.1
_GAMMA = 1.0
_RIDGE = 0.1


def fit_reader(digits: Digits, steps: int) -> Reader:
    """Train the reward's network on warped, blurred, faded and speckled digits."""
    reader = Reader().train()
    optimizer = torch.optim.AdamW(reader.parameters(), lr=_LEARNING_RATE, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _LEARNING_RATE, total_steps=steps)
    for _ in tqdm(range(steps), desc="reward", mininterval=5):
        batch = digits[torch.randint(len(digits), (_BATCH,))]
        images = augment.degrade(augment.warp(batch.images, degrees=12, shift=0.06, scale=0.12))
        loss = F.cross_entropy(reader(ink_of(images)), batch.labels, label_smoothing=_LABEL_SMOOTHING)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return reader.eval()


def fit_kernel(digits: Digits) -> Kernel:
    """Solve kernel ridge regression to +1 for a scan's own digit and -1 for the others, by scikit-learn.

    Every scan counts twice, as it is and warped.
    """
    from sklearn.kernel_ridge import KernelRidge

    warped = augment.warp(digits.images, degrees=8, shift=0.04, scale=0.1)
    support = coarsen(ink_of(torch.cat([digits.images, warped])))
    targets = 2.0 * F.one_hot(digits.labels.repeat(2), 10) - 1
    ridge = KernelRidge(alpha=_RIDGE, kernel="rbf", gamma=_GAMMA)
    ridge.fit(support.double().numpy(), targets.double().numpy())
    return Kernel(support, torch.from_numpy(ridge.dual_coef_).float(), torch.tensor(_GAMMA))

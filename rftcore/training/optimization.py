"""The optimizer, its learning rate, and what fp16's loss scaling does to its steps."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from typing import Any

import torch
from diffusers.optimization import get_scheduler
from torch import nn

from rftcore.errors import RunError, UsageError
from rftcore.training.config import TrainConfig

# bitsandbytes keeps the moments of smaller tensors in 32 bits.
_SMALLEST_IN_8_BIT = 4096
# Halved this often from 2**16, a scale has met nothing but overflows: the gradient itself is inf or NaN.
_LOWEST_SCALE = 2.0**-24


def make_optimizer(
    config: TrainConfig, parameters: Iterable[nn.Parameter], device: torch.device
) -> torch.optim.Optimizer:
    """AdamW, or bitsandbytes' with 8-bit moments.

    Args:
        device: where its steps will be taken.

    Raises: UsageError where bitsandbytes is asked for and is missing, or takes no step on this device.
    """
    parameters = list(parameters)
    options: dict[str, Any] = {
        "lr": config.learning_rate,
        "betas": (config.adam_beta1, config.adam_beta2),
        "weight_decay": config.adam_weight_decay,
        "eps": config.adam_epsilon,
    }
    if not config.use_8bit_adam:
        return torch.optim.AdamW(parameters, **options)
    try:
        kind = importlib.import_module("bitsandbytes").optim.AdamW8bit
    except (ImportError, OSError, RuntimeError) as error:
        raise UsageError(
            f"train.use_8bit_adam=true needs bitsandbytes, which does not import ({error}); pip install bitsandbytes, "
            "or set train.use_8bit_adam=false"
        ) from error
    _check_steps(kind, device, parameters[0].dtype)
    return kind(parameters, **options)


def _check_steps(kind: Callable[..., torch.optim.Optimizer], device: torch.device, dtype: torch.dtype) -> None:
    """Which devices it serves, it says only at its first step."""
    probe = nn.Parameter(torch.zeros(_SMALLEST_IN_8_BIT, device=device, dtype=dtype))
    probe.grad = torch.ones_like(probe)
    try:
        kind([probe]).step()
        moved = bool((probe != 0).all())
    except Exception as error:  # whatever its backends raise
        raise UsageError(_no_steps(device, dtype, str(error))) from error
    if not moved:
        raise UsageError(_no_steps(device, dtype, "a step changed nothing"))


def _no_steps(device: torch.device, dtype: torch.dtype, why: str) -> str:
    return (
        f"train.use_8bit_adam=true: this bitsandbytes takes no step of {dtype} weights on {device.type} ({why}); "
        "pip install -U bitsandbytes, or set train.use_8bit_adam=false"
    )


def make_lr_scheduler(config: TrainConfig, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    """diffusers' schedule, to be stepped once for every optimizer step of the run, those that are skipped among them.

    Not to be prepared by accelerate, which would step it once for every process.

    Raises: UsageError for a learning rate that the schedule cannot start from.
    """
    try:
        return get_scheduler(
            config.lr_scheduler,
            optimizer,
            num_warmup_steps=config.lr_warmup_steps,
            num_training_steps=config.max_train_steps,
            num_cycles=config.lr_num_cycles,
            power=config.lr_power,
        )
    except ValueError as error:
        raise UsageError(
            f"train.lr_scheduler={config.lr_scheduler} cannot start from train.learning_rate={config.learning_rate}: "
            f"{error}"
        ) from error


class LossScaling:
    """What fp16's loss scaling did to an epoch's optimizer steps; without a scaler, nothing.

    A gradient that overflows is expected now and then: the scaler leaves out that step and halves its scale.

    Args:
        optimizer: as accelerate prepared it.
        scaler: accelerate's, or None.
    """

    def __init__(self, optimizer: Any, scaler: Any) -> None:
        self._optimizer, self._scaler = optimizer, scaler
        self._overflows = 0

    def stepped(self) -> bool:
        """After `optimizer.step()`: whether it changed the weights.

        Raises: RunError once the scale is so low that the overflow cannot be its doing.
        """
        if self._scaler is None or not self._optimizer.step_was_skipped:
            return True
        self._overflows += 1
        if self._scaler.get_scale() < _LOWEST_SCALE:
            raise RunError(
                f"the gradient overflows fp16 at a loss scale of {self._scaler.get_scale():g} still: nothing is learnt. "
                "Resume with mixed_precision=bf16 or no, or look for a NaN in the reward's gradient"
            )
        return False

    def take(self) -> dict[str, float]:
        """The scale, and how many steps overflowed since the last `take`."""
        if self._scaler is None:
            return {}
        overflows, self._overflows = self._overflows, 0
        return {"train/loss_scale": float(self._scaler.get_scale()), "train/overflows": overflows}

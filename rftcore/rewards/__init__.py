"""Rewards: functions of images, found by name or dotted path.

A reward is `function(images, prompts, metadata) -> rewards` with images (B, 3, H, W) in [0, 1], prompts a list of B
strings, metadata a list of B dicts or None, and rewards (B,) in reward points. It declares whether its gradient with
respect to the images exists by an attribute `differentiable`; nothing is assumed for one that does not, because a
wrong guess would train nothing, or fail late.

Those of the papers are here, a file each. The ones that need a model are classes: their options are the arguments
they are made with, `to(device)` moves them, and what they load comes from the hub or a local path.
"""

from rftcore.rewards.registry import KNOWN, check_differentiable, load, load_judge
from rftcore.rewards.reward import Reward, RewardSpecError, declare
from rftcore.rewards.weighted_sum import WeightedSum, weighted_sum

__all__ = [
    "KNOWN",
    "Reward",
    "RewardSpecError",
    "WeightedSum",
    "check_differentiable",
    "declare",
    "load",
    "load_judge",
    "weighted_sum",
]

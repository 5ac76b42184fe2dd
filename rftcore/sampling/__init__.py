"""Sampling one can differentiate through: the chain, its scheduler's maths, decoding and scoring."""

from rftcore.sampling.decode import RewardError, decode, score
from rftcore.sampling.gradient_path import GradientPath
from rftcore.sampling.plan import Plan
from rftcore.sampling.sampler import CheckpointedSampler
from rftcore.sampling.trajectory import Trajectory
from rftcore.sampling.transitions import Transitions

__all__ = [
    "CheckpointedSampler",
    "GradientPath",
    "Plan",
    "RewardError",
    "Trajectory",
    "Transitions",
    "decode",
    "score",
]

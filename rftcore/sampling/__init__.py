"""Sampling one can differentiate through: the chain, its scheduler's maths, decoding and scoring."""

from rftcore.sampling.decode import RewardError, decode, score
from rftcore.sampling.gradient_path import GradientPath
from rftcore.sampling.plan import Plan
from rftcore.sampling.sampler import CheckpointedSampler
from rftcore.sampling.trajectory import Trajectory

__all__ = ["CheckpointedSampler", "GradientPath", "Plan", "RewardError", "Trajectory", "decode", "score"]

"""Blocks of diffusers' models, written with ops: an exact backward from a fraction of the bytes."""

from rftcore.blocks.install import Report, accelerate, report, restore
from rftcore.blocks.recomputation import recompute

__all__ = ["Report", "accelerate", "recompute", "report", "restore"]

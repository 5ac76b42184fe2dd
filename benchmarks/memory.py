"""Exact byte counts of what PyTorch keeps, on any device, fake tensors included."""

from rftcore.counting import PeakBytes, saved_bytes

__all__ = ["PeakBytes", "saved_bytes"]

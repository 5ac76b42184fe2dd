"""Measurements against pure PyTorch: memory is counted, time is interleaved."""

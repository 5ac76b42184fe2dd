"""Triton kernels, a file per op. Installed as `rftcore.kernels`; importing this package does nothing."""

"""Ours beside pure PyTorch in one run: methods, works, exact counts, worker processes, and what their rows say."""

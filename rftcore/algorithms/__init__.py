"""The losses: pure tensor functions, each readable next to its paper's equation."""

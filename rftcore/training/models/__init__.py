"""The models that are fine-tuned: which are served, where they come from, and what may be set on them."""

"""LoRA files: read in any of their layouts, mixed, scaled, compared, written, and loaded into a pipeline."""

"""What is raised where prompts cannot be used."""

from __future__ import annotations


class PromptsError(ValueError):
    """Prompts that cannot be found or read, or that are empty."""

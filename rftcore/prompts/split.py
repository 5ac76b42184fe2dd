"""A held-out side of a set of prompts, chosen by rule."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from rftcore.prompts.errors import PromptsError


def split(prompts: Sequence[str], share: float) -> tuple[list[str], list[str]]:
    """Prompts to train on and held-out ones, about `share` of them, each in their order.

    A prompt's side depends on its text alone, so it is the same in every run, machine and order, and stays when others
    are added or taken away: it is held out where the first 8 bytes of its SHA-256 (UTF-8, big-endian) are below
    share * 2^64. A larger share holds out the same prompts and more.

    Raises: PromptsError for a share that is not between 0 and 1, and where one side is empty.
    """
    if not 0 < share < 1:
        raise PromptsError(f"held_out_share={share} must be greater than 0 and below 1")
    sides: tuple[list[str], list[str]] = ([], [])
    for prompt in prompts:
        sides[_place(prompt) < share].append(prompt)
    for side, prompts_of_side in zip(("training", "held-out"), sides, strict=True):
        if not prompts_of_side:
            raise PromptsError(
                f"held_out_share={share} of {len(prompts)} prompts leaves no {side} prompt: which side a prompt is on "
                "is its text's, and nothing moves it; give another share, or more prompts"
            )
    return sides


def _place(prompt: str) -> float:
    return int.from_bytes(hashlib.sha256(prompt.encode("utf-8")).digest()[:8], "big") / 2**64

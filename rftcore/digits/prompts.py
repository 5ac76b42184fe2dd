"""The phrasings that the digits pipeline understands, and which of them reward fine-tuning never sees."""

from __future__ import annotations

import re

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

# Plain phrasings fit every image; the others fit the thinnest or the boldest third of a digit's images.
PLAIN = (
    "a handwritten {word}",
    "the digit {word}",
    "a drawing of the number {numeral}",
    "the number {word}",
    "a scan of the digit {numeral}",
    "a handwritten number {word}",
)
THIN = ("a thin handwritten {word}", "a thin {word}")
BOLD = ("a bold handwritten {word}", "a bold {word}")
PHRASINGS = PLAIN + THIN + BOLD

_DIGITS = {name: digit for digit, word in enumerate(WORDS) for name in (word, str(digit))}
_HELD_OUT_EVERY = 5


def phrase(phrasing: str, digit: int) -> str:
    """Fill one of ``PHRASINGS`` with a digit: ``phrase("a thin {word}", 7) == "a thin seven"``."""
    return phrasing.format(word=WORDS[digit], numeral=digit)


def _is_held_out(index: int, digit: int) -> bool:
    return (index + digit) % _HELD_OUT_EVERY == 0


def _prompts(held_out: bool) -> list[str]:
    return [
        phrase(phrasing, digit)
        for index, phrasing in enumerate(PHRASINGS)
        for digit in range(10)
        if _is_held_out(index, digit) == held_out
    ]


def train_prompts() -> list[str]:
    """Give the 80 prompts for reward fine-tuning: each phrasing with eight digits, each digit in eight phrasings."""
    return _prompts(held_out=False)


def held_out_prompts() -> list[str]:
    """Give the other 20 prompts: each phrasing with the two digits that ``train_prompts`` never pairs it with.

    Every word occurs in both lists and pretraining has seen every pair; only reward fine-tuning has not.
    """
    return _prompts(held_out=True)


def label(prompt: str) -> int:
    """Read the digit, 0 to 9, that a prompt asks for, spelt out or as a numeral.

    *Raises* ``TypeError`` for anything but a string; ``ValueError`` where the prompt names no digit, or several.
    """
    if not isinstance(prompt, str):
        raise TypeError(f"prompt must be a string such as 'a handwritten seven', got {prompt!r}")
    named = {_DIGITS[token] for token in re.findall(r"[a-z]+|\d+", prompt.lower()) if token in _DIGITS}
    if len(named) != 1:
        found = "no digit" if not named else f"the digits {sorted(named)}"
        raise ValueError(
            f"prompt {prompt!r} names {found}; rftcore.digits judges prompts with exactly one of "
            f"{', '.join(WORDS)} or 0 to 9, such as 'a handwritten seven'"
        )
    return named.pop()

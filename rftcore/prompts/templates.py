"""Prompts put into a text, with the article that they need."""

from __future__ import annotations

import re
from collections.abc import Sequence

from rftcore.prompts.errors import PromptsError

PLAIN, WITH_ARTICLE = "{}", "{a}"
# Written with a vowel and spoken without, and the reverse: "a European crocodile", "an hour", "an F1 car".
_SPOKEN_CONSONANT = re.compile(r"eu|ew|on(e|ce)\b|u\b|u[ks]\b|us[aeu]|ut[ei]|ubi|uni(?![nm])", re.IGNORECASE)
_SPOKEN_VOWEL = re.compile(r"hour|honest|honou?r|heir|[FHLMNRSX](\d|\b)")


def fill(prompts: Sequence[str], template: str) -> list[str]:
    """Each prompt in the template, where its "{}" is; "{a}" puts the prompt there with "a" or "an" before it.

    Raises: PromptsError unless the template has exactly one of them.
    """
    marks = template.count(PLAIN) + template.count(WITH_ARTICLE)
    if marks != 1:
        raise PromptsError(
            f'prompt_template={template!r} has {marks} places for the prompt; write exactly one "{PLAIN}", such as '
            f'"a photo of a {PLAIN}", or "{WITH_ARTICLE}", where the prompt is put with its article'
        )
    if PLAIN in template:
        return [template.replace(PLAIN, prompt) for prompt in prompts]
    return [template.replace(WITH_ARTICLE, with_article(prompt)) for prompt in prompts]


def with_article(noun: str) -> str:
    """The noun with "a" or "an" before it, by its first letter and the common exceptions of English."""
    first = noun.lstrip()
    vowel = first[:1].lower() in tuple("aeiou") and not _SPOKEN_CONSONANT.match(first)
    return f"an {noun}" if vowel or _SPOKEN_VOWEL.match(first) else f"a {noun}"

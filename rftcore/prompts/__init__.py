"""Prompts: lists of strings from the papers' sets, files, datasets or functions; put into a text, and split by rule."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path

from rftcore.dotted import DottedPathError, resolve
from rftcore.prompts import benchmarks, files, hub
from rftcore.prompts.errors import PromptsError
from rftcore.prompts.sets import KNOWN
from rftcore.prompts.split import split
from rftcore.prompts.templates import fill

__all__ = ["KNOWN", "PromptsError", "fill", "load", "split"]

_GIVE = f"give a {', '.join(files.SUFFIXES[:-1])} or {files.SUFFIXES[-1]} file, module.function, or a list of prompts"


def load(source: str | Sequence[str]) -> list[str]:
    """The prompts behind a source, in their order.

    Args:
        source: one of
            - a known set: simple_animals, imagenet_animals, animal_activities;
            - a file: .txt (one a line, # comments), .jsonl and .json (key "prompt", or lists of strings), .csv and .tsv
              (column "prompt" or "prompts"); FILE:NAME takes another key or column;
            - a benchmark that is on disk, whole or one category: hpdv2:FOLDER[:STYLE], drawbench:FILE[:CATEGORY],
              partiprompts:FILE[:CATEGORY];
            - a column of a dataset on the hub: hf:owner/name:split:column;
            - module.function of your own, that returns a list, or module.name of a list;
            - a list.

    Raises: PromptsError, with the file and line where there is one.
    """
    prompts = _found(source) if isinstance(source, str) else list(source)
    wrong = next((prompt for prompt in prompts if not isinstance(prompt, str)), None)
    if wrong is not None:
        raise PromptsError(f"prompts {source!r}: every prompt must be a string, not {wrong!r}")
    if (half := next((prompt for prompt in prompts if _is_half(prompt)), None)) is not None:
        raise PromptsError(
            f"prompts {source!r}: {half!r} has half of a surrogate pair, which no text can have; write the character itself"
        )
    if not prompts:
        raise PromptsError(f"prompts {source!r} are empty; at least one is needed")
    return prompts


def _is_half(prompt: str) -> bool:
    """Whether there is no UTF-8 of it: JSON can write such texts, and no tokenizer can read them."""
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError:
        return True
    return False


def _found(source: str) -> list[str]:
    path, _, column = source.rpartition(":")
    if source in KNOWN:
        return KNOWN[source]()
    if source.startswith(hub.PREFIX):
        return hub.load(source)
    if source.partition(":")[0] in benchmarks.READERS and ":" in source:
        return benchmarks.load(source)
    if source.endswith(files.SUFFIXES):
        return files.read(Path(source))
    if path.endswith(files.SUFFIXES):
        return files.read(Path(path), column)
    return _from_function(source)


def _from_function(dotted: str) -> list[str]:
    if "." not in dotted and ":" not in dotted:
        close = difflib.get_close_matches(dotted, KNOWN, n=1, cutoff=0.5)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise PromptsError(f"prompts {dotted!r}: {hint}{_GIVE}, or a known set: {', '.join(KNOWN)}")
    try:
        function = resolve(dotted)
    except DottedPathError as error:
        raise PromptsError(
            f"prompts {dotted!r}: no file that ends in {', '.join(files.SUFFIXES)}, and {error}"
        ) from error
    prompts = function() if callable(function) else function
    if isinstance(prompts, str) or not isinstance(prompts, Sequence):
        raise PromptsError(f"prompts {dotted!r}: a list of strings is expected, not a {type(prompts).__name__}")
    return list(prompts)

"""A column of a dataset on the Hugging Face hub."""

from __future__ import annotations

from rftcore.prompts.errors import PromptsError

PREFIX = "hf:"
_FORM = "hf:owner/name:split:column, or hf:owner/name:config:split:column"


def load(source: str) -> list[str]:
    """The strings of "hf:owner/name:split:column", or of one of its configs, by the `datasets` package.

    Raises: PromptsError, also where the package is missing.
    """
    name, *rest = source.removeprefix(PREFIX).split(":")
    if not name or len(rest) not in (2, 3) or not all(rest):
        raise PromptsError(f"prompts {source!r}: write {_FORM}")
    *config, split, column = rest
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise PromptsError(
            f"prompts {source!r} need the package `datasets`: pip install rftcore[datasets]. Or save the column to a "
            ".txt file, one prompt a line, and give that"
        ) from error
    try:
        dataset = load_dataset(name, *config, split=split)
    # The package raises errors of many kinds: of the hub, of the network, of files and of its own.
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise PromptsError(f"prompts {source!r} cannot be loaded: {type(error).__name__}: {reason}") from error
    if column not in dataset.column_names:
        raise PromptsError(f"prompts {source!r}: no column {column!r}; it has {', '.join(dataset.column_names)}")
    return list(dataset[column])

"""The files of a ``CLIPTokenizer`` in whose vocabulary every word of the digits prompts is one token."""

from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise
from pathlib import Path

from rftcore.digits import prompts

MAX_LENGTH = 12
START, END = "<|startoftext|>", "<|endoftext|>"
_WORD_END = "</w>"


def _byte_characters() -> list[str]:
    """Give the printable character that byte-level BPE (GPT-2, CLIP) writes for each of the 256 bytes."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    rest = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + index) for index in range(len(rest))]


def learn_merges(words: list[str]) -> list[tuple[str, str]]:
    """Merge the most frequent neighbours until each word is one token.

    *Source* Sennrich et al., Neural Machine Translation of Rare Words with Subword Units, algorithm 1. Ties go to the
    alphabetically first pair, so the result depends on the set of words only.
    """
    spelling = {word: [*word[:-1], word[-1] + _WORD_END] for word in words}
    merges = []
    while any(len(parts) > 1 for parts in spelling.values()):
        pairs = Counter(pair for parts in spelling.values() for pair in pairwise(parts))
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        spelling = {word: _merge(parts, best) for word, parts in spelling.items()}
    return merges


def _merge(parts: list[str], pair: tuple[str, str]) -> list[str]:
    merged: list[str] = []
    index = 0
    while index < len(parts):
        found = tuple(parts[index : index + 2]) == pair
        merged.append("".join(pair) if found else parts[index])
        index += 2 if found else 1
    return merged


def write_tokenizer(folder: Path) -> None:
    """Write ``vocab.json``, ``merges.txt`` and the settings of a ``CLIPTokenizer`` into ``folder``.

    Any text can be encoded: what is not a word of the prompts falls apart into bytes.
    """
    words = sorted({word for prompt in prompts.train_prompts() + prompts.held_out_prompts() for word in prompt.split()})
    merges = learn_merges(words)
    characters = _byte_characters()
    tokens = characters + [character + _WORD_END for character in characters] + ["".join(pair) for pair in merges]
    vocabulary = {token: index for index, token in enumerate([*tokens, START, END])}
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": MAX_LENGTH, "do_lower_case": True, **special}
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / "vocab.json", vocabulary)
    _write_json(folder / "tokenizer_config.json", settings)
    _write_json(folder / "special_tokens_map.json", special)
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

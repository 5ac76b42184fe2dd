"""The levels of recomputation: which values of a block are made again."""

from __future__ import annotations

import functools

from rftcore.blocks.program import Program

# Values of a transformer block by the last part of their names.
_QUERIES = frozenset({"q", "k", "v", "q2", "k2", "v2"})

# What each level makes again that takes a matrix product or a convolution.
LEVELS: dict[str, frozenset[str] | None] = {
    "none": frozenset(),
    "ff": frozenset({"u"}),
    "qkv": frozenset({"u"}) | _QUERIES,
    "block": None,
}


@functools.lru_cache(maxsize=1024)
def drop(program: Program, level: str) -> frozenset[str]:
    """The names of the program's values that `level` makes again.

    "none": what no matrix product and no convolution is needed for; "ff": also the feed-forward's projection; "qkv":
    also queries, keys and values; "block": everything but the inputs of blocks.
    """
    names, chosen = frozenset(name for step in program.steps for name in step.outputs), LEVELS[level]
    if chosen is None:
        return names - {*program.boundaries}
    return frozenset(name for name in names if name.rpartition(".")[2] in chosen)


def is_boundary(program: Program, name: str) -> bool:
    """Whether this value is the input of a transformer block that follows another one."""
    return name in program.boundaries and name.endswith(".h")

"""A launch of a Triton kernel as a value: it runs on a GPU or in the interpreter, and compiles without either."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import triton


class Launch(NamedTuple):
    """One kernel, its grid, and everything it is called with.

    Attributes:
        arguments: all of the kernel's parameters by name: tensors, numbers, None, and its constants.
    """

    kernel: triton.runtime.JITFunction
    grid: tuple[int, ...]
    arguments: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 2

    @property
    def options(self) -> dict[str, Any]:
        """The compiler's options."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}

    def run(self) -> None:
        """Queues it on the current stream of the current device; a grid without a program is no launch."""
        if all(self.grid):
            self.kernel[self.grid](**self.arguments, **self.options)


def cdiv(a: int, b: int) -> int:
    """The quotient, rounded up."""
    return -(-a // b)

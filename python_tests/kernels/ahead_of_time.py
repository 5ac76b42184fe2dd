"""Compiles launches of Triton kernels for GPUs that are not here, and prints what the compiler made of them, as JSON.

    python ahead_of_time.py <module> <capability>

The module's `launches(capability)` gives, by name, a launch and the matrix instruction that is meant in it: the "newest" of the
chip, "any", or None. A program, for a process of its own: the tests' own has the interpreter in place of the compiler.
"""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

_TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int32: "*i32"}


def source_of(launch) -> ASTSource:
    """What the launch would compile, with the alignment that PyTorch's allocator gives."""
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(launch.kernel.params):
        name, value = parameter.name, launch.arguments[parameter.name]
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1):
            signature[name], constants[(i,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name] = _TYPES[value.dtype]
            if value.storage_offset() * value.element_size() % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
    return ASTSource(launch.kernel, signature, constants, attributes)


def compile_launch(launch, capability: int) -> dict:
    """Registers, bytes of stack and of shared memory, and which instructions are there."""
    compiled = triton.compile(source_of(launch), target=GPUTarget("cuda", capability, 32), options=launch.options)
    ptx = compiled.asm["ptx"]
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        command = [tool, "--dump-resource-usage", cubin]
        usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return {
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "stack": int(re.search(r"STACK:(\d+)", usage)[1]),
        "shared": compiled.metadata.shared,
        "matrix": next((name for name in ("tcgen05.mma", "wgmma.mma_async", "mma.sync") if name in ptx), None),
        "fp64": ".f64" in ptx,
        "wide_loads": len(re.findall(r"ld\.global\S*\.v4\.b32|cp\.async\.c[ag]\.\S+ \[[^]]*\], \[[^]]*\], 0x10", ptx)),
    }


def main(module: str, capability: int) -> None:
    def compiled(case):
        name, (launch, meant) = case
        return name, {"meant": meant, **compile_launch(launch, capability)}

    cases = importlib.import_module(module).launches(capability).items()
    # The assembler runs in a process of its own: two threads keep two cores at work.
    with ThreadPoolExecutor(2) as pool:
        json.dump(dict(pool.map(compiled, cases)), sys.stdout)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))

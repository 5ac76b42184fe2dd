"""What the compiler makes of launches of Triton kernels on GPUs that are not here, as JSON; kept in compiled.json.

    python ahead_of_time.py [--anew] [--write]

A launch is compiled where the file has nothing under its key, which names all that it is compiled from; with --anew,
every one. Prints what was found, or writes it to the file. Each module launches_*.py here has `launches(capability)`:
by name, a launch and the matrix instruction that is meant in it: the "newest" of the chip, "any", or None. A program,
for a process of its own: the tests' own has the interpreter in place of the compiler.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import inspect
import json
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import triton
from triton._C.libtriton import get_cache_invalidating_env_vars
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend

HERE = Path(__file__).parent
CAPABILITIES = (80, 90, 100)
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
    compiled = triton.compile(source_of(launch), target=target(capability), options=launch.options)
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


def target(capability: int) -> GPUTarget:
    return GPUTarget("cuda", capability, 32)


def key_of(launch, capability: int) -> str:
    """A hash of the kernel with all that it calls, of what it is called with, the compiler, and of what is read off."""
    backend = make_backend(target(capability))
    parts = (
        triton.__version__,
        backend.hash(),
        source_of(launch).hash(),
        backend.parse_options(dict(launch.options)).hash(),
        sorted(get_cache_invalidating_env_vars().items()),
        inspect.getsource(compile_launch),
    )
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def cases() -> dict[str, tuple]:
    """By name: launch, capability, matrix instruction."""
    modules = {path.stem: importlib.import_module(path.stem) for path in sorted(HERE.glob("launches_*.py"))}
    # A kernel's hash would change with the line that it stands in.
    for name, module in sys.modules.items():
        if name.startswith("rftcore.kernels."):
            for value in vars(module).values():
                if isinstance(value, triton.runtime.JITFunction):
                    value.starting_line_number = 0
    return {
        f"{name.removeprefix('launches_')} on sm_{capability}: {case}": (launch, capability, meant)
        for name, module in modules.items()
        for capability in CAPABILITIES
        for case, (launch, meant) in module.launches(capability).items()
    }


def main(anew: bool, write: bool) -> None:
    path = HERE / "compiled.json"
    kept = {} if anew or not path.exists() else json.loads(path.read_text())["launches"]
    wanted = cases()

    def found(name):
        launch, capability, _ = wanted[name]
        key = key_of(launch, capability)
        if kept.get(name, {}).get("key") == key:
            return kept[name]
        return {"key": key, **compile_launch(launch, capability)}

    # The assembler runs in a process of its own: two threads keep two cores at work.
    with ThreadPoolExecutor(2) as pool:
        launches = dict(zip(wanted, pool.map(found, wanted), strict=True))
    if write:
        lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(values)}" for name, values in launches.items())
        path.write_text(f'{{\n "triton": "{triton.__version__}",\n "launches": {{\n{lines}\n }}\n}}\n')
    else:
        meant = {name: instruction for name, (*_, instruction) in wanted.items()}
        json.dump({"triton": triton.__version__, "launches": launches, "meant": meant}, sys.stdout)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--anew", action="store_true")
    parser.add_argument("--write", action="store_true")
    main(**vars(parser.parse_args()))

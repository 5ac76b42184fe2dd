"""The CUDA kernels, compiled as C++ over cuda_emulation/ and run on CPU tensors: indices, sums, barriers and all."""

import ctypes
import hashlib
import os
import shutil
import subprocess
import sysconfig
import tempfile
from functools import cache
from importlib.machinery import ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_loader
from itertools import count
from pathlib import Path

import pytest

from rftcore.ops import backends, compiled

ROOT = Path(__file__).parent.parent
SHIM = Path(__file__).parent / "cuda_emulation"
OPS = ("group_norm_silu", "sampler_step")
FLAGS = [
    "-std=c++17", "-O1", "-fPIC", "-shared", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror",
    "-Wno-unknown-pragmas", "-ffp-contract=off", "-fno-strict-aliasing", "-U_FORTIFY_SOURCE",
    # A vector load that is not aligned ends the process, as it does on a GPU.
    "-fsanitize=alignment", "-fsanitize-undefined-trap-on-error",
    '-DRFTCORE_CUDA_COMPILER="emulated"', '-DRFTCORE_CUDA_FLAGS=""', '-DRFTCORE_CUDA_ARCHITECTURES=""',
]  # fmt: skip


class Emulation:
    """The compiled module, and what to set and ask of the device it believes in."""

    def __init__(self, path: Path):
        loader = ExtensionFileLoader("_cuda", str(path))
        self.module = module_from_spec(spec_from_loader("_cuda", loader))
        loader.exec_module(self.module)
        self._library = ctypes.CDLL(str(path))
        self._library.emulation_of_broken.restype = ctypes.c_char_p

    def reset(self, capability: int, seed: int = 0, architecture: int | None = None) -> None:
        """Makes it a device of compute capability `capability` (90: 9.0) that has launched nothing yet.

        `seed` draws the order in which blocks and threads run. `architecture` is what its code was compiled for, None:
        the newest of 80 and 90 that it runs.
        """
        newest = 90 if capability >= 90 else 80
        self._library.emulation_reset(capability, architecture or newest, ctypes.c_uint(seed))

    @property
    def launches(self) -> int:
        return self._library.emulation_launches()

    @property
    def largest_cluster(self) -> int:
        """Blocks in the largest cluster launched."""
        return self._library.emulation_largest_cluster()

    def errors(self) -> list[str]:
        """What it says of kernels that break a rule each."""
        self.reset(90)
        return [error.decode() for error in iter(map(self._library.emulation_of_broken, count()).__next__, None)]


@cache
def load() -> Emulation:
    """Builds it once per state of the sources, whatever the number of test processes."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    pybind11 = pytest.importorskip("pybind11", reason="the emulation of CUDA is built with pybind11's headers")
    if compiler is None:
        pytest.skip("no C++ compiler to build the emulation of CUDA with")
    units = [*sorted((ROOT / "csrc/cuda").glob("*.c*")), SHIM / "control.cpp"]
    version = subprocess.run([compiler, "--version"], check=True, capture_output=True, text=True).stdout
    python = sysconfig.get_paths()["include"]
    state = hashlib.sha256("\n".join([version, python, pybind11.__version__, *FLAGS]).encode())
    for path in sorted([*(ROOT / "csrc").rglob("*.*"), *SHIM.glob("*.*")]):
        state.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    folder = Path(tempfile.gettempdir()) / f"rftcore-emulated-cuda-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    target = folder / f"{state.hexdigest()[:24]}.so"
    with _locked(folder / "lock"):
        if not target.exists():
            partial = target.with_suffix(".partial")
            command = [
                compiler, *FLAGS, f"-I{SHIM}", f"-I{python}", f"-I{pybind11.get_include()}", "-x", "c++",
                *map(str, units), "-o", str(partial),
            ]  # fmt: skip
            built = subprocess.run(command, check=False, capture_output=True, text=True)
            if built.returncode:
                raise RuntimeError(f"the emulation of CUDA does not build:\n{built.stderr}")
            for old in folder.glob("*.so"):
                old.unlink()
            partial.replace(target)
        return Emulation(target)


class _locked:
    """Held by one process at a time."""

    def __init__(self, path: Path):
        self.path = path

    def __enter__(self):
        import fcntl

        self.file = self.path.open("w")
        fcntl.flock(self.file, fcntl.LOCK_EX)

    def __exit__(self, *error):
        self.file.close()


def serve(monkeypatch, capability: int = 90, seed: int = 0) -> Emulation:
    """Until the test ends, the backend "cuda" of OPS serves CPU tensors, and "cpu" does not."""
    emulation = load()
    emulation.reset(capability, seed)
    monkeypatch.setattr(compiled, "module", lambda device: emulation.module)
    monkeypatch.setattr(compiled, "launch", lambda name, device, *a: getattr(emulation.module, name)(*a, 0))
    for op in OPS:
        reasons = backends.OPS[op].not_supported_reasons
        monkeypatch.setitem(reasons, "cuda", lambda *inputs: backends.transform_reasons())
        monkeypatch.setitem(reasons, "cpu", lambda *inputs: ["CUDA is emulated"])
    return emulation

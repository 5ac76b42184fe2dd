"""What the sdist and the wheel must hold, and what they must not: python wheel_contents.py SDIST WHEEL."""

from __future__ import annotations

import re
import sys
import tarfile
import zipfile
from pathlib import Path

_REPOSITORY = Path(__file__).parents[1]
# Of those that are no Python.
_DATA = {".json", ".jsonl", ".safetensors", ".txt", ".typed", ".yaml"}
_NEVER = re.compile(r"(^|/)(\.venv|\.git|build|dist|runs|__pycache__|[^/]*_cache)/|\.so\.\d|\.pyc$")
_OF_SDIST = (
    "CMakeLists.txt",
    "LICENSE",
    "Makefile",
    "README.md",
    "constraints.txt",
    "pyproject.toml",
    "csrc/cpu/module.cpp",
)


def _in_wheel() -> set[str]:
    """The package's files, where the wheel has them; kernels/ is rftcore.kernels there."""
    files = [path for path in (_REPOSITORY / "rftcore").rglob("*") if path.suffix in {".py", *_DATA}]
    kernels = {f"rftcore/kernels/{path.name}" for path in (_REPOSITORY / "kernels").glob("*.py")}
    return {path.relative_to(_REPOSITORY).as_posix() for path in files} | kernels


def _check(name: str, there: set[str], wanted: set[str]) -> None:
    if missing := sorted(wanted - there):
        sys.exit(f"{name} lacks {len(missing)} files: {', '.join(missing[:10])}")
    if strange := sorted(filter(_NEVER.search, there)):
        sys.exit(f"{name} holds {len(strange)} files that belong to no package: {', '.join(strange[:10])}")


def main(sdist: Path, wheel: Path) -> None:
    """Raises: SystemExit that names what is missing or too much."""
    with tarfile.open(sdist) as file:
        names = {member.name.partition("/")[2] for member in file.getmembers() if member.isfile()}
    tests = {path.relative_to(_REPOSITORY).as_posix() for path in (_REPOSITORY / "python_tests").rglob("*.py")}
    modules = {name.replace("rftcore/kernels/", "kernels/") for name in _in_wheel()}
    _check(sdist.name, names, modules | tests | set(_OF_SDIST))
    with zipfile.ZipFile(wheel) as file:
        names = set(file.namelist())
    metadata = f"{'-'.join(wheel.name.split('-')[:2])}.dist-info"
    _check(wheel.name, names, _in_wheel() | {f"{metadata}/licenses/LICENSE", f"{metadata}/METADATA"})
    if strange := sorted(name for name in names if not name.startswith(("rftcore/", f"{metadata}/"))):
        sys.exit(f"{wheel.name} would install {', '.join(strange[:10])}, which is no part of rftcore")
    built = sorted(name for name in names if name.endswith((".so", ".pyd")))
    if [Path(name).name.partition(".")[0] for name in built] != ["_cpu"]:
        sys.exit(
            f"{wheel.name}: compiled without nvcc, it holds {', '.join(built) or 'nothing compiled'}, not _cpu alone"
        )
    for path in (sdist, wheel):
        print(f"{path.name}: {path.stat().st_size / 2**20:.1f} MiB")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))

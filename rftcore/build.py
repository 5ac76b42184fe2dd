"""What was compiled into this installation, and which backend serves each op."""

import platform
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from types import ModuleType

from rftcore import __version__

MODULES = ("_cpu", "_cuda")


@cache
def _import(name: str) -> ModuleType | str:
    """The compiled module, or in words why there is none."""
    try:
        return import_module(f"rftcore.{name}")
    except ModuleNotFoundError:
        return f"rftcore.{name} is not installed ({_why_not_built(name)})"
    except ImportError as error:
        return f"rftcore.{name} is installed but does not load: {error}"


def _why_not_built(name: str) -> str:
    if name == "_cpu" or isinstance(core := _import("_cpu"), str):
        return "the package was imported from a source folder, not installed; `pip install -e .` builds it"
    return core.build_info()["cuda"]


def load(name: str) -> ModuleType:
    """The compiled module `name`.

    Raises: RuntimeError where it cannot be imported.
    """
    if isinstance(module := _import(name), str):
        raise RuntimeError(module)
    return module


def why_not_loaded(name: str) -> str | None:
    """None where the compiled module `name` is loaded, else the reason."""
    return module if isinstance(module := _import(name), str) else None


@dataclass(frozen=True)
class BuildInfo:
    """What was built: a dict of facts per module that loads, and a sentence per module that does not."""

    version: str
    python: str
    modules: dict[str, dict[str, str]] = field(default_factory=dict)
    not_loaded: dict[str, str] = field(default_factory=dict)


def build_info() -> BuildInfo:
    """What was compiled into this installation: compiler, flags, SIMD level, CUDA version and architectures."""
    reasons = {name: why_not_loaded(name) for name in MODULES}
    return BuildInfo(
        version=__version__,
        python=platform.python_version(),
        modules={name: dict(load(name).build_info()) for name, reason in reasons.items() if reason is None},
        not_loaded={name: reason for name, reason in reasons.items() if reason is not None},
    )


def format_info() -> str:
    """The text of `rftcore info`: what was built, and for each op the backend that serves it and why not the others."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    import rftcore.ops  # noqa: F401  registers the ops
    from rftcore.ops.backends import OPS

    info = build_info()
    lines = [f"rftcore {info.version}, Python {info.python}, torch {torch.__version__}"]
    for name, facts in info.modules.items():
        lines += [f"{name}: built and loaded", *(f"  {key}: {value}" for key, value in facts.items())]
    lines += [f"{name}: {reason}" for name, reason in info.not_loaded.items()]
    for op in OPS.values():
        lines.append(f"{op.name}")
        for device, dtype in (("cpu", torch.float32), ("cpu", torch.bfloat16), ("cuda", torch.bfloat16)):
            # Fake tensors: reasons look at devices, dtypes and shapes only, and a GPU need not be here.
            with FakeTensorMode():
                inputs = op.example(device, dtype)
            lines.append(f"  {device} {str(dtype).removeprefix('torch.')}: {op.choose('auto', *inputs)}")
            lines += [
                f"    not {name}: {'; '.join(refusals)}"
                for name, reasons in op.not_supported_reasons.items()
                if (refusals := reasons(*inputs))
            ]
    return "\n".join(lines)

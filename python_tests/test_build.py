"""What was built is there, says so, and leaves the process as it found it."""

import subprocess
import sys

import pytest
import torch

import rftcore
from rftcore import build


def python(code):
    """Standard output of `code` in a fresh interpreter."""
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


def test_build_info_names_every_module():
    info = rftcore.build_info()
    assert info.version == rftcore.__version__
    assert set(info.modules) | set(info.not_loaded) == set(build.MODULES)
    assert {"compiler", "flags", "simd", "cuda"} <= set(info.modules["_cpu"])
    assert ("_cuda" in info.modules) == info.modules["_cpu"]["cuda"].startswith("built")


def test_info_says_which_backend_serves_and_why_not_the_others():
    text = build.format_info()
    assert "_cpu: built and loaded" in text
    assert "  cpu float32: cpu\n    not cuda: it serves cuda tensors, sample is on cpu" in text
    assert f"  cuda bfloat16: {'cuda' if build.why_not_loaded('_cuda') is None else 'reference'}" in text


def test_a_missing_module_is_explained(monkeypatch):
    monkeypatch.setitem(sys.modules, "rftcore._cpu", None)
    build._import.cache_clear()
    try:
        assert "rftcore._cpu is not installed" in build.why_not_loaded("_cpu")
        with pytest.raises(RuntimeError, match="pip install -e"):
            build.load("_cpu")
    finally:
        build._import.cache_clear()


def test_importing_the_package_does_not_import_torch():
    code = "import rftcore, rftcore.build, sys; rftcore.__version__, dir(rftcore); print('torch' in sys.modules)"
    assert python(code) == "False\n"


def test_every_public_name_is_there_and_no_other():
    assert all(hasattr(rftcore, name) for name in rftcore.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Sampler'.*CheckpointedSampler"):
        rftcore.Sampler  # noqa: B018


def test_denormals_and_nan_survive_loading():
    code = """
import sys
tiny = sys.float_info.min
import rftcore, rftcore.ops
from rftcore import build
for name in build.MODULES:
    build.why_not_loaded(name)
build.load("_cpu")
import torch
single = torch.tensor([1e-40]) * 0.5
nan = float("inf") - float("inf")
print(tiny / 2 > 0, float(single) > 0, nan != nan)
"""
    assert python(code) == "True True True\n"


def test_the_cuda_module_imports_without_a_driver():
    if reason := build.why_not_loaded("_cuda"):
        pytest.skip(reason)
    assert build.load("_cuda").build_info()["architectures"]


def test_an_error_of_the_cuda_runtime_is_an_exception():
    if (reason := build.why_not_loaded("_cuda")) or torch.cuda.is_available():
        pytest.skip(reason or "there is a GPU, and the launch would go through")
    with pytest.raises(RuntimeError, match="sampler_step_forward: "):
        build.load("_cuda").sampler_step_forward(1, 1, 1, 1, False, False, 0, *[0] * 9, 0)

"""What was built is there, says so, and leaves the process as it found it."""

import re
import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import rftcore
from rftcore import build
from rftcore.ops import compiled
from rftcore.ops.backends import OPS


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


@pytest.mark.parametrize(
    ("architectures", "served"),
    [
        ("80-real 90-real 90-virtual", [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)]),
        ("86-real 90-real", [(8, 6), (8, 9), (9, 0)]),
        ("75", [(7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)]),
        ("90a-real", [(9, 0)]),
        ("native", [(7, 0), (7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)]),
    ],
)
def test_which_gpus_the_compiled_code_is_for(architectures, served):
    gpus = [(7, 0), (7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)]
    assert [gpu for gpu in gpus if compiled.has_code_for(gpu, architectures)] == served


def test_a_gpu_that_nothing_was_compiled_for_is_served_by_another_backend(monkeypatch):
    if reason := build.why_not_loaded("_cuda"):
        pytest.skip(reason)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(compiled, "_refusal", compiled._refusal.__wrapped__)
    for name in ("group_norm_silu", "sampler_step"):
        with FakeTensorMode():
            inputs = OPS[name].example("cuda", torch.bfloat16)
        assert OPS[name].choose("auto", *inputs) in ("torch", "reference")
        assert "cuda:0 has compute capability 7.5" in OPS[name].explain(*inputs)


def test_a_driver_too_old_for_the_runtime_is_a_reason(monkeypatch):
    if (reason := build.why_not_loaded("_cuda")) or torch.cuda.is_available():
        pytest.skip(reason or "there is a GPU, with a driver that works")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    refusal = compiled._refusal.__wrapped__(torch.device("cuda", 0))
    assert re.search("it was compiled by NVIDIA .*, whose runtime says: .*(driver|device)", refusal)


def test_an_error_of_the_cuda_runtime_is_an_exception():
    if (reason := build.why_not_loaded("_cuda")) or torch.cuda.is_available():
        pytest.skip(reason or "there is a GPU, and the launch would go through")
    with pytest.raises(RuntimeError, match="sampler_step_forward: "):
        build.load("_cuda").sampler_step_forward(1, 1, 1, 1, False, False, 0, *[0] * 9, 0)

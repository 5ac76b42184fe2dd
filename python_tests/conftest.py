"""Fails the session when what was built is not what is tested, seeds every test, and leaves slow tests to test-all."""

import collections
import gc
import os
import random
import shutil
from importlib.util import find_spec

import numpy
import pytest
import torch
from covering import covering

from rftcore import build

# Where there is no GPU, Triton kernels run in its interpreter; it is chosen when they are imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

TEST_ALL = os.environ.get("RFTCORE_TEST_ALL") == "1"


def missing_modules() -> list[str]:
    """Compiled modules that should serve these tests and do not, in words."""
    missing = []
    if reason := build.why_not_loaded("_cpu"):
        missing.append(reason)
    elif reason := build.why_not_loaded("_cuda"):
        status = build.load("_cpu").build_info()["cuda"]
        if status.startswith("built") or (shutil.which("nvcc") and "switched off" not in status):
            missing.append(reason)
    return missing


def pytest_configure(config):
    # The models of the tests are tiny: a second thread costs them more than it brings, and tests can run side by side.
    torch.set_num_threads(1)
    if not TEST_ALL:
        _draw_the_same_examples()
    if missing := missing_modules():
        raise pytest.UsageError(
            f"The tests would pass without testing the compiled code: {'; '.join(missing)}. "
            "Install the package first: `pip install -e .`, or `make test`, which does."
        )


def _draw_the_same_examples():
    """test-all goes on looking for examples that fail. Machines that only test kernels may lack Hypothesis."""
    if find_spec("hypothesis"):
        from hypothesis import settings

        settings.register_profile("same", derandomize=True, database=None)
        settings.load_profile("same")


# The emulation of CUDA is built by the first of them, and others would wait for it; of those that take minutes in
# test-all, begun last, the end would be waited for.
FIRST = (
    "ops/test_cuda_kernels.py",
    "blocks/test_triton.py",
    "kernels/test_ahead_of_time.py",
    "ops/test_triton_backends.py",
)


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: not item.nodeid.partition("::")[0].endswith(FIRST))
    _leave_to_test_all(items)
    if not TEST_ALL:
        skip = pytest.mark.skip(reason="slow: `make test-all` runs it")
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(skip)


def _leave_to_test_all(items):
    """All but few of the parameters of each test that is marked `covering`."""
    products = collections.defaultdict(list)
    for item in items:
        if "slow" not in item.keywords and item.get_closest_marker("covering"):
            products[item.nodeid.partition("[")[0]].append(item)
    for product in products.values():
        (strength,) = product[0].get_closest_marker("covering").args
        values = [{name: repr(value) for name, value in item.callspec.params.items()} for item in product]
        few = covering(values, strength)
        for place, item in enumerate(product):
            if place not in few:
                item.add_marker("slow")


def pytest_collection_finish():
    """What all tests import stays: the garbage collector need not walk through it again and again."""
    gc.collect()
    gc.freeze()


# Their subject is how a plan is made.
OF_PLANS = {"test_plan", "test_plan_peaks", "test_random_paths"}


@pytest.fixture(autouse=True, scope="module")
def _shared_simulations(request):
    import shared_simulations  # not before it is settled how Triton runs

    with pytest.MonkeyPatch.context() as monkeypatch:
        if request.module.__name__ not in OF_PLANS:
            shared_simulations.share(monkeypatch)
        yield


@pytest.fixture(autouse=True, scope="session")
def _interpreter():
    with pytest.MonkeyPatch.context() as monkeypatch:
        if os.environ.get("TRITON_INTERPRET") == "1" and find_spec("triton"):
            import triton_interpreter  # not before it is settled how Triton runs

            triton_interpreter.patch_language_once(monkeypatch)
        yield


@pytest.fixture(autouse=True)
def _seed():
    random.seed(0)
    numpy.random.seed(0)
    torch.manual_seed(0)

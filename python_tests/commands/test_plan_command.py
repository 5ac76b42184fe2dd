"""`rftcore plan`: what fits, as a user asks it, mistakes included."""

import subprocess
import sys

import pytest
from models import save_configs, text_unet

from rftcore.commands.plan import describe, predict
from rftcore.commands.plan_options import PlanOptions
from rftcore.errors import UsageError


def rftcore(*arguments):
    return subprocess.run([sys.executable, "-m", "rftcore", "plan", *arguments], capture_output=True, text=True)


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory):
    """The folder of a tiny pipeline, configs only."""
    return save_configs(tmp_path_factory.mktemp("pipeline"))


def predicted(pipeline, **options):
    return predict(PlanOptions(**{"model": str(pipeline), "device_memory": "20MiB", "steps": 6, **options}))


def test_help_imports_no_torch():
    help_ = rftcore("--help")
    assert help_.returncode == 0 and "--device-memory" in help_.stdout
    check = "import sys, rftcore.cli; rftcore.cli._parser(); assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", check]).returncode == 0


def test_a_local_pipeline_by_the_command(pipeline):
    done = rftcore("--model", str(pipeline), "--device-memory", "20MiB", "--steps", "6", "--batch", "2")
    assert done.returncode == 0, done.stderr
    for part in ("predicted peak", "memory_budget=", "FLOPs", "fits at most", "adamw's state", "16 px"):
        assert part in done.stdout


@pytest.mark.slow
def test_the_parts_are_those_of_the_device(pipeline):
    made = predicted(pipeline, optimizer="adamw", reward_memory="1MiB")
    assert made.held["reward"] == 2**20
    assert made.held["LoRA"] == made.held["its gradients"] == made.held["adamw's state"] / 2 > 0
    assert made.held["UNet"] == 2 * sum(p.numel() for p in text_unet().parameters())
    assert sum(made.held.values()) < made.peak_bytes <= 20 * 2**20
    assert predicted(pipeline, optimizer="sgd").held["sgd's state"] == 0
    assert predicted(pipeline, rank=8).held["LoRA"] == 2 * made.held["LoRA"]
    assert predicted(pipeline, target=["attention", "proj_in"]).held["LoRA"] > made.held["LoRA"]


def test_the_samplers_budget_gives_the_same_plan(pipeline):
    made = predicted(pipeline, device_memory="8MiB")
    again = predicted(pipeline, device_memory=None, memory_budget=str(made.plan.budget))
    assert again.plan == made.plan and made.plan.extra_percent > 0
    assert f'memory_budget="{made.plan.budget // 2**20}MiB"' in describe(PlanOptions(model="x", batch=4), made)


@pytest.mark.slow
def test_the_largest_batch_and_k_fit_and_one_more_does_not(pipeline):
    made = predicted(pipeline, device_memory="3MiB")
    assert predicted(pipeline, device_memory="3MiB", batch=made.largest_batch).peak_bytes <= 3 * 2**20
    with pytest.raises(UsageError, match="--device-memory 3MiB is too small"):
        predicted(pipeline, device_memory="3MiB", batch=made.largest_batch + 2)
    assert predicted(pipeline, device_memory="2.1MiB").largest_k == 1
    assert predicted(pipeline, device_memory="2.1MiB", backprop_steps=1).plan.replays == 0
    assert predicted(pipeline, device_memory="2.1MiB", backprop_steps=2).plan.replays > 0


def test_sampling_without_a_gradient_takes_less(pipeline):
    made = predicted(pipeline, backprop_steps=0)
    assert made.plan.differentiated == made.largest_k == 0
    assert made.peak_bytes < predicted(pipeline).peak_bytes
    assert "0 of 6 steps differentiated" in describe(PlanOptions(model="x", steps=6), made)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "sd16"}, "no known model and no folder; did you mean 'sd.*sd15, sd21, sdxl"),
        ({"model": "/nowhere"}, "sd15, sd21, sdxl"),
        ({"device_memory": "1MiB"}, "--device-memory 1MiB is too small: weights, optimizer and reward take"),
        ({"device_memory": "lots"}, "--device-memory lots must be a number of bytes with its unit"),
        ({"device_memory": None, "memory_budget": "1KiB"}, "memory_budget=1.0 KiB is too small"),
        ({"target": ["to_nowhere"]}, "--target to_nowhere"),
        ({"resolution": 15}, "--resolution 15 must be a multiple of 2"),
    ],
)
def test_mistakes(pipeline, options, message):
    with pytest.raises(UsageError, match=message):
        predicted(pipeline, **options)


def test_a_folder_that_is_no_pipeline(tmp_path):
    with pytest.raises(UsageError, match="there is no unet/config.json"):
        predicted(tmp_path)
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet/config.json").write_text('{"_class_name": "FluxTransformer2DModel"}')
    with pytest.raises(UsageError, match="there is no vae/config.json|FluxTransformer2DModel"):
        predicted(tmp_path)


def test_every_wrong_flag_is_named():
    done = rftcore("--model", "sd15", "--batch", "0", "--dtype", "bf17", "--backprop_steps", "51")
    assert done.returncode == 2
    for part in ("give --device-memory", "--batch 0", "did you mean 'bf16'", "--backprop_steps 51"):
        assert part in done.stderr


# Whole devices: weights in bf16, LoRA of rank 4 with AdamW, decoding; without a reward. GiB, and percent run twice.
@pytest.mark.slow
def test_sd15_fits_what_it_must(capsys):
    for memory, limit in ((3.5, 100), (8, 90), (12, 79), (24, 47), (40, 26), (80, 15), (110, 8)):
        made = predict(PlanOptions(model="sd15", device_memory=f"{memory}GiB"))
        assert made.peak_bytes <= memory * 2**30
        assert made.plan.extra_percent <= limit, memory
    one = predict(PlanOptions(model="sd15", backprop_steps=1, device_memory="6.5GiB"))
    assert one.plan.replays == 0


@pytest.mark.slow
def test_sdxl_fits_what_it_must():
    made = predict(PlanOptions(model="sdxl", batch=1, backprop_steps=5, device_memory="16GiB"))
    assert made.peak_bytes <= 16 * 2**30 and made.plan.replays == 0


@pytest.mark.slow
def test_sd21_is_known():
    made = predict(PlanOptions(model="sd21", batch=1, backprop_steps=1, device_memory="16GiB"))
    assert made.size == 768 and made.held["UNet"] / 2**20 == pytest.approx(1651, rel=0.01)

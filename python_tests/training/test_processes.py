"""Two gloo processes train what one trains."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
import train_alike
import yaml
from processes import launch
from safetensors.torch import load_file

HERE = Path(__file__).parent
# accelerate's own --cpu starts one process; --multi_gpu is its name for torchrun, with gloo where there is no GPU.
LAUNCH = [
    sys.executable,
    "-m",
    "accelerate.commands.launch",
    "--multi_gpu",
    "--num_processes",
    "2",
    "--num_machines",
    "1",
]
ENVIRONMENT = {
    **os.environ,
    "ACCELERATE_USE_CPU": "true",
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": f"{HERE}{os.pathsep}{HERE.parents[1]}",
}


@pytest.fixture(scope="module", params=["fp64", "fp32"])
def trained(request, model, tmp_path_factory):
    """Folder of the runs of one process, "1", and of two, "2", and how near they should be."""
    folder = tmp_path_factory.mktemp("processes")
    launch(HERE / "train_alike.py", folder, str(model), request.param)
    return folder, {"fp64": 1e-11, "fp32": 1e-5}[request.param]


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", train_alike.TRAIN)
def test_two_processes_train_what_one_trains(trained, algorithm):
    folder, bound = trained
    folders = [folder / name / algorithm for name in ("1", "2")]
    weights = f"checkpoint-{train_alike.STEPS}/trainable.safetensors"
    one, two = (load_file(folder / weights) for folder in folders)
    difference = sum(torch.sum((one[name].double() - two[name].double()) ** 2) for name in one).sqrt()
    assert difference <= bound * sum(torch.sum(weight.double() ** 2) for weight in one.values()).sqrt()
    environments = [json.loads((folder / "env.json").read_text()) for folder in folders]
    assert [environment["processes"] for environment in environments] == [1, 2]
    results = [json.loads((folder / "results.json").read_text()) for folder in folders]
    for key in ("samples", "reward_queries", "unet_evaluations", "evaluation"):
        assert results[0][key] == results[1][key]
    assert results[0]["evaluation"]["prompts_also_trained_on"] == 1
    lines = [[json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()] for folder in folders]
    assert [line["step"] for line in lines[0]] == [line["step"] for line in lines[1]]
    for one, two in zip(*lines, strict=True):
        assert one.keys() == two.keys()
        for key in one:
            if not key.startswith(("time/", "mem/")):
                assert one[key] == pytest.approx(two[key], rel=1e4 * bound, abs=1e4 * bound), key


@pytest.mark.slow
def test_command_line_under_accelerate_launch(model, tmp_path):
    (tmp_path / "run.yaml").write_text(
        yaml.safe_dump(tiny.values(model, tmp_path / "run", train={"max_train_steps": 1}))
    )
    command = [*LAUNCH, "-m", "rftcore", "train", "draft", "--config", str(tmp_path / "run.yaml")]
    result = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-4000:]
    assert json.loads((tmp_path / "run" / "env.json").read_text())["processes"] == 2
    assert (tmp_path / "run" / "pytorch_lora_weights.safetensors").exists()

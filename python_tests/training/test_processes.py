"""Two gloo processes train what one trains."""

import json
import os
import subprocess
import sys
from pathlib import Path

import tiny
import torch
import train_fp64
import yaml
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


def launch(*command):
    result = subprocess.run([*LAUNCH, *command], env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr[-4000:]


def test_lora_metrics_and_evaluation_equal_one_process(model, tmp_path):
    train_fp64.main(str(model), str(tmp_path / "one"))
    launch(str(HERE / "train_fp64.py"), str(model), str(tmp_path / "two"))
    one, two = (load_file(tmp_path / name / "checkpoint-3" / "trainable.safetensors") for name in ("one", "two"))
    difference = sum(torch.sum((one[name] - two[name]) ** 2) for name in one).sqrt()
    assert difference <= 1e-11 * sum(torch.sum(weight**2) for weight in one.values()).sqrt()
    environments = [json.loads((tmp_path / name / "env.json").read_text()) for name in ("one", "two")]
    assert [environment["processes"] for environment in environments] == [1, 2]
    results = [json.loads((tmp_path / name / "results.json").read_text()) for name in ("one", "two")]
    for key in ("samples", "reward_queries", "unet_evaluations", "evaluation"):
        assert results[0][key] == results[1][key]
    assert results[0]["evaluation"]["prompts_also_trained_on"] == 1
    for name in ("brightness", "contrast"):
        assert abs(results[0]["rewards"][name]["after"]["mean"] - results[1]["rewards"][name]["after"]["mean"]) < 1e-9
    metrics = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("one", "two")]
    assert len(metrics[0]) == len(metrics[1]) == 1 + 3 + 1
    losses = [[json.loads(line)["train/loss"] for line in lines[1:4]] for lines in metrics]
    assert max(abs(a - b) for a, b in zip(*losses, strict=True)) < 1e-9


def test_command_line_under_accelerate_launch(model, tmp_path):
    (tmp_path / "run.yaml").write_text(
        yaml.safe_dump(tiny.values(model, tmp_path / "run", train={"max_train_steps": 1}))
    )
    launch("-m", "rftcore", "train", "draft", "--config", str(tmp_path / "run.yaml"))
    assert json.loads((tmp_path / "run" / "env.json").read_text())["processes"] == 2
    assert (tmp_path / "run" / "pytorch_lora_weights.safetensors").exists()

"""Two gloo processes train what one trains."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file

import tiny

HERE = Path(__file__).parent
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1"]
ENVIRONMENT = {**os.environ, "PYTHONPATH": f"{HERE}{os.pathsep}{HERE.parents[1]}", "OMP_NUM_THREADS": "1"}


def run(command):
    result = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr[-4000:]
    return result


def test_lora_metrics_and_evaluation_equal_one_process(model, tmp_path):
    script = [str(HERE / "train_fp64.py"), str(model)]
    run([sys.executable, *script, str(tmp_path / "one")])
    run([*LAUNCH, *script, str(tmp_path / "two")])
    one, two = (load_file(tmp_path / name / "checkpoint-3" / "trainable.safetensors") for name in ("one", "two"))
    difference = sum(torch.sum((one[name] - two[name]) ** 2) for name in one).sqrt()
    assert difference <= 1e-11 * sum(torch.sum(weight**2) for weight in one.values()).sqrt()
    results = [json.loads((tmp_path / name / "results.json").read_text()) for name in ("one", "two")]
    for key in ("samples", "reward_queries", "unet_evaluations", "evaluation"):
        assert results[0][key] == results[1][key]
    for name in ("brightness", "contrast"):
        assert abs(results[0]["rewards"][name]["after"]["mean"] - results[1]["rewards"][name]["after"]["mean"]) < 1e-9
    metrics = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("one", "two")]
    assert len(metrics[0]) == len(metrics[1]) == 1 + 3 + 1
    losses = [[json.loads(line)["train/loss"] for line in lines[1:4]] for lines in metrics]
    assert max(abs(a - b) for a, b in zip(*losses, strict=True)) < 1e-9


def test_command_line_under_accelerate_launch(model, tmp_path):
    """A batch that does not divide is one clear error on every process, and nothing is written."""
    values = tiny.values(model, tmp_path / "run", train={"batch_size": 3})
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    command = [*LAUNCH, "-m", "rftcore", "train", "draft", "--config", str(tmp_path / "run.yaml")]
    result = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
    assert result.returncode != 0
    assert "train.batch_size=3 does not divide into 2 process(es)" in result.stderr
    assert not (tmp_path / "run").exists()
    run([*command, "--train.batch_size", "2", "--train.max_train_steps", "1"])
    assert (tmp_path / "run" / "pytorch_lora_weights.safetensors").exists()

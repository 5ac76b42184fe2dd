"""The command line as a user types it, mistakes included."""

import subprocess
import sys
import time

import pytest


def rftcore(*arguments, cwd=None):
    return subprocess.run([sys.executable, "-m", "rftcore", *arguments], capture_output=True, text=True, cwd=cwd)


def test_help_is_quick_and_names_every_option():
    best = 9.0
    for _ in range(3):
        start = time.perf_counter()
        help_ = rftcore("train", "draft", "--help")
        best = min(best, time.perf_counter() - start)
    assert help_.returncode == 0
    for flag in ("--config", "--print_config", "--train.backprop_steps", "--lora.rank", "--resume_from_checkpoint"):
        assert flag in help_.stdout
    assert best < 1.0


def test_printed_config_can_be_given_back(tmp_path):
    first = rftcore("train", "draft", "--config", "digits_draft", "--train.learning_rate", "3e-5", "--print_config")
    assert first.returncode == 0
    assert "learning_rate: 3.0e-05" in first.stdout
    (tmp_path / "mine.yaml").write_text(first.stdout)
    assert rftcore("train", "draft", "--config", str(tmp_path / "mine.yaml"), "--print_config").stdout == first.stdout


def test_recipes_are_listed_and_copied(tmp_path):
    listed = rftcore("configs", "ls")
    assert listed.returncode == 0
    assert "digits_draft" in listed.stdout and "draft_sd15" in listed.stdout
    assert rftcore("configs", "cp", "digits_draft", str(tmp_path / "mine.yaml")).returncode == 0
    assert "output_dir" in (tmp_path / "mine.yaml").read_text()
    again = rftcore("configs", "cp", "digits_draft", str(tmp_path / "mine.yaml"))
    assert again.returncode == 2 and "exists already" in again.stderr


def test_info():
    info = rftcore("info")
    assert info.returncode == 0
    assert "sampler_step" in info.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "train,configs,info"),
        (["trian"], "invalid choice: 'trian'"),
        (["train", "drafft"], "invalid choice: 'drafft'"),
        (["train", "draft", "--config", "digit_draft"], "did you mean 'digits_draft'"),
        (["train", "draft", "--config", "missing.yaml"], "there is no such file"),
        (
            ["train", "draft", "--train.learning_rat", "1"],
            "unknown flag --train.learning_rat: did you mean '--train.learning_rate'",
        ),
        (["train", "draft", "--train.learning_rate", "fast"], "train.learning_rate"),
        (["train", "draft", "--train.learn", "1"], "unknown flag --train.learn"),
        (["train", "draft", "--mixed_precision", "fp8"], "mixed_precision"),
        (
            ["train", "draft", "--train.backprop_steps", "60"],
            "train.backprop_steps=60 must lie in [1, sampling.num_inference_steps=50]",
        ),
        (["configs", "cp", "digit_draft"], "did you mean 'digits_draft'"),
    ],
)
def test_mistakes_get_one_clear_message(arguments, message):
    result = rftcore(*arguments)
    assert result.returncode == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("train: {learning_rat: 0.1}", "unknown key 'train.learning_rat'; did you mean 'train.learning_rate'"),
        ("sede: 1", "unknown key 'sede'; did you mean 'seed'"),
        ("train: 3", "'train' is a group"),
        ("[1, 2]", "a mapping of option names to values is expected"),
        ("train: {batch_size: many}", "train.batch_size"),
        ("train: {batch_size: [", "not valid YAML"),
    ],
)
def test_mistakes_in_a_config_file(tmp_path, content, message):
    (tmp_path / "run.yaml").write_text(content)
    result = rftcore("train", "draft", "--config", str(tmp_path / "run.yaml"))
    assert result.returncode == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr

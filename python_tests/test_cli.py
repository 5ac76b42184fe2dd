"""The command line as a user types it, mistakes included."""

import os
import resource
import signal
import subprocess
import sys

import pytest

from rftcore import cli


def rftcore(*arguments, cwd=None):
    return subprocess.run([sys.executable, "-m", "rftcore", *arguments], capture_output=True, text=True, cwd=cwd)


def processor_seconds(*arguments):
    """The less of two runs, and the last one; a busy machine lengthens what a clock on the wall measures."""
    taken = []
    for _ in range(2):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = rftcore(*arguments)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        taken.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return min(taken), done


def test_help_is_quick_and_names_every_option():
    seconds, help_ = processor_seconds("train", "draft", "--help")
    assert help_.returncode == 0
    for flag in ("--config", "--print_config", "--train.backprop_steps", "--lora.rank", "--resume_from_checkpoint"):
        assert flag in help_.stdout
    assert seconds < 0.8
    # 0.25 s on a machine with nothing else to do.
    assert processor_seconds("--help")[0] < 0.7


def test_help_imports_little_and_adds_no_algorithms_options():
    code = """if True:
        import sys
        from rftcore import cli
        from rftcore.training import parsing
        cli.add_options = lambda *_: sys.exit("options were added")
        try:
            cli._parse(sys.argv[1:])
        except SystemExit as stopped:
            assert not stopped.code, stopped.code
        own = {name.partition(".")[0] for name in sys.modules} - {*sys.stdlib_module_names}
        # What an environment's .pth files import is none of ours.
        print(len(sys.modules), sorted(own & {"torch", "numpy", "PIL", "diffusers", "peft", "transformers", "accelerate"}))
    """
    for arguments in (["--help"], ["train", "--help"], ["plan", "--help"], ["lora", "mix", "--help"]):
        done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        count, heavy = done.stdout.splitlines()[-1].split(" ", 1)
        assert heavy == "[]" and int(count) < 350


def test_the_package_adds_little_to_torch_and_diffusers():
    code = """if True:
        import sys, time
        from diffusers import StableDiffusionPipeline, UNet2DConditionModel
        before, start = set(sys.modules), time.process_time()
        from rftcore import CheckpointedSampler, Trainer, accelerate, digits, rewards
        seconds, new = time.process_time() - start, set(sys.modules) - before
        print(f"{seconds:.2f}", len(new), *sorted({name.partition(".")[0] for name in new}))
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    seconds, count, *packages = done.stdout.split()
    # 0.2 s on a machine with nothing else to do; a third of it jsonargparse's.
    assert float(seconds) < 0.9 and int(count) < 400
    assert not {"scipy", "sklearn", "matplotlib", "tensorboard", "datasets", "triton", "bitsandbytes"} & {*packages}


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
def test_mistakes_get_one_clear_message(arguments, message, capsys):
    assert cli.main(arguments) == 2
    assert message in capsys.readouterr().err


def test_a_mistake_is_the_processes_status():
    result = rftcore("trian")
    assert result.returncode == 2
    assert "invalid choice: 'trian'" in result.stderr and "Traceback" not in result.stderr


def test_who_reads_may_have_enough():
    reading, writing = os.pipe()
    os.close(reading)
    result = subprocess.run([sys.executable, "-m", "rftcore", "configs", "ls"], stdout=writing, stderr=subprocess.PIPE)
    os.close(writing)
    assert result.returncode == 128 + signal.SIGPIPE and not result.stderr


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
def test_mistakes_in_a_config_file(tmp_path, content, message, capsys):
    (tmp_path / "run.yaml").write_text(content)
    assert cli.main(["train", "draft", "--config", str(tmp_path / "run.yaml")]) == 2
    assert message in capsys.readouterr().err

"""A whole run on the tiny pipeline: what it writes, what it proves, and what it says when it cannot go on."""

import json

import pytest
import tiny
import torch
import yaml
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from rftcore import cli
from rftcore.prompts import PromptsError
from rftcore.rewards import RewardSpecError, declare
from rftcore.training import RunError, Trainer, UsageError, load_config, weights


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(model, tmp_path_factory):
    """A finished run and its results."""
    folder = tmp_path_factory.mktemp("run") / "output"
    config = tiny.config(
        model, folder, report_to="tensorboard", checkpointing_steps=1, checkpoints_total_limit=2,
        eval={"lora_scales": [0.0, 0.5, 1.0]},
    )  # fmt: skip
    return folder, Trainer(config).train()


def test_everything_a_run_leaves_behind(finished):
    folder, results = finished
    names = {path.name for path in folder.iterdir()}
    assert names == {
        "README.md",
        "before_after.png",
        "checkpoint-2",
        "checkpoint-3",
        "config.yaml",
        "env.json",
        "logs",
        "lora_scales.png",
        "metrics.jsonl",
        "plan.json",
        "pytorch_lora_weights.safetensors",
        "results.json",
        "samples",
    }
    assert json.loads((folder / "results.json").read_text()) == results
    assert json.loads((folder / "env.json").read_text())["packages"]["torch"] == torch.__version__
    assert load_config("draft", folder / "config.yaml").output_dir == str(folder)
    assert any((folder / "logs").rglob("events.out.tfevents*"))
    assert (folder / "README.md").read_text().startswith("---\nlibrary_name: diffusers\n")
    with Image.open(folder / "before_after.png") as both, Image.open(folder / "samples" / "step-000000.png") as one:
        assert both.width > 2 * one.width


def test_metrics_lines(finished):
    folder, results = finished
    before, *steps, after = lines(folder)
    assert [line["step"] for line in (before, *steps, after)] == [0, 1, 2, 3, 3]
    for number, line in enumerate(steps, start=1):
        assert line["count/reward_queries"] == 2 * number
        # 2 samples, 2 branches of guidance, 3 sampled steps, none of which is replayed
        assert line["count/unet_evaluations"] == 2 * 2 * 3 * number
        assert line["train/loss"] == pytest.approx(-line["reward/brightness/mean"])
        assert line["train/lr"] == 1e-2
        assert line["train/grad_norm"] > 0
        parts = line["time/sample_s"] + line["time/reward_s"] + line["time/train_s"]
        assert 0 < parts <= line["time/epoch_s"]
        assert line["mem/peak_gib"] > 0
    assert before["eval/reward/brightness"] == results["rewards"]["brightness"]["before"]["mean"]
    assert after["eval/reward/contrast"] == results["rewards"]["contrast"]["after"]["mean"]


def test_results(finished):
    _, results = finished
    assert results["rewards"]["brightness"]["role"] == "trained"
    assert results["rewards"]["contrast"]["role"] == "held out"
    change = results["rewards"]["brightness"]
    assert change["change"]["mean"] == pytest.approx(change["after"]["mean"] - change["before"]["mean"])
    assert change["change"]["mean"] != 0
    assert results["evaluation"]["images"] == 2
    assert (results["reward_queries"], results["unet_evaluations"]) == (6, 36)
    assert results["lora_reload_error"] < 1e-4


def test_lora_file_loads_into_a_fresh_pipeline(finished, model):
    folder, _ = finished
    pipeline = StableDiffusionPipeline.from_pretrained(model, safety_checker=None)
    pipeline.load_lora_weights(folder)
    trained = load_file(folder / "checkpoint-3" / "trainable.safetensors")
    loaded = dict(pipeline.unet.named_parameters())
    for name, value in trained.items():
        assert torch.equal(loaded[name.replace(".default.", ".default_0.")], value)
        assert value.abs().sum() > 0
    with safe_open(folder / "pytorch_lora_weights.safetensors", "pt") as file:
        metadata = json.loads(file.metadata()["lora_adapter_metadata"])
        assert all(name.startswith("unet.") and "lora" in name for name in file.keys())  # noqa: SIM118
    assert (metadata["unet.r"], metadata["unet.lora_alpha"]) == (2, 2)


def test_reward_rises(model, tmp_path):
    """Enough steps on one prompt and the trained reward must be higher than before."""
    config = tiny.config(
        model,
        tmp_path / "run",
        prompts=tiny.TRAIN_PROMPTS[:1],
        train={"max_train_steps": 12, "learning_rate": 0.1, "backprop_steps": 3},
    )
    change = Trainer(config).train()["rewards"]["brightness"]["change"]
    assert change["mean"] > 3 * change["standard_error"] > 0


def test_reload_verification_refuses_a_lora_that_does_nothing(finished, model, tmp_path):
    """A file whose B is zero loads without complaint; only comparing outputs finds it."""
    folder, _ = finished
    unet = StableDiffusionPipeline.from_pretrained(model, safety_checker=None).unet
    weights.attach(unet, tiny.config(model, tmp_path), seed=0)
    weights.save(unet, tmp_path)
    with torch.no_grad():
        for parameter in weights.trainable(unet).values():
            parameter.add_(0.1)
    with pytest.raises(RunError, match="does not reload"):
        weights.verify_reload(unet, tmp_path)
    weights.save(unet, tmp_path)
    assert weights.verify_reload(unet, tmp_path) < 1e-4


def test_cut_adapter_is_named_on_step_1(model, tmp_path):
    trainer = Trainer(tiny.config(model, tmp_path / "run"))
    broken = trainer.engine.model.down_blocks[0].attentions[0].transformer_blocks[0].attn1.to_k
    broken.lora_B["default"].register_forward_hook(lambda module, inputs, output: output.detach())
    with pytest.raises(RunError, match=r"1 of 32 adapted modules.*down_blocks.0.attentions.0.*attn1.to_k"):
        trainer.train()


def test_adapter_that_never_runs_is_only_warned_about(model, tmp_path):
    trainer = Trainer(tiny.config(model, tmp_path / "run", lora={"target_modules": ["to_q", "linear_2"]}))
    idle = trainer.engine.model.time_embedding
    idle.linear_2.forward, base = idle.linear_2.base_layer.forward, idle.linear_2
    idle.forward = lambda sample, condition=None: base.base_layer(idle.act(idle.linear_1(sample)))
    with pytest.warns(UserWarning, match="1 adapted module.*time_embedding.linear_2"):
        trainer.train()


@pytest.mark.parametrize(
    ("reward", "error", "message"),
    [
        ("contrast", RewardSpecError, "DRaFT follows the reward's gradient.*contrast"),
        ("undeclared", RewardSpecError, "does not declare whether it is differentiable"),
        ("detached", RunError, "detached.*cut the graph"),
        ("scalar", RunError, r"scalar.*shape \(\).*must return.*\(2,\)"),
        ("not_a_number", RunError, "not_a_number.*nan"),
        ("flat", RunError, "no adapted module received a gradient"),
    ],
)
def test_rewards_that_cannot_be_trained_on(model, tmp_path, reward, error, message):
    with pytest.raises(error, match=message):
        Trainer(
            tiny.config(model, tmp_path / "run", reward={"function": f"tiny.{reward}"}, eval={"held_out_reward": None})
        ).train()


@pytest.mark.parametrize(
    ("flags", "status", "message"),
    [
        (["--reward.function", "tiny.not_a_number"], 1, "not_a_number"),
        (
            ["--reward.function", "tiny.contrast", "--eval.held_out_reward", "null"],
            2,
            "DRaFT follows the reward's gradient",
        ),
        (["--prompts", "prompts.txt"], 2, "prompts.txt' are empty"),
        (["--output_dir", "."], 2, "output_dir=. is not empty"),
    ],
)
def test_exit_status_of_the_command(model, tmp_path, monkeypatch, capsys, flags, status, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("# none yet\n")
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tiny.values(model, tmp_path / "run")))
    assert cli.main(["train", "draft", "--config", "run.yaml", *flags]) == status
    stderr = capsys.readouterr().err
    assert stderr.splitlines()[-1].startswith("rftcore: error: ")
    assert message in stderr


def test_functions_and_a_pipeline_from_python(model, tmp_path):
    pipeline = StableDiffusionPipeline.from_pretrained(model, safety_checker=None)

    @declare(differentiable=True, unit="ink")
    def ink(images, prompts, metadata):
        return 1 - images.mean(dim=(1, 2, 3))

    config = tiny.config("not/used", tmp_path / "run", train={"max_train_steps": 1})
    results = Trainer(config, reward=ink, held_out_reward=tiny.contrast, pipeline=pipeline).train()
    assert results["rewards"]["ink"]["unit"] == "ink"


@pytest.mark.parametrize(
    ("groups", "error", "message"),
    [
        ({"lora": {"target_modules": ["to_z"]}}, UsageError, "lora.target_modules=.*to_z"),
        ({"sampling": {"resolution": 15}}, UsageError, "sampling.resolution=15 must be a multiple of 2"),
        ({"train": {"gradient_accumulation_steps": 3}}, UsageError, "train.batch_size=2 does not divide"),
        ({"prompts": "missing.txt"}, PromptsError, "missing.txt cannot be read"),
        ({"model": {"pretrained_model_name_or_path": "/nowhere"}}, UsageError, "'/nowhere' does not load"),
        ({"resume_from_checkpoint": "latest"}, UsageError, "holds no complete checkpoint"),
        ({"resume_from_checkpoint": "/nowhere"}, UsageError, "/nowhere does not exist"),
        ({"eval": {"held_out_reward": "tiny.brightness"}}, UsageError, "both named 'brightness'"),
    ],
)
def test_requests_that_cannot_work_write_nothing(model, tmp_path, groups, error, message):
    with pytest.raises(error, match=message):
        Trainer(tiny.config(model, tmp_path / "run", **groups))
    assert not (tmp_path / "run").exists()


def test_output_folder_with_something_in_it_is_left_alone(model, tmp_path):
    (tmp_path / "thesis.tex").write_text("irreplaceable")
    with pytest.raises(UsageError, match="not empty; continue that run with --resume_from_checkpoint latest"):
        Trainer(tiny.config(model, tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_batch_of_8_is_8_accumulated_singles(model, tmp_path):
    """In fp64, through the optimizer: two steps, every LoRA weight within 1e-11 of the other's."""
    loras = []
    for accumulation in (1, 8):
        pipeline = StableDiffusionPipeline.from_pretrained(model, safety_checker=None).to(torch.float64)
        train = {"max_train_steps": 2, "batch_size": 8, "gradient_accumulation_steps": accumulation}
        trainer = Trainer(tiny.config(model, tmp_path / str(accumulation), train=train), pipeline=pipeline)
        trainer.train()
        loras.append(
            torch.cat([weight.detach().flatten() for weight in weights.trainable(trainer.engine.model).values()])
        )
    assert loras[0].dtype == torch.float64
    assert torch.linalg.norm(loras[0] - loras[1]) <= 1e-11 * torch.linalg.norm(loras[0])


def test_noise_in_sampling_is_each_samples_own(model, tmp_path):
    """With eta = 1 too, a batch computed in parts sees the noise that it sees in one piece."""
    first = []
    for accumulation in (1, 2):
        train = {"max_train_steps": 1, "gradient_accumulation_steps": accumulation}
        groups = {"train": train, "sampling": {"eta": 1.0}}
        Trainer(tiny.config(model, tmp_path / str(accumulation), **groups)).train()
        first.append(lines(tmp_path / str(accumulation))[1]["reward/brightness/mean"])
    assert first[0] == pytest.approx(first[1], rel=1e-5)

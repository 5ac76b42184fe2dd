"""examples/: each trains as a user would run it, on the digits pipeline and few steps."""

import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import StableDiffusionPipeline

import rftcore
from examples import ddpo_pytorch_loop, diffusers_script, plain_pytorch

SMALL = ["--num_inference_steps=2", "--reward=brightness", "--learning_rate=5e-2"]


@pytest.fixture(autouse=True)
def _one_accelerator():
    """Of the tests before, and of each of these."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def test_plain_pytorch_learns(capsys):
    arguments = [*SMALL, "--num_inference_steps=3", "--backprop_steps=2", "--steps=4", "--batch_size=2"]
    rewards = plain_pytorch.train(plain_pytorch.options(arguments))
    assert len(rewards) == 4 and rewards[-1] > rewards[0] + 0.05
    assert "2 of 3 steps differentiated" in capsys.readouterr().out


@pytest.mark.parametrize("precision", ["no", pytest.param("bf16", marks=pytest.mark.slow)])
def test_diffusers_script_saves_a_lora_that_diffusers_loads(precision, tmp_path):
    arguments = [*SMALL, f"--mixed_precision={precision}", "--train_batch_size=1", "--max_train_steps=3"]
    rewards = diffusers_script.main(diffusers_script.options([*arguments, f"--output_dir={tmp_path}"]))
    assert len(rewards) == 3

    pipe = StableDiffusionPipeline.from_pretrained(rftcore.digits.path())
    pipe.set_progress_bar_config(disable=True)
    settings = {"num_inference_steps": 2, "guidance_scale": 2.0, "output_type": "pt"}

    def brightness():
        generator = torch.Generator().manual_seed(0)
        return pipe(["a handwritten seven", "the digit two"], generator=generator, **settings).images.mean().item()

    before = brightness()
    pipe.load_lora_weights(tmp_path)
    assert brightness() > before + 0.05


def test_ddpo_pytorch_loop_starts_from_a_ratio_of_one(monkeypatch):
    ratios = []

    def recorded(log_prob, old_log_prob, *arguments):
        ratios.append((log_prob - old_log_prob).exp().detach())
        return loss(log_prob, old_log_prob, *arguments)

    loss = ddpo_pytorch_loop.importance_sampling
    monkeypatch.setattr(ddpo_pytorch_loop, "importance_sampling", recorded)
    arguments = ["--num_steps=3", "--epochs=2", "--sample_batch_size=2", "--train_batch_size=2"]
    means = ddpo_pytorch_loop.main(ddpo_pytorch_loop.options(arguments))
    first, then = torch.stack(ratios).split([3, 9])
    assert len(means) == 2 and means[0] != means[1]
    # Two updates an epoch: the first is made by the model that sampled, the second is not.
    assert (first - 1).abs().max() < 1e-5
    assert (then[:3] - 1).abs().max() > 1e-5
    assert (then[3:6] - 1).abs().max() < 1e-5


def test_trl_trainers_sample_by_the_sampler(tmp_path):
    try:
        from examples import trl_trainer
    except ImportError as error:
        assert "TRL 0.23.1 is needed" in str(error)
        pytest.skip(str(error))
    for trainer in ("alignprop", "ddpo"):
        arguments = [f"--trainer={trainer}", "--num_steps=4", "--batch_size=2", "--epochs=2", "--learning_rate=1e-2"]
        means = trl_trainer.main(
            trl_trainer.options([*arguments, f"--output_dir={tmp_path}/{trainer}", "--reward=brightness"])
        )
        assert len(means) == 2 and means[0] != means[1]
        AcceleratorState._reset_state(reset_partial_state=True)

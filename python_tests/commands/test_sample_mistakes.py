"""`rftcore sample`: what a user can get wrong, and what the message says."""

import pytest
import torch
from diffusers import PNDMScheduler
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from samples import PROMPTS, sample, sdxl_pipeline, stock

from rftcore import cli
from rftcore.commands import sample as sample_command
from rftcore.commands.sample_options import SampleOptions
from rftcore.errors import RunError, UsageError
from rftcore.lora import files, loading
from rftcore.training import weights as training_weights


def edited(loras, target, edit):
    """A LoRA file whose state dict `edit` changed."""
    weights = load_file(loras[0] / training_weights.FILE)
    edit(weights)
    save_file(weights, target)
    return str(target)


def of_another_width(weights):
    key = next(key for key in weights if "attn2.to_k.lora_A" in key)
    weights[key] = torch.zeros(3, 2048)


def of_another_depth(weights):
    for key in [key for key in weights if "mid_block" in key]:
        weights[key.replace("mid_block", "down_blocks.7")] = weights.pop(key)


def in_pefts_layout(weights):
    for key in list(weights):
        weights[key.replace("unet.", "base_model.model.")] = weights.pop(key)


def of_no_part(weights):
    weights["vae.conv_in.lora_A.weight"] = torch.zeros(3, 4)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            of_another_width,
            r"of another base model: \S+attn2.to_k.lora_A.weight is \(3, 2048\), .* has 64 inputs, not 2048",
        ),
        (of_another_depth, r"of another base model: it adapts down_blocks.7\S+, and this UNet has no such layer"),
        (in_pefts_layout, "in PEFT's layout, whose alpha is in adapter_config.json, and there is none beside"),
        (of_no_part, "vae.conv_in.lora_A.weight belongs to no part of a Stable Diffusion pipeline"),
        (lambda w: w.update({"unet.x.dora_scale": torch.ones(1)}), r"is a DoRA \(unet.x.dora_scale\)"),
        (lambda w: w.clear(), "holds no weights"),
    ],
)
def test_loras_that_do_not_fit(edit, message, loras, tmp_path):
    path = edited(loras, tmp_path / "other.safetensors", edit)
    with pytest.raises(UsageError, match=message):
        sample(tmp_path / "out", lora=[path])
    assert not (tmp_path / "out").exists()


def test_lora_arguments(loras, tmp_path):
    file = loras[0] / training_weights.FILE
    assert files.parse(f"{loras[0]}:-0.5") == (file, -0.5)
    assert files.parse(str(file)) == (file, 1.0)
    (tmp_path / "broken.safetensors").write_bytes(b"no tensors")
    (tmp_path / "weights.bin").touch()
    for argument, message in {
        f"{loras[0]}:much": "'much' is no number",
        f"{loras[0]}:nan": "must be a finite number",
        str(tmp_path): f"holds no {training_weights.FILE}",
        str(tmp_path / "none.safetensors"): "there is no file or folder",
        str(tmp_path / "weights.bin"): "is no .safetensors file",
    }.items():
        with pytest.raises(UsageError, match=message):
            files.parse(argument)
    with pytest.raises(UsageError, match="no readable safetensors file"):
        loading.load(stock(), [files.parse(str(tmp_path / "broken.safetensors"))])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": None}, "there are no prompts"),
        ({"prompts": "a.txt", "prompt": ["a"]}, "both given"),
        ({"scheduler": "dpm"}, r"--scheduler dpm is unknown; did you mean 'd\w+"),
        ({"dtype": "float8"}, "--dtype float8 is unknown"),
        ({"merge_lora": True}, "nothing to merge"),
        ({"images_per_prompt": 0, "batch_size": -1}, "--images_per_prompt 0 .*; --batch_size -1"),
        ({"guidance_scale": float("inf")}, "--guidance_scale inf"),
        ({"eta": 2.0}, "--eta 2.0 must lie in"),
        ({"scheduler": "ddpm", "eta": 0.5}, "cannot be sampled with --scheduler ddpm: eta=0.5"),
        ({"resolution": 33}, r"--resolution 33 must be a multiple of \d, .* the nearest is 3[24]"),
        ({"model": "nobody/nothing-here"}, "--model 'nobody/nothing-here' does not load: .* set --model to it"),
        ({"lora_scales": [0.5]}, "--lora_scales has nothing to scale"),
        ({"lora": ["a"], "lora_scales": [0.5, float("nan")]}, r"--lora_scales \[0.5, nan\] must be finite"),
        ({"lora": ["a"], "interpolate": True}, "--interpolate goes from one LoRA to another, and there are 1"),
        ({"guidance_scale": 0.5}, "--guidance_scale 0.5 must be a number of at least 1"),
        ({"clip_skip": 9}, "--clip_skip 9"),
        ({"clip_skip": -1}, "--clip_skip -1 must be at least 0"),
    ],
)
def test_requests_that_cannot_work(options, message, tmp_path, monkeypatch):
    # What is not there need not be asked for again and again.
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    given = {"output_dir": str(tmp_path / "out"), "prompt": PROMPTS, **options}
    with pytest.raises(UsageError, match=message):
        sample_command.sample(SampleOptions(**given))
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=r"--output_dir \S+file/out cannot be made .*; give another"):
        sample(tmp_path / "file" / "out", num_inference_steps=1)


def test_out_of_memory(monkeypatch, tmp_path):
    def decode(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 7 GiB")

    monkeypatch.setattr(sample_command, "decode", decode)
    with pytest.raises(RunError, match=r"--batch_size 4; lower it.* 7 GiB"):
        sample(tmp_path / "out")


def test_a_pipelines_own_scheduler_that_is_not_served(monkeypatch, tmp_path):
    def load(options):
        pipe = stock()
        pipe.scheduler = PNDMScheduler.from_config(pipe.scheduler.config)
        return pipe

    monkeypatch.setattr(sample_command, "_load", load)
    with pytest.raises(UsageError, match="cannot be sampled with its own scheduler: .*PNDM.*--scheduler takes ddim"):
        sample(tmp_path / "a")
    found, _ = sample(tmp_path / "b", scheduler="ddim")
    assert len(found) == 2


def test_a_lora_given_as_the_model(loras, tmp_path):
    with pytest.raises(UsageError, match="is a LoRA; give the model that it is for, and the LoRA as --lora"):
        sample(tmp_path / "out", model=str(loras[0] / training_weights.FILE))


def test_an_sdxl_lora_on_a_small_model_names_the_first_key(loras, tmp_path):
    pipe = sdxl_pipeline(tmp_path)
    with pytest.raises(UsageError, match=r"another base model: \S+lora_A.weight is \(3, 48"):
        loading.load(pipe, [files.parse(str(loras[0]))])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--promt", "a"], "did you mean '--prompt'"),
        (["--output_dir", "o", "--prompt", "a", "--lora", "x.safetensors"], "there is no file or folder x.safetensors"),
        (["--output_dir", "o", "--prompts", "none.txt"], "none.txt cannot be read"),
        (["--output_dir", "o", "--prompt", "a", "--scheduler", "eulr"], "did you mean 'euler'"),
    ],
)
def test_mistakes_get_one_clear_message(arguments, message, capsys):
    assert cli.main(["sample", *arguments]) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.out == ""

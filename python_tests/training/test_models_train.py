"""`rftcore train` takes one step on each kind of model, with `model:` and its own sampling changed and nothing else."""

import json
import warnings

import original_layout
import pytest
import tiny
import tiny_models
import torch
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file

from rftcore import cli
from rftcore.training import pipeline
from rftcore.training.config import ModelConfig


def load(path):
    return pipeline.load(ModelConfig(pretrained_model_name_or_path=str(path)), torch.float32)


@pytest.fixture(scope="module")
def models(folders, tmp_path_factory):
    """name -> (kind, the group `model:`)."""
    root = tmp_path_factory.mktemp("models")

    def folder(name):
        (root / name).mkdir()
        return root / name

    for kind in tiny_models.VARIANT_BUILDERS:
        tiny_models.save(kind, folder(kind))
    load(folders["sd"]).to(torch.float16).save_pretrained(folder("half"), variant="fp16")
    file = original_layout.save(load(root / "sd2"), root / "sd2.safetensors", open_clip=True)
    load(folders["sdxl"]).vae.save_pretrained(folder("vae"))
    return {
        "sd, fp16 variant": ("sd", {"pretrained_model_name_or_path": root / "half", "variant": "fp16"}),
        "sd2, one file": ("sd2", {"pretrained_model_name_or_path": file, "original_config": root / "sd2"}),
        "sdxl, another VAE": ("sdxl", {"pretrained_model_name_or_path": folders["sdxl"], "vae": root / "vae"}),
        "sdxl turbo": ("turbo", {"pretrained_model_name_or_path": root / "turbo"}),
        "lcm": ("lcm", {"pretrained_model_name_or_path": root / "lcm"}),
        "lcm lora": (
            "lcm",
            {"pretrained_model_name_or_path": folders["sd"], "fuse_lora": [f"{_lora(folders['sd'], root)}:0.5"]},
        ),
        "unconditional": ("pixels", {"pretrained_model_name_or_path": folders["pixels"]}),
    }


def _lora(base, folder):
    pipe = load(base)
    pipe.unet.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "conv1"], init_lora_weights=False))
    type(pipe).save_lora_weights(folder, unet_lora_layers=get_peft_model_state_dict(pipe.unet))
    return folder


# Each class of pipeline with both; of what differs in its files or settings alone, one.
RUNS = [
    ("sd2, one file", "draft"),
    ("sdxl, another VAE", "ddpo"),
    ("lcm", "draft"),
    ("unconditional", "ddpo"),
    pytest.param("lcm lora", "draft", marks=pytest.mark.slow),
    pytest.param("sd, fp16 variant", "ddpo", marks=pytest.mark.slow),
    pytest.param("sdxl turbo", "ddpo", marks=pytest.mark.slow),
    pytest.param("sd2, one file", "ddpo", marks=pytest.mark.slow),
    pytest.param("sdxl, another VAE", "draft", marks=pytest.mark.slow),
    pytest.param("lcm", "ddpo", marks=pytest.mark.slow),
]


def train(algorithm, kind, model, folder):
    sampling = {"num_inference_steps": 2, **tiny_models.SAMPLING[kind]}
    own = {"backprop_steps": 1} if algorithm == "draft" else {"samples_per_epoch": 2, "batch_size": 2}
    if algorithm == "ddpo":
        # DDIM's alone.
        sampling["eta"] = None if "scheduler" in sampling else 1.0
    values = tiny.values(
        "",
        folder,
        sampling=sampling,
        eval={"lora_scales": [], "held_out_reward": None, "validation_prompts": ["a one"]},
    )
    values["model"] = {key: str(value) if key != "fuse_lora" else value for key, value in model.items()}
    values["train"] = {"max_train_steps": 1, "batch_size": 2, "learning_rate": 1e-2, **own}
    config = folder.with_suffix(".json")
    config.write_text(json.dumps(values))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return cli.main(["train", algorithm, "--config", str(config)])


@pytest.mark.parametrize(("name", "algorithm"), RUNS)
def test_a_step_is_trained(models, tmp_path, name, algorithm, capsys):
    kind, model = models[name]
    status = train(algorithm, kind, model, tmp_path / "run")
    assert status == 0, capsys.readouterr().err
    figures = json.loads((tmp_path / "run" / "results.json").read_text())
    assert figures["steps"] == 1
    weights = "adapter_model.safetensors" if kind == "pixels" else "pytorch_lora_weights.safetensors"
    state = load_file(tmp_path / "run" / weights)
    trained = [value for key, value in state.items() if "lora_B" in key]
    assert trained and all(value.any() for value in trained)

"""The lines of Python that a model card gives make the pipeline that was trained."""

import original_layout
import pytest
import torch
from peft import LoraConfig, get_peft_model_state_dict

from rftcore.training import pipeline
from rftcore.training.config import ModelConfig
from rftcore.training.models import usage


def tensors(pipe):
    models = {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    return {f"{name}.{key}": value for name, model in models.items() for key, value in model.state_dict().items()}


@pytest.fixture(scope="module")
def configs(folders, tmp_path_factory):
    root = tmp_path_factory.mktemp("usage")
    pipe = pipeline.load(ModelConfig(str(folders["sd"])), torch.float32)
    pipe.vae.decoder.conv_in.weight.data += 1
    pipe.save_pretrained(root / "other", variant="fp16")
    pipe.vae.save_pretrained(root / "vae")
    file = original_layout.save(pipe, root / "one.safetensors")
    pipe.unet.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q"], init_lora_weights=False))
    type(pipe).save_lora_weights(root, unet_lora_layers=get_peft_model_state_dict(pipe.unet))
    vae_file = str(root / "vae" / "diffusion_pytorch_model.safetensors")
    return {
        "digits": ModelConfig(),
        "a variant": ModelConfig(str(root / "other"), variant="fp16"),
        "a file": ModelConfig(str(file), original_config=str(folders["sd"])),
        "a file, its VAE, LoRAs": ModelConfig(
            str(file),
            original_config=str(folders["sd"]),
            vae=vae_file,
            fuse_lora=[f"{root}:0.5", str(root)],
        ),
        "a pipeline's VAE": ModelConfig(str(folders["sd"]), vae=str(folders["sd"])),
    }


@pytest.mark.parametrize("name", ["digits", "a variant", "a file", "a file, its VAE, LoRAs", "a pipeline's VAE"])
def test_the_lines_make_the_pipeline(configs, name):
    expected = pipeline.load(configs[name], torch.float32)
    namespace = {}
    exec(usage.lines(configs[name], type(expected)), namespace)
    made = namespace["pipeline"]
    assert type(made) is type(expected)
    ours, theirs = tensors(made), tensors(expected)
    assert ours.keys() >= theirs.keys()
    assert all(torch.allclose(ours[key], value, atol=1e-6) for key, value in theirs.items())
    assert dict(made.scheduler.config) == dict(expected.scheduler.config)

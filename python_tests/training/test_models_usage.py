"""The lines of Python that a model card gives make the pipeline that was trained."""

import shlex

import original_layout
import pytest
import torch
from peft import LoraConfig, get_peft_model_state_dict

from rftcore import cli
from rftcore.lora import files
from rftcore.lora.layers import Layer, Lora
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


@pytest.mark.parametrize("layout", ["kohya", "kohya of one alpha", "peft"])
def test_the_lines_of_a_lora_that_diffusers_reads_otherwise(folders, tmp_path, monkeypatch, layout):
    """They say first how it is converted."""
    monkeypatch.chdir(tmp_path)
    names = ["unet.mid_block.attentions.0.proj_in", "unet.mid_block.attentions.0.proj_out"]
    alphas = (2.0, 2.0 if "one" in layout else 5.0)
    layers = {
        name: Layer(torch.randn(2, 16, 1, 1), torch.randn(16, 2, 1, 1), alpha)
        for name, alpha in zip(names, alphas, strict=True)
    }
    name = "a b" if layout == "peft" else "a.safetensors"
    files.write(Lora(layers), tmp_path / name, layout.partition(" ")[0])
    config = ModelConfig(str(folders["sd"]), fuse_lora=[f"{name}:0.5"])
    expected = pipeline.load(config, torch.float32)
    text = usage.lines(config, type(expected))
    commands = [line.partition("# After: ")[2] for line in text.splitlines() if line.startswith("# After: ")]
    assert len(commands) == ("one" not in layout)
    for command in commands:
        assert cli.main(shlex.split(command)[1:]) == 0
    namespace = {}
    exec(text, namespace)
    theirs = tensors(namespace["pipeline"])
    assert all(torch.allclose(theirs[key], value, atol=1e-6) for key, value in tensors(expected).items())


def test_the_lines_of_a_lora_that_is_fused_into_a_model_without_a_text(folders, tmp_path, monkeypatch):
    """Its pipeline loads no LoRA: PEFT does."""
    monkeypatch.chdir(tmp_path)
    name = "unet.mid_block.resnets.0.conv1"
    base = tensors(pipeline.load(ModelConfig(str(folders["pixels"])), torch.float32))[f"{name}.weight"]
    layer = Layer(torch.randn(2, *base.shape[1:]), torch.randn(base.shape[0], 2, 1, 1), 3.0)
    files.write(Lora({name: layer}), tmp_path / "a.safetensors", "diffusers")
    config = ModelConfig(str(folders["pixels"]), fuse_lora=["a.safetensors:0.5"])
    expected = pipeline.load(config, torch.float32)
    text = usage.lines(config, type(expected))
    (commands,) = [line.partition("# After: ")[2] for line in text.splitlines() if line.startswith("# After: ")]
    for command in commands.split(" && "):
        assert cli.main(shlex.split(command)[1:]) == 0
    namespace = {}
    exec(text, namespace)
    theirs = tensors(namespace["pipeline"])
    assert not torch.allclose(theirs[f"{name}.weight"], base)
    assert all(torch.allclose(theirs[key], value, atol=1e-6) for key, value in tensors(expected).items())

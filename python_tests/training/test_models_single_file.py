"""A checkpoint that is one file, in the original layout, is the pipeline that it was written from."""

import json
import pickle
import shutil

import huggingface_hub
import original_layout
import pytest
import tiny_models
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors.torch import load_file, save_file

from rftcore.training import UsageError, pipeline
from rftcore.training.config import ModelConfig

FIRST = "model.diffusion_model.input_blocks.0.0.weight"


@pytest.fixture(scope="module")
def made(folders, tmp_path_factory):
    """kind -> (folder of the pipeline, its one file)."""
    root, found = tmp_path_factory.mktemp("single"), {}
    for kind, suffix in (("sd", "ckpt"), ("sd2", "safetensors"), ("sdxl", "safetensors")):
        folder = folders.get(kind) or root / kind
        if kind not in folders:
            folder.mkdir()
            tiny_models.save(kind, folder)
        pipe = load(folder)
        found[kind] = folder, original_layout.save(pipe, root / f"{kind}.{suffix}", open_clip=kind == "sd2")
    return found


def load(path, dtype=torch.float32, unet_dtype=None, **options):
    return pipeline.load(ModelConfig(pretrained_model_name_or_path=str(path), **options), dtype, unet_dtype)


def tensors(pipe):
    models = {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    return {f"{name}.{key}": value for name, model in models.items() for key, value in model.state_dict().items()}


@pytest.mark.parametrize("kind", ["sd", "sd2", "sdxl"])
def test_a_file_is_the_pipeline_that_it_was_written_from(made, kind):
    folder, file = made[kind]
    pipe, expected = load(file, original_config=str(folder)), load(folder)
    assert type(pipe) is (StableDiffusionXLPipeline if kind == "sdxl" else StableDiffusionPipeline)
    theirs = tensors(expected)
    ours = tensors(pipe)
    assert ours.keys() == theirs.keys()
    assert [key for key in theirs if not torch.equal(ours[key], theirs[key])] == []
    assert dict(pipe.scheduler.config) == dict(expected.scheduler.config)
    assert pipe.tokenizer("a handwritten one").input_ids == expected.tokenizer("a handwritten one").input_ids


def test_precisions_of_a_file(made):
    folder, file = made["sd2"]
    pipe = load(file, torch.bfloat16, torch.float32, original_config=str(folder))
    assert (pipe.unet.dtype, pipe.vae.dtype, pipe.text_encoder.dtype) == (torch.float32, *[torch.bfloat16] * 2)


def test_averaged_weights_are_taken_where_a_file_has_both(made, tmp_path):
    """As the unpruned files of SD 1 do: what is sampled from is the average."""
    folder, file = made["sd2"]
    state = load_file(file)
    prefix = "model.diffusion_model."
    for key in [key for key in state if key.startswith(prefix)]:
        state["model_ema.diffusion_model" + key.removeprefix(prefix).replace(".", "")] = state[key] * 2
    save_file(state, tmp_path / "both.safetensors")
    pipe = load(tmp_path / "both.safetensors", original_config=str(folder))
    assert torch.equal(pipe.unet.conv_in.weight, load(folder).unet.conv_in.weight * 2)


def test_a_file_without_its_vae_takes_the_one_that_is_given(made, tmp_path):
    folder, file = made["sdxl"]
    state = {key: value for key, value in load_file(file).items() if not key.startswith("first_stage_model.")}
    save_file(state, tmp_path / "no_vae.safetensors")
    with pytest.raises(UsageError, match="no_vae.safetensors holds no VAE .*set model.vae"):
        load(tmp_path / "no_vae.safetensors", original_config=str(folder))
    pipe = load(tmp_path / "no_vae.safetensors", original_config=str(folder), vae=str(folder / "vae"))
    assert torch.equal(pipe.vae.decoder.conv_in.weight, load(folder).vae.decoder.conv_in.weight)


def _refiner(state):
    moved = {
        key.replace("embedders.1.", "embedders.0."): value for key, value in state.items() if "embedders.1." in key
    }
    return {key: value for key, value in state.items() if "embedders." not in key} | moved


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_refiner, "is SDXL's refiner, which is not served: fine-tune the base model"),
        (lambda s: s | {FIRST: torch.zeros(8, 9, 3, 3)}, "takes 9 channels and gives 4, so it is an inpainting"),
        (lambda s: {"joint_blocks.0.x": torch.zeros(1)}, "is Stable Diffusion 3.*not served"),
        (lambda s: {"model.diffusion_model.double_blocks.0.x": torch.zeros(1)}, "is Flux.*not served"),
        (lambda s: {"lora_unet_x.lora_down.weight": torch.zeros(1)}, "is a LoRA; .*model.fuse_lora"),
        (
            lambda s: {k.removeprefix("first_stage_model."): v for k, v in s.items() if "first_stage" in k},
            "a VAE alone",
        ),
        (lambda s: {k: v for k, v in s.items() if "conditioner" not in k}, "no text encoder that is known"),
        (lambda s: {"weight": torch.zeros(1)}, "no checkpoint of a whole model: it has no model.diffusion_model"),
        (
            lambda s: {k: v for k, v in s.items() if "middle_block.1." not in k},
            "lacks weights that the configs of .* ask for",
        ),
        (
            lambda s: {k: v for k, v in s.items() if "resblocks.1.ln_1" not in k},
            "lacks 2 weights of its text_encoder_2, .*layers.1.layer_norm1",
        ),
        (lambda s: s | {"v_pred": torch.zeros(0)}, "marked as a model of v-prediction.*say epsilon"),
        (lambda s: s | {FIRST: s[FIRST] * float("nan")}, "values of unet.conv_in.weight are NaN or inf"),
    ],
)
def test_files_that_are_refused(made, tmp_path, change, message):
    folder, file = made["sdxl"]
    save_file({key: value.contiguous() for key, value in change(load_file(file)).items()}, tmp_path / "x.safetensors")
    with pytest.raises(UsageError, match=message):
        load(tmp_path / "x.safetensors", original_config=str(folder))


def test_configs_of_another_model(made, folders):
    with pytest.raises(
        UsageError, match="sdxl.safetensors is SDXL, and model.original_config=.* of a StableDiffusionPipe"
    ):
        load(made["sdxl"][1], original_config=str(made["sd"][0]))
    with pytest.raises(UsageError, match="sd2.safetensors is Stable Diffusion 2 and does not load|lacks"):
        config = json.loads((made["sd2"][0] / "unet" / "config.json").read_text())
        other = made["sd2"][0].parent / "other"
        shutil.copytree(made["sd2"][0], other)
        (other / "unet" / "config.json").write_text(json.dumps(config | {"block_out_channels": [8, 24]}))
        load(made["sd2"][1], original_config=str(other))
    with pytest.raises(UsageError, match="original_config=.* is for a checkpoint that is one file"):
        load(folders["sd"], original_config=str(folders["sd"]))
    with pytest.raises(UsageError, match="model.variant='fp16'.*is one file; leave both null"):
        load(made["sd"][1], original_config=str(folders["sd"]), variant="fp16")


def test_a_file_without_configs_says_what_to_fetch_and_where_to_put_it(made, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        UsageError,
        match="is Stable Diffusion 1, .*not in the file: .*hf download stable-diffusion-v1-5/stable-diffusion-v1-5 "
        "--include.*set model.original_config",
    ):
        load(made["sd"][1])
    with pytest.raises(UsageError, match="hf download nobody/nothing"):
        load(made["sdxl"][1], original_config="nobody/nothing")
    # Two models of the same shapes: one would be sampled with the other's prediction.
    with pytest.raises(UsageError, match="do not tell noise from v-prediction; set model.original_config"):
        load(made["sd2"][1])


class Code:
    def __reduce__(self):
        return print, ("run",)


def test_files_that_cannot_be_read(tmp_path, capsys):
    with open(tmp_path / "code.ckpt", "wb") as file:
        pickle.dump({"state_dict": Code()}, file)
    with pytest.raises(UsageError, match="does not load as tensors alone.*may run code.*as .safetensors"):
        load(tmp_path / "code.ckpt")
    torch.save({"state_dict": {"x": torch.zeros(1), "callbacks": Code()}}, tmp_path / "zip.ckpt")
    with pytest.raises(UsageError, match="does not load as tensors alone"):
        load(tmp_path / "zip.ckpt")
    assert "run" not in capsys.readouterr().out
    (tmp_path / "broken.safetensors").write_bytes(b"version https://git-lfs")
    with pytest.raises(UsageError, match="no readable safetensors file"):
        load(tmp_path / "broken.safetensors")
    (tmp_path / "model.gguf").write_bytes(b"")
    with pytest.raises(UsageError, match="must be .safetensors or .ckpt"):
        load(tmp_path / "model.gguf")

"""Variants, another VAE, LoRAs that are fused in, and weights that are broken."""

import shutil

import pytest
import torch
from diffusers import UNet2DConditionModel
from original_layout import vae as original_vae
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from rftcore.training import UsageError, pipeline
from rftcore.training.config import ModelConfig


def load(folder, dtype=torch.float32, **options):
    return pipeline.load(ModelConfig(pretrained_model_name_or_path=str(folder), **options), dtype)


def test_a_variant_is_named_where_it_is_needed(folders, tmp_path):
    load(folders["sd"]).to(torch.float16).save_pretrained(tmp_path, variant="fp16")
    pipe = load(tmp_path, torch.bfloat16, variant="fp16")
    assert pipe.unet.dtype == pipe.vae.dtype == torch.bfloat16
    weight = load(folders["sd"]).unet.conv_in.weight
    assert torch.equal(pipe.unet.conv_in.weight, weight.to(torch.float16).to(torch.bfloat16))
    with pytest.raises(UsageError, match="no weights without a variant; set model.variant to fp16, which it has"):
        load(tmp_path)
    with pytest.raises(UsageError, match="no weights of the variant 'bf16'; set model.variant to fp16, which"):
        load(tmp_path, variant="bf16")
    with pytest.raises(UsageError, match="no weights of the variant 'fp16'; set model.variant to null, which"):
        load(folders["sd"], variant="fp16")


@pytest.mark.parametrize("form", ["folder", "pipeline", "file", "original"])
def test_another_vae_takes_the_place_of_the_models_own(folders, tmp_path, form):
    """As madebyollin/sdxl-vae-fp16-fix does."""
    other = load(folders["sdxl"]).vae
    other.decoder.conv_in.weight.data += 1
    if form == "pipeline":
        pipe = load(folders["sdxl"])
        pipe.vae = other
        pipe.save_pretrained(tmp_path)
    elif form == "original":
        save_file({key: value.contiguous() for key, value in original_vae(other).items()}, tmp_path / "x.safetensors")
    else:
        other.save_pretrained(tmp_path)
    names = {"file": "diffusion_pytorch_model.safetensors", "original": "x.safetensors"}
    pipe = load(folders["sdxl"], torch.float16, vae=str(tmp_path / names.get(form, "")))
    theirs = other.to(torch.float16).state_dict()
    assert all(torch.equal(value, theirs[key]) for key, value in pipe.vae.state_dict().items())
    assert pipe.vae.config.scaling_factor == 0.13025


def test_vaes_that_are_refused(folders, tmp_path):
    with pytest.raises(UsageError, match="reads other latents .*scaling_factor is 0.18215, the model's 0.13025"):
        load(folders["sdxl"], vae=str(folders["sd"]))
    with pytest.raises(UsageError, match="model.vae='/nowhere' does not load as an AutoencoderKL.*hf download"):
        load(folders["sdxl"], vae="/nowhere")
    with pytest.raises(UsageError, match="the DDPMPipeline makes pixels, without a VAE; leave it null"):
        load(folders["pixels"], vae=str(folders["sd"]))
    save_file({"decoder.conv_in.weight": torch.zeros(8, 4, 3, 3)}, tmp_path / "part.safetensors")
    with pytest.raises(UsageError, match="model.vae=.*part.safetensors' "):
        load(folders["sdxl"], vae=str(tmp_path / "part.safetensors"))


def with_lora(folder, path, std=0.3):
    """Writes a LoRA of attention and convolutions in diffusers' layout; returns a pipeline that has it."""
    pipe = load(folder)
    torch.manual_seed(3)
    pipe.unet.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_out.0", "conv1"]))
    for name, parameter in pipe.unet.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=std)
    type(pipe).save_lora_weights(path, unet_lora_layers=get_peft_model_state_dict(pipe.unet))
    return pipe


@torch.no_grad()
def output(unet):
    generator = torch.Generator().manual_seed(0)
    sample, text = (torch.randn(*shape, generator=generator) for shape in ((1, 4, 8, 8), (1, 7, 16)))
    return unet(sample, 500, encoder_hidden_states=text).sample


def test_a_lora_becomes_part_of_the_weights(folders, tmp_path):
    adapted = with_lora(folders["sd"], tmp_path).unet
    base, expected = output(load(folders["sd"]).unet), output(adapted)
    unet = load(folders["sd"], fuse_lora=[str(tmp_path)]).unet
    assert type(unet) is UNet2DConditionModel and not hasattr(unet, "peft_config")
    assert unet.state_dict().keys() == load(folders["sd"]).unet.state_dict().keys()
    effect = torch.linalg.norm(expected - base)
    assert torch.linalg.norm(output(unet) - expected) < 1e-4 * effect
    # Two halves are a whole, and an adapter to train goes on top.
    halves = load(folders["sd"], fuse_lora=[f"{tmp_path}:0.25", f"{tmp_path}:0.75"]).unet
    assert torch.linalg.norm(output(halves) - expected) < 1e-4 * effect
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))


@pytest.mark.parametrize("of_file", [torch.float32, torch.bfloat16])
def test_a_sum_is_rounded_once(folders, tmp_path, of_file):
    with_lora(folders["sd"], tmp_path)
    file = tmp_path / "pytorch_lora_weights.safetensors"
    save_file({key: value.to(of_file) for key, value in load_file(file).items()}, file)
    key = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight"
    base = load(folders["sd"], torch.bfloat16).unet.state_dict()[key].double()
    lora = load_file(file)
    name = f"unet.{key.removesuffix('.weight')}"
    exact = base + lora[f"{name}.lora_B.weight"].double() @ lora[f"{name}.lora_A.weight"].double()
    fused = load(folders["sd"], torch.bfloat16, fuse_lora=[str(tmp_path)]).unet.state_dict()[key]
    assert torch.equal(fused, exact.to(torch.bfloat16)) and not torch.equal(fused, base.to(torch.bfloat16))


def test_loras_that_do_not_fit(folders, tmp_path):
    with_lora(folders["sd"], tmp_path)
    with pytest.raises(UsageError, match="model.fuse_lora.* is of another base model: .*attn1.to_out.0, and this UNet"):
        load(folders["sdxl"], fuse_lora=[str(tmp_path)])
    with pytest.raises(UsageError, match="model.fuse_lora .*/nowhere: there is no file or folder"):
        load(folders["sd"], fuse_lora=["/nowhere"])
    file = tmp_path / "pytorch_lora_weights.safetensors"
    save_file({key: value * float("inf") for key, value in load_file(file).items()}, file)
    with pytest.raises(UsageError, match="model.fuse_lora=.*lora_A.weight has values that are NaN"):
        load(folders["sd"], fuse_lora=[str(file)])


FILES = {"unet": "diffusion_pytorch_model.safetensors", "vae": "diffusion_pytorch_model.safetensors"}


@pytest.mark.parametrize("component", ["unet", "vae", "text_encoder_2"])
def test_weights_that_a_folder_lacks_are_not_made_up(folders, tmp_path, component):
    shutil.copytree(folders["sdxl"], tmp_path, dirs_exist_ok=True)
    file = tmp_path / component / FILES.get(component, "model.safetensors")
    state = load_file(file)
    lost = sorted(state)[-1]
    save_file({key: value for key, value in state.items() if key != lost}, file, metadata={"format": "pt"})
    with pytest.raises(
        UsageError, match=f"{component} lacks 1 weights of its .*, {lost.removeprefix('text_model.')} first"
    ):
        load(tmp_path)
    if component == "vae":
        with pytest.raises(UsageError, match="vae lacks 1 weights of its AutoencoderKL"):
            load(folders["sdxl"], vae=str(tmp_path))
        load(tmp_path, vae=str(folders["sdxl"]))


def test_old_names_and_shards_are_whole(folders, tmp_path):
    """The VAE of SD 1's repository has the attention's old names; large models are in several files."""
    pipe = load(folders["sd"])
    pipe.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list((tmp_path / "unet").glob("*-of-*.safetensors"))) > 1
    shutil.rmtree(tmp_path / "vae")
    pipe.vae.save_pretrained(tmp_path / "vae")
    file = tmp_path / "vae" / FILES["vae"]
    names = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    state = load_file(file)
    for new, old in names.items():
        state = {key.replace(new, old): value for key, value in state.items()}
    assert any(".query." in key for key in state)
    save_file(state, file, metadata={"format": "pt"})
    again = load(tmp_path)
    for component in ("unet", "vae"):
        theirs = getattr(pipe, component).state_dict()
        assert all(torch.equal(value, theirs[key]) for key, value in getattr(again, component).state_dict().items())


def test_a_name_that_no_file_can_have():
    with pytest.raises(UsageError, match="'x+' does not load: there is no such folder or "):
        load("x" * 300)


def test_a_file_that_ends_too_soon(folders, tmp_path):
    shutil.copytree(folders["sd"], tmp_path, dirs_exist_ok=True)
    file = tmp_path / "text_encoder" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:2000])
    with pytest.raises(UsageError, match=f"'{tmp_path}' does not load"):
        load(tmp_path)


@pytest.mark.parametrize("component", ["unet", "vae", "text_encoder_2"])
def test_a_weight_that_is_not_a_number_is_found(folders, tmp_path, component):
    pipe = load(folders["sdxl"])
    parameters = dict(getattr(pipe, component).named_parameters())
    name = list(parameters)[len(parameters) // 2]
    parameters[name].data.view(-1)[1] = float("nan") if component != "vae" else float("inf")
    with pytest.raises(UsageError, match=f"1 of the .* values of {component}.{name} are NaN or inf"):
        pipeline.check_given(pipe)
    pipe.save_pretrained(tmp_path)
    with pytest.raises(UsageError, match=f"{tmp_path}: 1 of the .* values of {component}.{name}"):
        load(tmp_path)


def test_a_value_beyond_a_precision_is_found(folders, tmp_path):
    pipe = load(folders["sd"])
    pipe.unet.conv_out.bias.data[0] = 1e5
    pipe.save_pretrained(tmp_path)
    load(tmp_path, torch.bfloat16)
    with pytest.raises(UsageError, match="unet.conv_out.bias are NaN or inf in torch.float16.*mixed_precision=bf16"):
        load(tmp_path, torch.float16)


def test_what_a_config_asks_of_a_model_that_is_not_loaded(folders):
    pipe = load(folders["sd"])
    pipeline.check_given(pipe, ModelConfig())
    with pytest.raises(UsageError, match="model.fuse_lora=.'x'. is of a model that the run loads.*on the pipeline"):
        pipeline.check_given(pipe, ModelConfig(fuse_lora=["x"]))


def test_other_parts_that_are_not_served(folders):
    pipe = load(folders["sd"])
    pipe.scheduler.register_to_config(beta_schedule="linear")
    pipe.scheduler._internal_dict = {
        key: value for key, value in pipe.scheduler.config.items() if key != "beta_schedule"
    }
    with pytest.raises(UsageError, match="no schedule of betas: models of EDM and of flow matching"):
        pipeline.check(pipe)
    pipe = load(folders["sd"])
    pipe.vae = torch.nn.Linear(1, 1)
    with pytest.raises(UsageError, match="VAE is a Linear; an AutoencoderKL"):
        pipeline.check(pipe)

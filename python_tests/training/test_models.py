"""Each kind of pipeline is loaded as what it is, told what its own call tells it, and others are refused."""

import json
import shutil

import huggingface_hub
import pytest
import tiny
import tiny_models
import torch
from diffusers import (
    AutoencoderKL,
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
    UNet2DModel,
)

import rftcore
from rftcore.training import UsageError, pipeline
from rftcore.training.config import ModelConfig, SamplingConfig

CPU = torch.device("cpu")
PROMPTS = tiny.TRAIN_PROMPTS[:2]


def load(folder, **options):
    return pipeline.load(ModelConfig(pretrained_model_name_or_path=str(folder)), torch.float32, **options)


def sampling(kind, **options):
    return SamplingConfig(**{"guidance_scale": tiny_models.GUIDANCE[kind], "num_inference_steps": 3, **options})


@pytest.mark.parametrize(
    ("kind", "wanted", "size"),
    [("sd", StableDiffusionPipeline, 8), ("sdxl", StableDiffusionXLPipeline, 8), ("pixels", DDPMPipeline, 16)],
)
def test_a_folder_is_loaded_as_what_it_is(folders, kind, wanted, size):
    pipe = load(folders[kind])
    assert type(pipe) is wanted
    assert pipeline.unconditional(pipe) == (kind == "pixels")
    assert pipeline.sample_size(pipe, sampling(kind)) == size
    assert pipeline.sample_size(pipe, sampling(kind, resolution=32)) == (32 if kind == "pixels" else 16)
    assert isinstance(pipeline.vae(pipe), type(None) if kind == "pixels" else AutoencoderKL)
    pipeline.check_sampling(pipe, sampling(kind))


def test_the_unet_alone_may_be_loaded_in_another_precision(folders):
    pipe = pipeline.load(
        ModelConfig(pretrained_model_name_or_path=str(folders["sdxl"])), torch.bfloat16, unet_dtype=torch.float32
    )
    assert (pipe.unet.dtype, pipe.vae.dtype, pipe.text_encoder_2.dtype) == (
        torch.float32,
        torch.bfloat16,
        torch.bfloat16,
    )


def test_an_early_repository_with_its_unet_at_the_root(folders, tmp_path):
    """As google/ddpm-cifar10-32 and its siblings are laid out."""
    for file in (*(folders["pixels"] / "unet").iterdir(), *(folders["pixels"] / "scheduler").iterdir()):
        shutil.copy(file, tmp_path)
    shutil.copy(folders["pixels"] / "model_index.json", tmp_path)
    assert isinstance(load(tmp_path).unet, UNet2DModel)


@pytest.mark.parametrize("negative", ["", "a handwritten nine"])
@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_images_are_those_of_the_pipelines_own_call(folders, kind, negative):
    """Prompts, negative prompt, pooled text and sizes reach the UNet as diffusers brings them there; resolution 24."""
    config = sampling(kind, resolution=24, negative_prompt=negative)
    stock = load(folders[kind])
    stock.scheduler = pipeline.scheduler(stock, config)
    stock.set_progress_bar_config(disable=True)
    noise = torch.randn(2, 4, 12, 12)
    # What a user's call has where nothing is to be avoided: no negative prompt at all.
    theirs = stock(
        prompt=PROMPTS,
        negative_prompt=[negative] * 2 if negative else None,
        latents=noise,
        height=24,
        width=24,
        num_inference_steps=3,
        guidance_scale=2.0,
        output_type="latent",
    ).images
    pipe = load(folders[kind])
    size = pipeline.sample_size(pipe, config)
    inputs = pipeline.encode_prompts(pipe, [*PROMPTS, PROMPTS[0]], negative, CPU, size)
    sampler = rftcore.CheckpointedSampler(
        pipe.unet, pipeline.scheduler(pipe, config), num_inference_steps=3, guidance_scale=2.0, backprop_steps=0
    )
    ours = sampler(**inputs.batch(PROMPTS), latents=noise).latents
    assert torch.linalg.norm(ours - theirs) < 1e-5 * torch.linalg.norm(theirs)
    assert pipe.text_encoder is None and getattr(pipe, "text_encoder_2", None) is None


@pytest.mark.parametrize("kind", ["sd2", "turbo", "lcm"])
def test_images_of_settings_of_their_own_are_those_of_the_pipelines_own_call(tmp_path, kind):
    """v-prediction, trailing times without guidance, and a guidance scale that the UNet is told; 4 steps."""
    config = SamplingConfig(num_inference_steps=4, **tiny_models.SAMPLING[kind])
    stock, pipe = (tiny_models.VARIANT_BUILDERS[kind](tmp_path) for _ in range(2))
    stock.scheduler = pipeline.scheduler(stock, config)
    assert stock.scheduler.config.get("timestep_spacing") == ("trailing" if kind == "turbo" else "leading")
    stock.set_progress_bar_config(disable=True)
    noise = torch.randn(2, 4, 8, 8)

    def seeds():
        return [torch.Generator().manual_seed(seed) for seed in (1, 2)]

    theirs = stock(
        prompt=PROMPTS,
        latents=noise,
        generator=seeds(),
        height=16,
        width=16,
        num_inference_steps=4,
        guidance_scale=config.guidance_scale,
        output_type="latent",
    ).images
    inputs = pipeline.encode_prompts(pipe, PROMPTS, "", CPU, 8)
    sampler = rftcore.CheckpointedSampler(
        pipe.unet,
        pipeline.scheduler(pipe, config),
        num_inference_steps=4,
        guidance_scale=config.guidance_scale,
        backprop_steps=0,
    )
    ours = sampler(**inputs.batch(PROMPTS), latents=noise, generator=seeds()).latents
    assert torch.linalg.norm(ours - theirs) < 1e-5 * torch.linalg.norm(theirs)


def test_images_of_pixels_are_those_of_the_pipelines_own_call(folders):
    config = sampling("pixels")
    stock = load(folders["pixels"])
    stock.scheduler = pipeline.scheduler(stock, config)
    own = stock.scheduler.config
    # What its DDPM config does not say is DDIM's default there.
    assert (own.clip_sample, own.set_alpha_to_one, type(stock.scheduler)) == (True, True, DDIMScheduler)
    stock = DDIMPipeline(unet=stock.unet, scheduler=stock.scheduler)
    stock.set_progress_bar_config(disable=True)
    seeds = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    theirs = stock(batch_size=2, generator=seeds, num_inference_steps=3, output_type="np")
    pipe = load(folders["pixels"])
    inputs = pipeline.encode_prompts(pipe, ["", ""], "", CPU)
    assert inputs.batch(["", ""]) == {}
    sampler = rftcore.CheckpointedSampler(
        pipe.unet, pipeline.scheduler(pipe, config), num_inference_steps=3, backprop_steps=0
    )
    seeds = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    latents = sampler(**inputs.batch(["", ""]), batch_size=2, generator=seeds).latents
    ours = rftcore.decode(pipeline.vae(pipe), latents).permute(0, 2, 3, 1)
    assert torch.linalg.norm(ours - torch.from_numpy(theirs.images)) < 1e-5 * torch.linalg.norm(ours)


def test_features_are_the_pooled_text(folders):
    pipe = load(folders["sd"])
    tokens = pipe.tokenizer(
        PROMPTS, padding="max_length", max_length=pipe.tokenizer.model_max_length, return_tensors="pt"
    )
    with torch.no_grad():
        pooled = pipe.text_encoder(tokens.input_ids).pooler_output
    inputs = pipeline.encode_prompts(pipe, PROMPTS, "", CPU)
    assert torch.equal(inputs.features(PROMPTS), pooled) and not torch.equal(pooled[0], pooled[1])

    pipe = load(folders["sdxl"])
    with torch.no_grad():
        pooled = pipe.encode_prompt(PROMPTS, do_classifier_free_guidance=False)[2]
    inputs = pipeline.encode_prompts(pipe, PROMPTS, "", CPU, sample_size=8)
    assert torch.equal(inputs.features(PROMPTS[::-1]), pooled.flip(0)) and pooled.shape == (2, 20)

    inputs = pipeline.encode_prompts(load(folders["pixels"]), [], "", CPU)
    assert torch.equal(inputs.features(["", "", ""]), torch.zeros(3, 1))


def test_each_prompt_is_encoded_once(folders):
    pipe = load(folders["sd"])
    rows = []
    pipe.text_encoder.register_forward_hook(lambda module, inputs, output: rows.append(len(output[0])))
    pipeline.encode_prompts(pipe, [*PROMPTS, *PROMPTS, ""] * 20, "", CPU)
    assert sum(rows) == 3


def test_sdxl_is_not_told_a_size_that_nobody_gave(folders):
    with pytest.raises(ValueError, match="sample_size=None with SDXL"):
        pipeline.encode_prompts(load(folders["sdxl"]), PROMPTS, "", CPU)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"guidance_scale": 7.5}, "guidance_scale=7.5, and the DDPMPipeline takes no prompt.*guidance_scale=1.0"),
        ({"negative_prompt": "blurry"}, "negative_prompt='blurry'.*leave it empty"),
        ({"resolution": 17}, "sampling.resolution=17 must be a multiple of 2, .*the nearest is 16"),
    ],
)
def test_what_an_unconditional_model_cannot_be_asked(folders, options, message):
    with pytest.raises(UsageError, match=message):
        pipeline.check_sampling(load(folders["pixels"]), sampling("pixels", **options))


def test_pipelines_that_are_not_served_are_refused(folders):
    parts = {**load(folders["sdxl"]).components, "feature_extractor": None, "image_encoder": None}
    refiner = StableDiffusionXLImg2ImgPipeline(**parts, add_watermarker=False)
    with pytest.raises(UsageError, match="StableDiffusionXLImg2ImgPipeline; served are .*DDIMPipeline.*refiner"):
        pipeline.check(refiner)
    parts = load(folders["sd"]).components
    parts.pop("image_encoder")
    with pytest.raises(
        UsageError, match="StableDiffusionInpaintPipeline.*text-to-image model that they were made from"
    ):
        pipeline.check(StableDiffusionInpaintPipeline(**parts, requires_safety_checker=False))


def test_models_inside_that_are_not_served_are_refused(folders):
    pipe = load(folders["sd"])
    pipe.text_encoder = None
    with pytest.raises(UsageError, match="StableDiffusionPipeline has no text_encoder; load it whole"):
        pipeline.check(pipe)
    pipe = load(folders["sdxl"])
    pipe.unet.register_to_config(projection_class_embeddings_input_dim=5 * 4 + 20)
    with pytest.raises(UsageError, match="takes 40 added values and SDXL's base model gives 44.*the refiner"):
        pipeline.check(pipe)
    pipe = load(folders["sd"])
    pipe.unet.register_to_config(in_channels=9)
    with pytest.raises(UsageError, match="takes 9 channels and gives 4: inpainting"):
        pipeline.check(pipe)
    pipe.unet.register_to_config(in_channels=4)
    pipe.unet.register_to_config(addition_embed_type="text_time")
    with pytest.raises(UsageError, match="addition_embed_type='text_time'.*not those of a StableDiffusionPipeline"):
        pipeline.check(pipe)
    pipe = load(folders["pixels"])
    pipe.unet.register_to_config(num_class_embeds=10)
    with pytest.raises(UsageError, match="conditioned on classes .num_class_embeds=10"):
        pipeline.check(pipe)
    pipe.unet.register_to_config(num_class_embeds=None, in_channels=1, out_channels=1)
    with pytest.raises(UsageError, match="images of 1 channels"):
        pipeline.check(pipe)


def test_a_kind_is_refused_before_its_weights_are_read(tmp_path):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}))
    with pytest.raises(UsageError, match=r"model.pretrained_model_name_or_path='.*' is a FluxPipeline; served are"):
        load(tmp_path)


def test_places_that_hold_no_pipeline(folders, tmp_path, monkeypatch):
    with pytest.raises(UsageError, match="'/nowhere/at/all' does not load: there is no such folder"):
        load("/nowhere/at/all")
    with pytest.raises(UsageError, match="holds no model_index.json.*save_pretrained.*a single model, or a LoRA"):
        load(folders["sd"] / "unet")
    with pytest.raises(UsageError, match="holds no model_index.json.*wrote$"):
        load(tmp_path)
    with pytest.raises(UsageError, match="no checkpoint of a whole model: it is one UNet.*give the pipeline.s folder"):
        load(folders["sd"] / "unet" / "diffusion_pytorch_model.safetensors")
    broken = tmp_path / "broken"
    shutil.copytree(folders["sd"], broken)
    (broken / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(UsageError, match="broken' does not load: .*diffusion_pytorch_model"):
        load(broken)


def test_a_hub_name_without_network_says_what_to_fetch_and_where_to_put_it(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    config = ModelConfig(pretrained_model_name_or_path="nobody/tiny-pipeline", revision="v1")
    message = (
        "hub cannot be reached.*hf download nobody/tiny-pipeline --revision v1 --local-dir FOLDER.*set model.pretrained"
    )
    with pytest.raises(UsageError, match=message):
        pipeline.load(config, torch.float32)

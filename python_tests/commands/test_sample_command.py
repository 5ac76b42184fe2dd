"""`rftcore sample`: the images of diffusers' own pipeline, whatever the batch."""

import dataclasses
import itertools
import json
import subprocess
import sys

import diffusers
import numpy
import pytest
import torch
from diffusers import UNet2DModel
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file
from samples import PROMPTS, largest_difference, pixels, sample, sdxl_pipeline, stock

from rftcore import cli
from rftcore.commands.sample_options import SampleOptions
from rftcore.errors import UsageError
from rftcore.lora import files, loading
from rftcore.lora.layers import Layer, Lora
from rftcore.lora.mix import mix
from rftcore.training import weights as training_weights
from rftcore.training.schedulers import SCHEDULERS


def by_diffusers(pipe, record, steps=4, negative_prompt=None, **options):
    """The same images, each sampled alone by the pipeline's own call."""
    images = {}
    for item in record["images"]:
        noise = torch.Generator().manual_seed(item["noise_seed"])
        pipe.set_progress_bar_config(disable=True)
        output = pipe(
            item["prompt"],
            negative_prompt=negative_prompt,
            num_inference_steps=steps,
            guidance_scale=2.0,
            generator=noise,
            **options,
        )
        images[item["file"]] = numpy.asarray(output.images[0]).astype(int)
    return images


def test_the_images_of_diffusers_with_two_loras(tmp_path, loras):
    arguments = [f"{loras[0]}:0.7", str(loras[1] / training_weights.FILE)]
    found, record = sample(tmp_path / "a", lora=arguments, images_per_prompt=2, batch_size=3, negative_prompt="a five")
    pipe = stock()
    for name, folder in zip("xy", loras, strict=True):
        pipe.load_lora_weights(folder, adapter_name=name)
    pipe.set_adapters(["x", "y"], [0.7, 1.0])
    expected = by_diffusers(pipe, record, negative_prompt="a five")
    assert len(found) == 4 and largest_difference(found, expected) <= 1
    mixed = stock()
    parsed = [files.parse(argument) for argument in arguments]
    mixture = mix([(str(path), files.read(path), weight) for path, weight in parsed])
    mixed.load_lora_weights(files.write(mixture.lora, tmp_path / "mixed.safetensors"))
    assert largest_difference(by_diffusers(mixed, record, negative_prompt="a five"), expected) <= 1
    pipe.set_adapters(["x", "y"], [1.0, 1.0])
    assert largest_difference(by_diffusers(pipe, record, negative_prompt="a five"), expected) > 8
    merged, _ = sample(
        tmp_path / "b", lora=arguments, images_per_prompt=2, batch_size=3, negative_prompt="a five", merge_lora=True
    )
    assert largest_difference(merged, expected) <= 1


def test_an_image_depends_on_its_seed_and_place_alone(tmp_path):
    options = {"eta": 1.0, "images_per_prompt": 3, "seed": 5}
    expected, _ = sample(tmp_path / "a", batch_size=1, **options)
    for batch_size in (2, 4, 100):
        found, _ = sample(tmp_path / str(batch_size), batch_size=batch_size, **options)
        assert largest_difference(found, expected) <= 1
    fewer, _ = sample(tmp_path / "b", prompt=PROMPTS[:1], eta=1.0, seed=5)
    assert abs(fewer["00000-000.png"] - expected["00000-000.png"]).max() <= 1
    other, _ = sample(tmp_path / "c", prompt=PROMPTS[:1], eta=1.0, seed=6)
    assert abs(fewer["00000-000.png"] - other["00000-000.png"]).max() > 8
    images = list(expected.values())
    assert all(abs(a - b).max() > 8 for i, a in enumerate(images) for b in images[:i])


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler(name, tmp_path):
    class_name, extra = SCHEDULERS[name]
    pipe = stock()
    pipe.scheduler = getattr(diffusers, class_name).from_config(pipe.scheduler.config, **extra)
    found, record = sample(tmp_path / "a", scheduler=name, num_inference_steps=6)
    assert record["settings"]["sampler"]["scheduler"] == class_name
    assert largest_difference(found, by_diffusers(pipe, record, steps=6)) <= 1


def test_what_is_written(tmp_path):
    (tmp_path / "prompts.txt").write_text("# two\na handwritten one\n\na handwritten nine\n")
    found, record = sample(tmp_path / "out", prompts=str(tmp_path / "prompts.txt"), images_per_prompt=2, seed=3)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {*found, "grid.png", "metadata.json"} and len(found) == 4
    assert [item["prompt"] for item in record["images"]] == ["a handwritten one"] * 2 + ["a handwritten nine"] * 2
    assert len({item["noise_seed"] for item in record["images"]}) == 4
    assert record["settings"]["seed"] == 3 and record["settings"]["sampler"]["num_inference_steps"] == 4
    assert record["environment"]["packages"]["torch"] == torch.__version__
    grid = pixels(tmp_path / "out" / "grid.png")
    side = grid.shape[0] // 2
    assert side >= 64
    for row in range(2):
        for column in range(2):
            left = grid.shape[1] - (2 - column) * side
            cell = grid[row * side : (row + 1) * side, left : left + side]
            image = Image.fromarray(found[f"{row:05d}-{column:03d}.png"].astype("uint8"))
            assert abs(cell - numpy.asarray(image.resize((side, side), Image.Resampling.NEAREST))).max() == 0


def test_a_lora_of_any_layout_gives_the_same_images(tmp_path, loras):
    lora = files.read(files.parse(str(loras[0])).path)
    paths = [
        loras[0],
        files.write(lora, tmp_path / "k.safetensors", "kohya"),
        files.write(lora, tmp_path / "p", "peft"),
    ]
    options = {"prompt": PROMPTS[:1], "num_inference_steps": 2}
    images = [sample(tmp_path / str(n), lora=[f"{path}:3"], **options)[0] for n, path in enumerate(paths)]
    assert all(largest_difference(found, images[0]) == 0 for found in images)
    assert largest_difference(images[0], sample(tmp_path / "base", **options)[0]) > 8


@pytest.fixture(scope="module")
def text_lora(tmp_path_factory):
    """Of the digits' UNet and of their text encoder."""
    pipe = stock()
    source = torch.Generator().manual_seed(0)
    layers = {}
    for component, endings in (("unet", ("to_v",)), ("text_encoder", ("v_proj", "fc1"))):
        for name, module in getattr(pipe, component).named_modules():
            if name.endswith(endings):
                outputs, inputs = module.weight.shape
                # Of a text encoder only what the UNet reads shows.
                prefix = "text_model." if name.startswith("encoder.") else ""
                down = torch.randn(2, inputs, generator=source) * 0.2
                layers[f"{component}.{prefix}{name}"] = Layer(
                    down, torch.randn(outputs, 2, generator=source) * 0.2, 3.0
                )
    assert any(name.startswith("text_encoder.") for name in layers)
    return files.write(Lora(layers), tmp_path_factory.mktemp("text") / "t.safetensors")


def in_column(images, column):
    return {name: value for name, value in images.items() if name.endswith(f"-{column:02d}.png")}


def test_a_grid_over_scales_of_a_mix_with_a_text_encoder(tmp_path, loras, text_lora):
    """Each column is what diffusers gives with the adapters at these scales; the noise is the same in all."""
    scales, given = [0.0, 0.5, 1.5], [0.6, 1.0]
    arguments = [f"{text_lora}:{given[0]}", str(loras[0])]
    options = {"num_inference_steps": 2, "images_per_prompt": 2, "batch_size": 3}
    found, record = sample(tmp_path / "out", lora=arguments, lora_scales=scales, **options)
    assert len(found) == 2 * 2 * 3
    pipe = stock()
    pipe.load_lora_weights(text_lora, adapter_name="x")
    pipe.load_lora_weights(loras[0], adapter_name="y")
    for column, scale in enumerate(scales):
        wanted = [scale * weight for weight in given]
        pipe.set_adapters(["x", "y"], wanted)
        items = [item for item in record["images"] if item["file"].endswith(f"-{column:02d}.png")]
        assert all(item["lora_scales"] == wanted for item in items)
        expected = by_diffusers(pipe, {"images": items}, steps=2)
        assert largest_difference(in_column(found, column), expected) <= 1
    seeds = {(item["prompt_index"], item["image_index"]): set() for item in record["images"]}
    for item in record["images"]:
        seeds[item["prompt_index"], item["image_index"]].add(item["noise_seed"])
    assert len(seeds) == 4 and all(len(of_one) == 1 for of_one in seeds.values())
    changed = [abs(found["00000-000-00.png"] - found[f"00000-000-{column:02d}.png"]).max() for column in (1, 2)]
    assert min(changed) > 8
    grid = pixels(tmp_path / "out" / "grid.png")
    side = (grid.shape[1] - 132) // 3
    for row, name in enumerate(("00000-000", "00000-001", "00001-000", "00001-001")):
        for column in range(3):
            top, left = grid.shape[0] - (4 - row) * side, 132 + column * side
            image = Image.fromarray(found[f"{name}-{column:02d}.png"].astype("uint8"))
            cell = grid[top : top + side, left : left + side]
            assert abs(cell - numpy.asarray(image.resize((side, side), Image.Resampling.NEAREST))).max() == 0


@pytest.mark.slow
def test_interpolation_between_two_loras(tmp_path, loras):
    """DRaFT's figure: from the first to the second, the ends being each alone."""
    arguments = [f"{loras[0]}:3", f"{loras[1]}:-4"]
    options = {"num_inference_steps": 2, "prompt": PROMPTS[:1]}
    found, record = sample(tmp_path / "out", lora=arguments, interpolate=True, merge_lora=True, **options)
    assert [item["lora_scales"] for item in record["images"]] == [
        [3 * (1 - share), -4 * share] for share in (0, 0.25, 0.5, 0.75, 1)
    ]
    assert record["settings"]["interpolate"] is True
    for column, alone in ((0, arguments[0]), (4, arguments[1])):
        (image,) = sample(tmp_path / str(column), lora=[alone], **options)[0].values()
        assert abs(found[f"00000-000-{column:02d}.png"] - image).max() <= 1
    pipe = stock()
    for name, folder in zip("xy", loras, strict=True):
        pipe.load_lora_weights(folder, adapter_name=name)
    pipe.set_adapters(["x", "y"], [1.5, -2.0])
    (expected,) = by_diffusers(pipe, {"images": record["images"][2:3]}, steps=2).values()
    assert abs(found["00000-000-02.png"] - expected).max() <= 1
    steps = [found[f"00000-000-{column:02d}.png"] for column in range(5)]
    assert min(abs(a - b).max() for a, b in itertools.pairwise(steps)) > 3
    two, _ = sample(tmp_path / "two", lora=arguments, interpolate=True, lora_scales=[0.5], **options)
    assert abs(two["00000-000-00.png"] - expected).max() <= 1


@pytest.mark.parametrize("scheduler", ["ddpm", "ddim"])
def test_a_model_without_prompts_and_its_lora(scheduler, tmp_path):
    unet = UNet2DModel(
        sample_size=16,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
    )
    kind = {"ddpm": diffusers.DDPMPipeline, "ddim": diffusers.DDIMPipeline}[scheduler]
    steps = diffusers.DDPMScheduler() if scheduler == "ddpm" else diffusers.DDIMScheduler()
    kind(unet=unet, scheduler=steps).save_pretrained(tmp_path / "model")
    config = PeftLoraConfig(r=2, lora_alpha=3, target_modules=["to_q", "to_v", "conv1"], init_lora_weights=False)
    PeftModel(unet, config).save_pretrained(tmp_path / "lora")
    options = {"model": str(tmp_path / "model"), "prompt": None, "images_per_prompt": 3, "guidance_scale": None}
    found, record = sample(tmp_path / "out", lora=[str(tmp_path / "lora")], resolution=24, **options)
    assert record["settings"]["sampler"]["guidance_scale"] == 1.0 and len(found) == 3
    images = {}
    for item in record["images"]:
        shape = (1, 3, 24, 24)
        latents = torch.randn(shape, generator=(noise := torch.Generator().manual_seed(item["noise_seed"])))
        steps.set_timesteps(4)
        for t in steps.timesteps:
            with torch.no_grad():
                latents = steps.step(unet(latents, t).sample, t, latents, generator=noise).prev_sample
        image = (latents / 2 + 0.5).clamp(0, 1)[0].permute(1, 2, 0).numpy()
        images[item["file"]] = (image * 255).round().astype(int)
    assert largest_difference(found, images) <= 1
    plain, _ = sample(tmp_path / "plain", resolution=24, **options)
    assert largest_difference(plain, images) > 8
    for wrong, message in (
        ({"prompt": ["a"]}, "takes no prompt; leave --prompt and --prompts out"),
        ({"guidance_scale": 2.0}, "--guidance_scale 2.0, and the DD.MPipeline takes no prompt to be guided by"),
        ({"clip_skip": 1}, "--clip_skip 1, and the DD.MPipeline has no text encoder"),
        ({"resolution": 23}, "--resolution 23 must be a multiple of 2"),
    ):
        with pytest.raises(UsageError, match=message):
            sample(tmp_path / "wrong", **{**options, **wrong})


def test_adapters_keep_their_precision_in_a_low_precision_unet(loras):
    pipe = stock(torch_dtype=torch.bfloat16)
    loading.load(pipe, [files.parse(str(loras[0]))])
    weights = load_file(loras[0] / training_weights.FILE)
    parameters = dict(pipe.unet.named_parameters())
    assert weights
    for key, value in weights.items():
        name, _, part = key.removeprefix("unet.").rpartition(".")
        assert torch.equal(parameters[f"{name}.lora_0.{part}"], value)
    assert pipe.unet.dtype == torch.bfloat16


def test_a_flag_that_is_given_twice_loses_nothing():
    parsed = cli._parse(["sample", "--lora", "a", "b:0.5", "--lora", "c", "--prompt", "x", "--prompt", "y"]).sample
    assert parsed.lora == ["a", "b:0.5", "c"] and parsed.prompt == ["x", "y"] and parsed.lora_scales is None


@pytest.mark.parametrize(("negative_prompt", "clip_skip"), [(None, None), ("a handwritten five", None), (None, 1)])
def test_sdxl(negative_prompt, clip_skip, tmp_path):
    pipe = sdxl_pipeline(tmp_path)
    pipe.save_pretrained(tmp_path / "model")
    model = str(tmp_path / "model")
    given = {"negative_prompt": negative_prompt, "clip_skip": clip_skip}
    found, record = sample(tmp_path / "out", model=model, resolution=32, **given)
    options = {"height": 32, "width": 32, **given}
    assert largest_difference(found, by_diffusers(pipe, record, **options)) <= 1
    other, _ = sample(tmp_path / "other", model=model, negative_prompt="a handwritten nine", resolution=32)
    assert largest_difference(found, other) > 1


def rftcore(*arguments):
    return subprocess.run([sys.executable, "-m", "rftcore", "sample", *arguments], capture_output=True, text=True)


def test_the_command(tmp_path, loras, capsys):
    arguments = ["--prompt", *PROMPTS, "--num_inference_steps", "2", "--output_dir", str(tmp_path / "out")]
    result = rftcore(*arguments, "--lora", f"{loras[0]}:0.5", "--merge_lora")
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"written to {tmp_path / 'out'}\n"
    record = json.loads((tmp_path / "out" / "metadata.json").read_text())
    assert record["settings"]["merge_lora"] and record["settings"]["lora"] == [f"{loras[0]}:0.5"]
    assert len(record["images"]) == 2
    assert cli.main(["sample", *arguments]) == 2
    assert "is not empty" in capsys.readouterr().err


def test_every_option_is_in_the_help():
    text = rftcore("--help").stdout
    assert all(f"--{field.name}" in text for field in dataclasses.fields(SampleOptions))

"""Layouts of LoRA files: what stock diffusers and PEFT make of ours, and round trips that lose nothing."""

import json

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.utils import (
    convert_state_dict_to_diffusers,
    convert_state_dict_to_kohya,
    convert_unet_state_dict_to_peft,
)
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_loras import assert_same_changes, assert_same_layers, changes, loaded_changes, make
from torch import nn

from rftcore import digits
from rftcore.errors import UsageError
from rftcore.lora import files, kohya_names, layouts
from rftcore.lora.files import LoraFile
from rftcore.lora.layers import Layer, Lora, base, split
from rftcore.lora.loading import load
from rftcore.published import UNETS


def with_one_alpha(lora):
    """diffusers reads kohya's alphas right only where they are all the same."""
    return Lora({name: Layer(layer.down, layer.up, 2.5) for name, layer in lora.layers.items()})


def content(path):
    """Metadata, and each tensor's dtype, shape and bytes: a header's order is by chance."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    return metadata, {
        key: (value.dtype, value.shape, value.reshape(-1).view(torch.uint8).tolist()) for key, value in tensors.items()
    }


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_every_layer_of_a_kohya_file_is_where_diffusers_has_it(kind, make_pipeline, shapes, tmp_path):
    lora = with_one_alpha(make(shapes[kind]))
    path = files.write(lora, tmp_path / "a.safetensors", "kohya")
    names = list(load_file(path))
    assert any("input_blocks_4_1_" in name for name in names) == (kind == "sdxl")
    assert any(name.startswith("lora_te2_") for name in names) == (kind == "sdxl")
    pipe = make_pipeline(kind)
    pipe.load_lora_weights(path)
    assert_same_changes(loaded_changes(pipe), changes(lora))


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_diffusers_layout_keeps_every_layers_rank_and_alpha(kind, make_pipeline, shapes, tmp_path):
    lora = make(shapes[kind])
    pipe = make_pipeline(kind)
    pipe.load_lora_weights(files.write(lora, tmp_path / "a.safetensors"))
    assert_same_changes(loaded_changes(pipe), changes(lora))


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
@pytest.mark.parametrize("layout", ["diffusers", "peft", "kohya"])
def test_our_loading_is_exact_in_every_layout(kind, layout, make_pipeline, two, tmp_path):
    (lora, source), (other, _) = two[kind]
    name = "a" if layout == "peft" else "a.safetensors"
    path = files.write(files.read(source), tmp_path / name, layout)
    pipe = make_pipeline(kind)
    components = load(pipe, [LoraFile(path, 0.5), LoraFile(two[kind][1][1], -2.0)])
    assert components == lora.components
    expected = {name: 0.5 * value for name, value in changes(lora).items()}
    for name, value in changes(other).items():
        expected[name] = expected.get(name, 0) - 2 * value
    assert_same_changes(loaded_changes(pipe), expected)


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_round_trips_are_bit_equal(kind, dtype, shapes, tmp_path):
    """diffusers -> kohya -> PEFT -> diffusers and back: names change, tensors do not, nor what is said of them."""
    lora = make(shapes[kind], dtype=dtype)
    assert base(lora) == ("sdxl" if kind == "sdxl" else None)
    path = first = files.write(lora, tmp_path / "first.safetensors")
    for number, layout in enumerate(["kohya", "peft", "diffusers", "peft", "kohya", "diffusers"]):
        name = f"{number}" if layout == "peft" else f"{number}.safetensors"
        path = files.write(files.read(path), tmp_path / name, layout)
        found = files.read(path)
        assert found.layout == layout
        assert_same_layers(found, lora)
    assert content(path) == content(first)


def test_a_kohya_file_comes_back_as_it_was(shapes, tmp_path):
    lora = Lora(make(shapes["sdxl"], dtype=torch.bfloat16).layers, metadata={"ss_output_name": "cats"})
    source = files.write(lora, tmp_path / "a.safetensors", "kohya")
    there = files.write(files.read(source), tmp_path / "b.safetensors", "diffusers")
    back = files.write(files.read(there), tmp_path / "c.safetensors", "kohya")
    assert content(back) == content(source)
    assert files.read(back).metadata == {"ss_output_name": "cats"}


def test_an_alpha_that_its_dtype_cannot_hold_is_kept(tmp_path):
    layer = Layer(torch.ones(3, 4, dtype=torch.float16), torch.ones(5, 3, dtype=torch.float16), 1 + 2**-20)
    lora = Lora({"unet.mid_block.attentions.0.proj_in": layer})
    assert_same_layers(files.read(files.write(lora, tmp_path / "a.safetensors", "kohya")), lora)


def test_published_kohya_names():
    """Names as trainers have written them, SDXL's of Stability's blocks."""
    for name, component, module in [
        (
            "lora_unet_input_blocks_8_1_transformer_blocks_9_attn2_to_out_0",
            "unet",
            "down_blocks.2.attentions.1.transformer_blocks.9.attn2.to_out.0",
        ),
        ("lora_unet_middle_block_1_proj_in", "unet", "mid_block.attentions.0.proj_in"),
        ("lora_unet_middle_block_2_out_layers_3", "unet", "mid_block.resnets.1.conv2"),
        (
            "lora_unet_output_blocks_5_1_transformer_blocks_1_ff_net_0_proj",
            "unet",
            "up_blocks.1.attentions.2.transformer_blocks.1.ff.net.0.proj",
        ),
        ("lora_unet_output_blocks_5_2_conv", "unet", "up_blocks.1.upsamplers.0.conv"),
        ("lora_unet_input_blocks_3_0_op", "unet", "down_blocks.0.downsamplers.0.conv"),
        ("lora_unet_output_blocks_0_0_skip_connection", "unet", "up_blocks.0.resnets.0.conv_shortcut"),
        ("lora_unet_label_emb_0_2", "unet", "add_embedding.linear_2"),
        (
            "lora_te2_text_model_encoder_layers_31_mlp_fc1",
            "text_encoder_2",
            "text_model.encoder.layers.31.mlp.fc1",
        ),
    ]:
        assert kohya_names.from_kohya(name) == (component, module)
        assert kohya_names.to_kohya(component, module, xl=True) == name
    plain = "lora_unet_up_blocks_3_resnets_2_time_emb_proj"
    assert kohya_names.from_kohya(plain) == ("unet", "up_blocks.3.resnets.2.time_emb_proj")
    assert kohya_names.to_kohya("unet", "up_blocks.3.resnets.2.time_emb_proj", xl=False) == plain
    assert kohya_names.from_kohya("lora_te_text_model_encoder_layers_0_self_attn_q_proj")[0] == "text_encoder"
    for wrong in (
        "unet_mid_block",
        "lora_unet_input_blocks_x_0_op",
        "lora_unet__a",
        "lora_unet_input_blocks_1_0_other",
    ):
        with pytest.raises(ValueError):
            kohya_names.from_kohya(wrong)


@pytest.mark.parametrize("kind", UNETS)
def test_every_layer_of_the_published_unets_has_a_kohya_name(kind):
    """Each its own, the one that diffusers' converter reads as this layer."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**UNETS[kind])
    modules = [name for name, module in unet.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    names = [kohya_names.to_kohya("unet", module, xl=kind == "sdxl") for module in modules]
    assert len(set(names)) == len(modules)
    assert [kohya_names.from_kohya(name) for name in names] == [("unet", module) for module in modules]
    state = {f"{name}.lora_{part}.weight": torch.tensor(n) for n, name in enumerate(names) for part in ("down", "up")}
    found, _ = StableDiffusionXLPipeline.lora_state_dict(state, unet_config=unet.config)
    found = convert_unet_state_dict_to_peft({key.removeprefix("unet."): value for key, value in found.items()})
    assert found.keys() == {f"{module}.lora_{part}.weight" for module in modules for part in "AB"}
    assert all(modules[value] == key.partition(".lora_")[0] for key, value in found.items())


@pytest.mark.parametrize(("kind", "said"), [("sd15", "sd1"), ("sd21", "sd2"), ("sdxl", "sdxl"), ("digits", None)])
def test_the_base_model_is_told_by_shapes_or_by_blocks(kind, said):
    options = UNETS[kind] if kind in UNETS else UNet2DConditionModel.load_config(digits.path(), subfolder="unet")
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(options)

    def on(ending):
        weights = {name: module.weight for name, module in unet.named_modules() if name.endswith(ending)}
        return Lora({f"unet.{name}": Layer(weight[:1], weight[:, :1], 1.0) for name, weight in weights.items()})

    assert base(on("attn2.to_k")) == said
    assert base(on("attn1.to_q")) == ("sdxl" if said == "sdxl" else None)


def test_peft_reads_what_we_write(make_pipeline, shapes, tmp_path):
    lora = make(shapes["sd1"])
    folder = files.write(lora, tmp_path / "peft", "peft")
    for component in lora.components:
        model = getattr(make_pipeline("sd1"), component)
        PeftModel.from_pretrained(model, folder / component)
        holder = type("Pipe", (), {component: model})
        expected = {name: value for name, value in changes(lora).items() if split(name)[0] == component}
        assert_same_changes(loaded_changes(holder), expected)


@pytest.mark.parametrize("use_rslora", [False, True])
def test_we_read_what_peft_writes(use_rslora, make_pipeline, tmp_path):
    for component in ("unet", "text_encoder", "text_encoder_2"):
        targets = ["to_q", "conv1"] if component == "unet" else ["q_proj", "fc1"]
        config = PeftLoraConfig(
            r=4, lora_alpha=3, target_modules=targets, use_rslora=use_rslora, init_lora_weights=False,
            alpha_pattern={"conv1": 7, "fc1": 7}, rank_pattern={"fc1": 2},
        )  # fmt: skip
        pipe = make_pipeline("sdxl")
        model = PeftModel(getattr(pipe, component), config)
        model.save_pretrained(tmp_path / component)
        holder = type("Pipe", (), {component: model.base_model.model})
        found = files.read(tmp_path / component)
        assert found.layout == "peft" and found.components == [component]
        assert_same_changes(changes(found), loaded_changes(holder))
        written = files.write(found, tmp_path / f"{component}.safetensors")
        fresh = make_pipeline("sdxl")
        fresh.load_lora_weights(written)
        assert_same_changes(loaded_changes(fresh), changes(found))
        again = files.write(files.read(written), tmp_path / f"{component}-again", "peft")
        inner = again / component if component == "text_encoder_2" else again
        before = json.loads((tmp_path / component / files.CONFIG_FILE).read_text())
        assert json.loads((inner / files.CONFIG_FILE).read_text()) == before
        tensors = load_file(tmp_path / component / "adapter_model.safetensors")
        copied = load_file(inner / "adapter_model.safetensors")
        assert tensors.keys() == copied.keys() and all(
            torch.equal(copied[key], value) for key, value in tensors.items()
        )


def test_older_names_of_diffusers(make_pipeline, tmp_path):
    """As diffusers' training scripts save them, and the attention processors before."""
    pipe = make_pipeline("sd1")
    config = PeftLoraConfig(r=4, lora_alpha=4, target_modules=["to_q", "to_out.0", "q_proj"], init_lora_weights=False)
    pipe.unet.add_adapter(config)
    pipe.text_encoder.add_adapter(PeftLoraConfig(r=4, lora_alpha=4, target_modules=["q_proj"], init_lora_weights=False))
    expected = loaded_changes(pipe)
    parts = [convert_state_dict_to_diffusers(get_peft_model_state_dict(m)) for m in (pipe.unet, pipe.text_encoder)]
    StableDiffusionPipeline.save_lora_weights(tmp_path, *parts)
    path = tmp_path / "pytorch_lora_weights.safetensors"
    state = load_file(path)
    assert any(".to_q.lora.down." in key for key in state) and any("lora_linear_layer" in key for key in state)
    assert files.read(path).layout == "diffusers-old"
    assert_same_changes(changes(files.read(path)), expected)
    unet = {key: value for key, value in state.items() if key.startswith("unet.")}
    oldest = {
        key.replace(".to_q.lora.", ".processor.to_q_lora.").replace(".to_out.0.lora.", ".processor.to_out_lora."): value
        for key, value in unet.items()
    }
    save_file(oldest, tmp_path / "oldest.safetensors")
    found = files.read(tmp_path / "oldest.safetensors")
    assert_same_changes(changes(found), {name: value for name, value in expected.items() if name.startswith("unet.")})
    fresh = make_pipeline("sd1")
    fresh.load_lora_weights(tmp_path / "oldest.safetensors")
    assert_same_changes(loaded_changes(fresh), changes(found))


NAME = "unet.mid_block.attentions.0.proj_in"


def pair(**changed):
    return {f"{NAME}.lora_A.weight": torch.ones(2, 4), f"{NAME}.lora_B.weight": torch.ones(5, 2), **changed}


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({}, "holds no weights"),
        (pair(**{f"{NAME}.lora_magnitude_vector": torch.ones(5)}), r"is a DoRA \(unet"),
        ({"lora_unet_mid_block_attentions_0_proj_in.hada_w1_a": torch.ones(2, 2)}, r"is a LoHa \(lora_unet"),
        ({"lora_unet_mid_block_attentions_0_proj_in.lokr_w1": torch.ones(2, 2)}, r"is a LoKr \(lora_unet"),
        ({"lora_unet_mid_block_resnets_0_conv1.lora_mid.weight": torch.ones(2, 2, 3, 3)}, "LoCon in Tucker form"),
        ({"transformer.x.lora_A.weight": torch.ones(2, 2)}, "the LoRA of a transformer"),
        ({"lora_unet_somewhere_else.lora_up": torch.ones(2, 2)}, "is no LoRA weight"),
        ({"lora_prior_a.lora_up.weight": torch.ones(2, 2)}, "begins with none of lora_unet_"),
        ({"vae.decoder.lora_A.weight": torch.ones(2, 2)}, "vae.decoder.lora_A.weight belongs to no part"),
        ({f"{NAME}.lora_A.weight": torch.ones(2, 4)}, f"incomplete: {NAME}.lora_A.weight .* no up matrix"),
        (pair(**{f"{NAME}.lora_B.weight": torch.ones(5, 3)}), r"lora_A.weight is \(2, 4\) and .* is \(5, 3\)"),
        (pair(**{f"{NAME}.lora_B.weight": torch.full((5, 2), torch.nan)}), "lora_B.weight has values that are NaN"),
        (pair(**{f"{NAME}.lora_A.weight": torch.ones(2, 4).long()}), "is of torch.int64"),
        (pair(**{f"{NAME}.lora_A.weight": torch.ones(2, 4).to(torch.float8_e4m3fn)}), "is of torch.float8_e4m3fn"),
        (pair(**{f"{NAME}.lora_down.weight": torch.ones(2, 4)}), f"has {NAME} twice: .*lora_A.weight and .*lora_down"),
        (pair(**{f"{NAME}.alpha": torch.ones(2)}), r"alpha is \(2,\), and an alpha is one number"),
    ],
)
def test_files_that_are_no_lora(state, message, tmp_path):
    save_file(state, tmp_path / "a.safetensors")
    with pytest.raises(UsageError, match=message) as raised:
        files.read(tmp_path / "a.safetensors")
    assert str(tmp_path / "a.safetensors") in str(raised.value)


def test_files_that_cannot_be_read(two, tmp_path):
    content = two["sd1"][0][1].read_bytes()
    path = tmp_path / "a.safetensors"
    for broken in (b"", b"no tensors", content[:-100], content[: len(content) // 2]):
        path.write_bytes(broken)
        with pytest.raises(UsageError, match="is no readable safetensors file"):
            files.read(path)
    folder = files.write(two["sd1"][0][0], tmp_path / "peft", "peft") / "unet"
    for text, message in {
        "{": "cannot be read as JSON",
        "[]": "is no JSON object",
        '{"peft_type": "LOHA"}': "is a LOHA",
        '{"peft_type": "LORA", "use_dora": true}': "is a DoRA",
    }.items():
        (folder / files.CONFIG_FILE).write_text(text)
        with pytest.raises(UsageError, match=message):
            files.read(folder)
    (folder / files.CONFIG_FILE).unlink()
    with pytest.raises(UsageError, match="whose alpha is in adapter_config.json"):
        files.read(folder / "adapter_model.safetensors")
    save_file(pair(), path, metadata={layouts.CONFIG_KEY: "no json"})
    with pytest.raises(UsageError, match="its metadata lora_adapter_metadata is no JSON"):
        files.read(path)
    for wrong in ({"lora_alpha": None}, {"lora_alpha": "x"}, {"alpha_pattern": [1]}, {"alpha_pattern": {"(": 1}}):
        said = {f"unet.{key}": value for key, value in wrong.items()}
        save_file(pair(), path, metadata={layouts.CONFIG_KEY: json.dumps(said)})
        with pytest.raises(UsageError, match=f"gives {NAME} no alpha that can be read"):
            files.read(path)


def test_the_files_of_diffusers_own_converter_to_kohya(two, tmp_path):
    """Its alphas are ranks, as whole numbers, whatever alpha the adapter had."""
    lora = Lora({name: layer for name, layer in two["sd1"][0][0].layers.items() if name.startswith("unet.")})
    state, _ = layouts.to_diffusers(lora)
    written = convert_state_dict_to_kohya(state)
    assert {value.dtype for key, value in written.items() if key.endswith(".alpha")} == {torch.int64}
    save_file(written, tmp_path / "a.safetensors")
    found = files.read(tmp_path / "a.safetensors")
    assert found.layout == "kohya"
    assert_same_layers(
        found, Lora({name: Layer(layer.down, layer.up, layer.rank) for name, layer in lora.layers.items()})
    )


def test_of_several_patterns_the_first_goes_with_every_layout(tmp_path):
    layers = {"unet.down_blocks.0.resnets.0.conv1": Layer(torch.ones(2, 3, 1, 1), torch.ones(4, 2, 1, 1), 3.0)}
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "alpha_pattern": {"conv1": 3, "^down_blocks.*": 1}}
    lora = Lora(layers, "peft", {"unet": config}, {})
    written = files.write(lora, tmp_path / "peft", "peft")
    for layout, name in (("diffusers", "d.safetensors"), ("peft", "p"), ("kohya", "k.safetensors")):
        written = files.write(files.read(written), tmp_path / name, layout)
        assert_same_layers(files.read(written), lora)


def test_a_layers_own_alpha_goes_before_the_configs(tmp_path):
    said = {"unet.lora_alpha": 3, "unet.r": 2, "unet.target_modules": ["proj_in"]}
    save_file(
        pair(**{f"{NAME}.alpha": torch.tensor(7.0)}),
        tmp_path / "a.safetensors",
        metadata={layouts.CONFIG_KEY: json.dumps(said)},
    )
    lora = files.read(tmp_path / "a.safetensors")
    assert lora.layers[NAME].alpha == 7
    for layout, name in (("diffusers", "b.safetensors"), ("peft", "b")):
        assert_same_layers(files.read(files.write(lora, tmp_path / name, layout)), lora)


def test_a_lora_of_another_base_names_the_first_key(make_pipeline, two, tmp_path):
    with pytest.raises(UsageError, match=r"another base model: .*unet\.\S+ is \(\d+, \d+.*has \d+ (inputs|outputs)"):
        load(make_pipeline("sdxl"), [LoraFile(two["sd1"][0][1], 1.0)])
    for name in ("conv_norm_out", "mid_block"):
        file = files.write(
            Lora({f"unet.{name}": Layer(torch.ones(2, 8), torch.ones(8, 2), 1.0)}), tmp_path / f"{name}.safetensors"
        )
        with pytest.raises(UsageError, match=f"it adapts {name}, and this UNet has a .* there, which takes no LoRA"):
            load(make_pipeline("sd1"), [LoraFile(file, 1.0)])
    only = {name: layer for name, layer in two["sdxl"][0][0].layers.items() if name.startswith("text_encoder_2")}
    path = files.write(Lora(only), tmp_path / "a.safetensors")
    pipe = make_pipeline("sd1")
    with pytest.raises(UsageError, match=r"it adapts text_encoder_2\.\S+, and this StableDiffusionPipeline has no"):
        load(pipe, [LoraFile(two["sd1"][0][1], 1.0), LoraFile(path, 1.0)])
    assert loaded_changes(pipe) == {}


def test_what_is_there_is_not_replaced(two, tmp_path):
    lora, source = two["sd1"][0]
    before = source.read_bytes()
    with pytest.raises(UsageError, match="is there already; .* --force"):
        files.write(two["sd1"][1][0], source)
    assert source.read_bytes() == before
    folder = files.write(lora, tmp_path / "peft", "peft")
    with pytest.raises(UsageError, match="is not empty; .* --force"):
        files.write(lora, folder, "peft")
    assert_same_layers(files.read(files.write(lora, folder, "peft", force=True)), lora)
    alone = Lora({name: layer for name, layer in lora.layers.items() if name.startswith("unet.")})
    for one in (alone, lora, alone):
        # What was there would be read with the new one, or in place of it.
        assert_same_layers(files.read(files.write(one, folder, "peft", force=True)), one)
    (tmp_path / "trained").mkdir()
    (tmp_path / "trained" / "pytorch_lora_weights.safetensors").write_bytes(before)
    with pytest.raises(UsageError, match="holds pytorch_lora_weights.safetensors, which would be read in place"):
        files.write(lora, tmp_path / "trained", "peft", force=True)
    for target, layout, message in [
        (source / "a.safetensors", "kohya", "a.safetensors cannot be written .*; give another place"),
        (source / "a", "peft", "a cannot be written .*; give another place"),
        (folder, "kohya", "ends in .safetensors"),
        (source, "peft", "is a folder"),
        (tmp_path / "a.bin", "diffusers", "ends in .safetensors"),
    ]:
        with pytest.raises(UsageError, match=message):
            files.write(lora, target, layout)


def test_metadata_says_what_peft_would(two):
    with safe_open(two["sd1"][0][1], framework="pt") as file:
        said = json.loads(file.metadata()[layouts.CONFIG_KEY])
    assert said["unet.peft_type"] == "LORA" and said["unet.r"] in (2, 3, 4)
    assert set(said["unet.rank_pattern"].values()) == {2, 3, 4} - {said["unet.r"]}
    assert set(said["text_encoder.target_modules"]) == {
        name.removeprefix("text_encoder.text_model.") for name in two["sd1"][0][0].layers if name.startswith("text")
    }

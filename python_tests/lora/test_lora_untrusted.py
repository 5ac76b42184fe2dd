"""LoRA files that nobody's trainer wrote: refused with the file's name, or read back equal in every layout."""

import json
import time

import pytest
import torch
from safetensors.torch import save_file

from rftcore.commands.lora import run
from rftcore.errors import UsageError
from rftcore.lora import files, info, layouts
from rftcore.lora.layers import Layer, Lora

NAME = "unet.mid_block.attentions.0.proj_in"


def write(path, name=NAME, down=(2, 3), up=(4, 2), dtype=torch.float32, value=0.5, metadata=None, **more):
    state = {f"{name}.lora_A.weight": torch.full(down, value, dtype=dtype), f"{name}.lora_B.weight": torch.ones(up)}
    save_file(state | more, path, metadata=metadata)
    return path


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"down": (2, 0)}, "is .2, 0. and"),
        ({"up": (0, 2)}, "is .0, 2.;"),
        ({"down": (0, 3), "up": (4, 0)}, "expected"),
        ({"down": (), "up": ()}, "is .. and"),
        ({"dtype": torch.float64, "value": 1e300}, "beyond fp32"),
        ({"name": f"unet.{'a' * 400}"}, "letters long, and no layer"),
        ({f"{NAME}.alpha": torch.tensor(1j)}, "NaN, infinite or beyond"),
        ({f"{NAME}.alpha": torch.tensor(1e300, dtype=torch.float64)}, "NaN, infinite or beyond"),
    ],
)
def test_shapes_and_numbers_that_no_model_has(wrong, message, tmp_path):
    with pytest.raises(UsageError, match=message):
        files.read(write(tmp_path / "a.safetensors", **wrong))


@pytest.mark.parametrize(
    "config",
    [
        {"lora_alpha": float("nan")},
        {"lora_alpha": 1e300},
        {"alpha_pattern": {"(a+)+b": 1}},
        {"alpha_pattern": {".*.*.*.*.*x": 1}},
        {"alpha_pattern": {"a?" * 30 + "a" * 30: 1}},
        {"alpha_pattern": {"(" * 5000: 1}},
        {"alpha_pattern": {"x": {}}, "lora_alpha": []},
    ],
)
def test_configs_without_an_alpha_to_be_read(config, tmp_path):
    said = {layouts.CONFIG_KEY: json.dumps({f"unet.{key}": value for key, value in config.items()})}
    with pytest.raises(UsageError, match="a.safetensors: the adapter config gives .* no alpha that can be read"):
        files.read(write(tmp_path / "a.safetensors", metadata=said))


def test_configs_that_are_nested_or_of_other_kinds(tmp_path):
    with pytest.raises(UsageError, match="nested more than 100 deep"):
        files.read(write(tmp_path / "a.safetensors", metadata={layouts.CONFIG_KEY: "[" * 5000}))
    lora = files.read(write(tmp_path / "b.safetensors", metadata={"ss_tag_frequency": "[" * 5000}))
    assert info.trained_words(lora) == []
    folder = tmp_path / "peft"
    folder.mkdir()
    name = "base_model.model.text_model.encoder.layers.0.mlp.fc1"
    write(folder / files.PEFT_FILE, name=name)
    for mapping in ("x", 3, {"base_model_class": 3}):
        (folder / files.CONFIG_FILE).write_text(json.dumps({"auto_mapping": mapping}))
        assert files.read(folder).components == ["text_encoder"]
    (folder / files.CONFIG_FILE).write_text("[" * 5000)
    with pytest.raises(UsageError, match="adapter_config.json cannot be read as JSON"):
        files.read(folder)


@pytest.mark.parametrize(
    "module", ["mid_block.x", "mid_block.a_b.to_q", "conv_in", "up_blocks.0.attentions.0.x", "conv.in"]
)
@pytest.mark.parametrize("base", ["sd", "xl"])
def test_what_kohya_has_no_name_for_is_refused_and_nothing_is_written(module, base, tmp_path):
    names = [f"unet.{module}", *(["text_encoder_2.text_projection"] if base == "xl" else [])]
    lora = Lora({name: Layer(torch.ones(2, 3), torch.ones(4, 2), 1e-44) for name in names})
    target = tmp_path / "k.safetensors"
    try:
        files.write(lora, target, "kohya")
    except UsageError as error:
        assert "cannot be written in kohya's layout" in str(error)
        assert not target.exists()
        return
    again = files.read(target)
    assert again.layers.keys() == lora.layers.keys()
    assert all(layer.alpha == pytest.approx(1e-44, rel=1e-6) for layer in again.layers.values())


def test_names_that_no_file_can_have():
    for argument in ("a" * 400, f"{'a' * 400}:0.5", "a\0b", "a:x:y"):
        with pytest.raises(UsageError, match="there is no file or folder"):
            files.parse(argument)


def test_an_alpha_for_each_of_many_layers_is_read_in_no_time(tmp_path):
    layers = {f"unet.down_blocks.0.x.{n}": Layer(torch.ones(1, 1), torch.ones(1, 1), n + 1.0) for n in range(600)}
    path = files.write(Lora(layers), tmp_path / "a.safetensors")
    start = time.process_time()
    assert {name: layer.alpha for name, layer in files.read(path).layers.items()} == {
        name: layer.alpha for name, layer in layers.items()
    }
    assert time.process_time() - start < 3.0


def test_changes_of_almost_nothing_are_compared(tmp_path):
    path = str(write(tmp_path / "a.safetensors", value=1e-42, **{f"{NAME}.alpha": torch.tensor(1e-40)}))
    assert "1.0000" in run("diff", {"first": path, "second": path})


@pytest.mark.parametrize("name", ["unet.middle_block.0.a", "text_encoder_2.text_projection", NAME])
@pytest.mark.parametrize("layout", ["diffusers", "peft"])
def test_layers_of_other_names_and_large_alphas_read_back(name, layout, tmp_path):
    lora = Lora({name: Layer(torch.ones(2, 3), torch.ones(4, 2), 1e30)})
    again = files.read(files.write(lora, tmp_path / ("a.safetensors" if layout == "diffusers" else "a"), layout))
    assert {name: layer.alpha for name, layer in again.layers.items()} == {name: 1e30}

"""`rftcore lora`: what it prints and writes, and the mistakes of a user."""

import json
import subprocess
import sys

import pytest
from tiny_loras import assert_same_changes, assert_same_layers, changes

from rftcore import cli
from rftcore.commands import lora as command
from rftcore.lora import files
from rftcore.lora.layers import Lora
from rftcore.lora.mix import mix


@pytest.fixture
def lora(capsys):
    """Runs the command in this process: its status, what it prints, and its message."""

    def run(*arguments):
        status = cli.main(["lora", *map(str, arguments)])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


def test_mix_writes_one_file(lora, two, tmp_path):
    (a, path_a), (b, path_b) = two["sd1"]
    target = tmp_path / "new" / "c.safetensors"
    status, out, _ = lora("mix", f"{path_a}:0.7", f"{path_b}:0.3", "-o", target)
    assert status == 0 and "off the exact mixture by" in out and out.endswith(f"written to {target}\n")
    assert [path.name for path in target.parent.iterdir()] == ["c.safetensors"]
    assert_same_changes(changes(files.read(target)), changes(mix([("a", a, 0.7), ("b", b, 0.3)]).lora))
    status, out, err = lora("mix", path_a, path_b, "-o", target)
    assert status == 2 and "is there already" in err
    status, out, _ = lora("mix", path_a, path_b, "-o", target, "--rank", 2, "--dtype", "bf16", "--force")
    assert status == 0 and "of rank 2" in out and {layer.rank for layer in files.read(target).layers.values()} == {2}


def test_scale_and_convert(lora, two, tmp_path):
    a, path = two["sdxl"][0]
    assert lora("scale", path, "-0.5", "-o", tmp_path / "s.safetensors")[0] == 0
    halved = files.read(tmp_path / "s.safetensors")
    assert_same_changes(changes(halved), {name: -0.5 * value for name, value in changes(a).items()})
    for layout in ("kohya", "peft"):
        target = tmp_path / ("p" if layout == "peft" else "k.safetensors")
        assert lora("convert", path, "--to", layout, "-o", target)[0] == 0
        assert files.read(target).layout == layout
        back = tmp_path / f"{layout}-back.safetensors"
        assert lora("convert", target, "--to", "diffusers", "-o", back)[0] == 0
        assert_same_layers(files.read(back), a)


def test_info(lora, two, tmp_path):
    a, _ = two["sdxl"][0]
    said = {
        "ss_tag_frequency": json.dumps({"5_cats": {"cat": 9, "a hat": 3}, "1_dogs": {"dog": 5, "cat": 1}}),
        "ss_base_model_version": "sdxl_base_v1-0",
    }
    path = files.write(Lora(a.layers, metadata=said), tmp_path / "k.safetensors", "kohya")
    status, out, _ = lora("info", path)
    lines = dict(line.split("  ", 1) for line in out.strip().splitlines() if not line.startswith(" "))
    lines = {name: text.strip() for name, text in lines.items()}
    assert status == 0 and lines["layout"] == "kohya" and "Stable Diffusion XL" in lines["base"]
    assert lines["trained words"] == "cat, dog, a hat" and lines["ss_base_model_version"] == "sdxl_base_v1-0"
    assert all(f"{rank} (" in lines["rank"] for rank in (2, 3, 4)) and "2.5 (" in lines["alpha"]
    assert f"text_encoder_2 {len(a.of('text_encoder_2'))}" in lines["layers"] and "to_out.0 (" in lines["targets"]
    total = sum(float((value**2).sum()) for value in changes(a).values()) ** 0.5
    assert lines["norm"].startswith(f"{total:.4g}") and lines["dtype"] == "float32"


def test_diff(lora, two):
    (_, path_a), (_, path_b) = two["sd1"]
    status, out, _ = lora("diff", path_a, path_b)
    assert status == 0 and "cosine" in out and "unet.up_blocks.1" in out and out.splitlines()[-1].startswith("all ")
    status, out, _ = lora("diff", path_a, path_a)
    change, cosine = out.splitlines()[-1].split()[-2:]
    assert float(change) < 1e-14 and cosine == "1.0000"
    status, out, _ = lora("diff", path_a)
    assert status == 0 and out.splitlines()[-1].split()[-1] == "100.0%"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["mix", "{a}:x", "-o", "c.safetensors"], "the scale 'x' is no number"),
        (["mix", "{a}", "-o", "c.bin"], "ends in .safetensors"),
        (["mix", "{a}", "-o", "c.safetensors", "--rank", "0"], "--rank 0 must be at least 1"),
        (["mix", "{a}", "-o", "c.safetensors", "--dtype", "fp23"], "--dtype fp23 is unknown; did you mean 'fp32'"),
        (["mix", "{a}", "{xl}", "-o", "c.safetensors"], "is of another base model than"),
        (["mix", "{a}", "none.safetensors", "-o", "c.safetensors"], "there is no file or folder none.safetensors"),
        (["scale", "{a}", "0", "-o", "c.safetensors"], "must be a finite number and not 0"),
        (["scale", "{a}:2", "3", "-o", "c.safetensors"], "takes no scale"),
        (["convert", "{a}", "--to", "kohia", "-o", "c.safetensors"], "--to kohia is unknown; did you mean 'kohya'"),
        (["convert", "{a}", "--to", "peft", "-o", "c.safetensors"], "PEFT's layout is a folder"),
        (["mix", "{a}"], "-o is missing; give the file to write"),
        (["convert", "{a}", "-o", "c.safetensors"], "--to is missing; known: diffusers, kohya, peft"),
        (["diff", "{a}", "{xl}"], "of other base models"),
        (["info"], "lora"),
    ],
)
def test_mistakes_get_one_clear_message(arguments, message, lora, two, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    paths = {"a": two["sd1"][0][1], "xl": two["sdxl"][0][1]}
    status, out, err = lora(*(argument.format(**paths) for argument in arguments))
    assert status == 2 and message in err and out == "" and not any(tmp_path.iterdir())


def test_every_action_is_served():
    assert set(command._ACTIONS) == {"mix", "scale", "info", "convert", "diff"}


def test_help_needs_no_torch():
    code = (
        "import sys\nfrom rftcore import cli\n"
        "try:\n    cli.main(['lora', 'mix', '--help'])\nexcept SystemExit:\n    pass\n"
        "assert not {'torch', 'diffusers', 'peft', 'safetensors'} & sys.modules.keys()"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "--rank" in result.stdout and "--force" in result.stdout

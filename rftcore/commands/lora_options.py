"""What `rftcore lora` can be told. Imports no torch, so that `--help` is instant."""

from __future__ import annotations

from collections.abc import Callable

from jsonargparse import ArgumentParser

LAYOUTS = ("diffusers", "peft", "kohya")
DTYPES = ("fp32", "bf16", "fp16")
_FILE = "a .safetensors file or a folder, in diffusers', PEFT's or kohya's layout"


def add_options(parser: ArgumentParser, subparser: Callable[[str], ArgumentParser]) -> None:
    """Adds the actions mix, scale, info, convert and diff, each a parser that `subparser` makes of its description."""
    actions = parser.add_subcommands(required=True, dest="action")

    mix = subparser("Mix LoRAs linearly: the weights' changes times their factors, summed.")
    mix.add_argument("loras", type=str, nargs="+", help=f"each {_FILE}, with :weight; none: 1")
    mix.add_argument(
        "--rank", type=int, help="highest rank of a layer, by SVD, the error told; none: exact, the ranks' sum"
    )
    _add_output(mix)
    actions.add_subcommand("mix", mix, help="mix LoRAs into one")

    scale = subparser("Write a LoRA with its changes times a factor.")
    scale.add_argument("lora", type=str, help=_FILE)
    scale.add_argument("factor", type=float, help="any number but 0")
    _add_output(scale)
    actions.add_subcommand("scale", scale, help="write a LoRA times a factor")

    info = subparser("What a LoRA is: layout, base model, ranks, targets, norms, trained words.")
    info.add_argument("lora", type=str, help=_FILE)
    actions.add_subcommand("info", info, help="say what a LoRA is")

    convert = subparser("Write a LoRA in another layout; its tensors stay bit for bit.")
    convert.add_argument("lora", type=str, help=_FILE)
    convert.add_argument("--to", type=str, help=f"{', '.join(LAYOUTS)}; kohya's is read by ComfyUI and A1111")
    _add_target(convert, "the .safetensors file to write; for peft a folder")
    actions.add_subcommand("convert", convert, help="write a LoRA in another layout")

    diff = subparser("What changed between two LoRAs, block by block; of one alone, what it changes where.")
    diff.add_argument("first", type=str, help=_FILE)
    diff.add_argument("second", type=str, nargs="?", help="the same; none: nothing")
    actions.add_subcommand("diff", diff, help="compare two LoRAs block by block")


def _add_output(parser: ArgumentParser) -> None:
    parser.add_argument("--dtype", type=str, default="fp32", help=f"of what is written: {', '.join(DTYPES)}")
    _add_target(parser, "the .safetensors file to write, in diffusers' layout")


def _add_target(parser: ArgumentParser, help_: str) -> None:
    parser.add_argument("-o", "--output", type=str, help=help_)
    parser.add_argument("--force", action="store_true", help="replace what is there")

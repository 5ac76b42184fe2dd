"""Command lines, up to where the work would begin: flags and values of every subcommand."""

from __future__ import annotations

from pathlib import Path

from atheris import FuzzedDataProvider

from fuzz import drawn
from fuzz.guard import Refused, demand, tried
from rftcore import cli
from rftcore.blocks.budget import bytes_of
from rftcore.commands import plan_options, sample_options
from rftcore.errors import UsageError
from rftcore.lora import files
from rftcore.training import recipes
from rftcore.training.algorithm_configs import ALGORITHMS

_ERRORS = (UsageError,)
_COMMANDS = (
    *(["train", name] for name in sorted(ALGORITHMS)),
    ["check", "draft"], ["check", "ddpo"], ["plan"], ["sample"], ["configs", "cp"], ["configs", "ls"],
    ["lora", "mix"], ["lora", "scale"], ["lora", "info"], ["lora", "convert"], ["lora", "diff"], ["x"], [],
)  # fmt: skip
# Made once: it takes ten times as long as what it parses.
_PARSER = cli._parser()
cli._parser = lambda arguments=None: _PARSER
_FLAGS = {tuple(words): sorted(cli._flags_of(_PARSER, words)) for words in _COMMANDS}
# What ends the process, having said what was asked.
_ENDING = ("--help", "-h", "--version", "--print_config")


def check(data: bytes, folder: Path) -> None:
    source = FuzzedDataProvider(data)
    words = list(drawn.one_of(source, _COMMANDS))
    flags = [flag for flag in _FLAGS[tuple(words)] if flag not in _ENDING]
    for _ in range(source.ConsumeIntInRange(0, 4)):
        kind = source.ConsumeIntInRange(0, 5)
        if kind == 0:
            words.append(_word(source, folder))
        elif flags:
            flag = drawn.one_of(source, flags)
            flag = flag if source.ConsumeIntInRange(0, 20) else flag[:-1]
            words += [f"{flag}={_word(source, folder)}"] if kind == 1 else [flag, _word(source, folder)]
    # What no process can be given.
    words = [word.replace("\0", "").encode("utf-8", "surrogateescape").decode("utf-8", "surrogateescape") for word in
             (word.encode("utf-8", "ignore").decode() for word in words)]  # fmt: skip
    if any(word.split("=")[0] in _ENDING or word.startswith("--print_c") for word in words):
        return
    try:
        namespace = tried(_ERRORS, cli._parse, words)
    except SystemExit as error:
        raise AssertionError(f"the parser ends the process with {error.code}") from error
    _settled(namespace, folder)


def _settled(namespace, folder: Path) -> None:
    command = namespace.command
    if command in ("train", "check"):
        tried(_ERRORS, cli._run_config, namespace[command])
    elif command == "plan":
        options = plan_options.PlanOptions(**namespace.plan.as_dict())
        tried(_ERRORS, options.validate)
        for text in (options.device_memory, options.memory_budget, options.reserve):
            if text is not None:
                demand(tried((ValueError,), bytes_of, text) > 0, "no bytes")
    elif command == "sample":
        options = sample_options.SampleOptions(**namespace.sample.as_dict())
        tried(_ERRORS, options.validate)
        for argument in options.lora or ():
            _parsed(argument)
    elif command == "configs" and namespace.configs.action == "cp":
        target = namespace.configs.cp.target
        # Only inside the folder: a word may be any path.
        if target is None or (not Path(target).is_absolute() and ".." not in Path(target).parts):
            tried(_ERRORS, recipes.copy, namespace.configs.cp.name, target)
    elif command == "lora":
        for word in namespace.lora[namespace.lora.action].as_dict().values():
            if isinstance(word, str):
                _parsed(word)


def _parsed(argument: str) -> None:
    try:
        path, _ = tried(_ERRORS, files.parse, argument)
    except Refused:
        return
    demand(path.exists(), "a LoRA that is not there")


def _word(source: FuzzedDataProvider, folder: Path) -> str:
    kind = source.ConsumeIntInRange(0, 6)
    if kind == 0:
        return str(drawn.one_of(source, drawn.NUMBERS))
    if kind == 1:
        return drawn.dumped(drawn.value(source))
    if kind == 2:
        path = folder / "a.safetensors"
        path.write_bytes(b"x")
        return f"{path}:{drawn.text(source)}"
    if kind == 3:
        return drawn.one_of(source, [*recipes.names()[:4], "fp32", "sd15", "ddim", "diffusers", "draft_sd15", "."])
    if kind == 4:
        path = folder / "draft_x.yaml"
        path.write_text(drawn.dumped(drawn.value(source)), errors="ignore")
        return str(path)
    return drawn.text(source)


def seeds() -> list[bytes]:
    return [bytes((13 * k * form + form) % 256 for k in range(60)) for form in range(1, 120)]

"""Recipes in YAML: any text, and any value under any key; what is sound is written out and reads back equal."""

from __future__ import annotations

from pathlib import Path

import yaml
from atheris import FuzzedDataProvider

from fuzz import drawn
from fuzz.guard import demand, tried
from rftcore import cli
from rftcore.errors import UsageError
from rftcore.training.algorithm_configs import ALGORITHMS, batch_shares
from rftcore.training.parsing import flat_keys, load_config, to_yaml

# Made once: it takes ten times as long as what it parses.
_PARSER = cli._parser()
cli._parser = lambda arguments=None: _PARSER
_NAMES = sorted(ALGORITHMS)
_DEFAULTS = {name: kind() for name, kind in ALGORITHMS.items()}
_KEYS = {name: flat_keys(kind) for name, kind in ALGORITHMS.items()}


def check(data: bytes, folder: Path) -> None:
    source = FuzzedDataProvider(data[2:])
    form, name = (data[0] if data else 0), _NAMES[(data[1] if len(data) > 1 else 0) % len(_NAMES)]
    path = folder / "c.yaml"
    if form % 3 == 0:
        path.write_bytes(data[2:])
    else:
        path.write_text(_document(source, name), encoding="utf-8", errors="surrogatepass")
    if form % 2:
        # The same by the command line.
        namespace = tried((UsageError,), cli._parse, ["train", name, "--config", str(path)])
        config = tried((UsageError,), cli._run_config, namespace.train)
    else:
        config = tried((UsageError,), load_config, name, path)
    (folder / "again.yaml").write_text(to_yaml(config), encoding="utf-8")
    again = load_config(name, folder / "again.yaml")
    demand(again == config, "the config does not read back")
    tried((UsageError,), batch_shares, config, 1)


def _document(source: FuzzedDataProvider, name: str) -> str:
    values: dict = {}
    for _ in range(source.ConsumeIntInRange(1, 4)):
        group, _, key = drawn.one_of(source, _KEYS[name]).rpartition(".")
        holder = values.setdefault(group, {}) if group else values
        holder[key if source.ConsumeIntInRange(0, 30) else drawn.text(source)] = _value(source, name, group, key)
    try:
        return yaml.safe_dump(values, allow_unicode=True)
    except RecursionError:
        return "prompts: " + "[" * 3000


def _value(source: FuzzedDataProvider, name: str, group: str, key: str):
    """Often one of the option's own kind, so that more than the first value is looked at."""
    holder = getattr(_DEFAULTS[name], group) if group else _DEFAULTS[name]
    default = getattr(holder, key)
    if source.ConsumeIntInRange(0, 2) == 0:
        return drawn.value(source)
    if isinstance(default, bool):
        return source.ConsumeBool()
    if isinstance(default, int):
        return source.ConsumeIntInRange(0, 300)
    if isinstance(default, float):
        return drawn.one_of(source, (0.5, 1.0, 0.0, 2.5, 1e-9, 1e30))
    return default


def seeds() -> list[bytes]:
    texts = (
        "output_dir: x\ntrain: {batch_size: 2, learning_rate: 1e-3}\nprompts: [a cat, a dog]\n",
        "reward:\n  function: {aesthetic: 0.5, pickscore: 1}\n  options: {aesthetic: {model: x}}\n",
        "a: &a [b, b]\nb: &b [*a, *a]\nprompts: *b\n",
        "prompts: &a [*a]\n",
        "seed: 0o17\neval: {lora_scales: [.nan, .inf], validation_prompts: x}\n",
        "seed: 2001-99-99\n",
        "seed: !!timestamp x\n",
        "seed: !!python/object/apply:os.system [id]\n",
        "? [a, b]\n: c\n",
        "%YAML 9.9\n---\n...\n--- x\n",
        "train: {<<: {batch_size: 1}, seed: !!binary x}\n",
        "seed: !!float x\n",
        "seed: !!int 0b\n",
        "lora: {target_modules: !!set {a, b}, rank: 1:30}\n",
        "seed: " + "[" * 300,
    )
    raw = [bytes([form, 2]) + text.encode() for text in texts for form in (0, 3)]
    return raw + [bytes([form, form]) + bytes((11 * k * form + k) % 256 for k in range(120)) for form in range(1, 30)]

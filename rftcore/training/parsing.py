"""From flags and YAML to a config dataclass, by jsonargparse; a wrong key or flag is told the nearest right one."""

from __future__ import annotations

import dataclasses
import typing
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ActionConfigFile, ArgumentError, ArgumentParser, Namespace

from rftcore import documents
from rftcore.errors import UsageError, nearest
from rftcore.training import recipes
from rftcore.training.algorithm_configs import ALGORITHMS
from rftcore.training.config import RunConfig


def add_options(parser: ArgumentParser, kind: type[RunConfig]) -> None:
    """Adds --config and one flag for each field of the config class, dotted for the fields of its groups."""
    parser.add_argument(
        "--config", action=_recipe_action(kind), help="a recipe's name or a YAML file; flags override it"
    )
    general = parser.add_argument_group("run")
    types, defaults = typing.get_type_hints(kind), kind()
    for field in dataclasses.fields(kind):
        default = getattr(defaults, field.name)
        if not dataclasses.is_dataclass(default):
            _add_option(general, field.name, types[field.name], field, default)
            continue
        title = parser.add_argument_group(f"{field.name}: {types[field.name].__doc__}")
        inner_types = typing.get_type_hints(types[field.name])
        for inner in dataclasses.fields(default):
            _add_option(
                title, f"{field.name}.{inner.name}", inner_types[inner.name], inner, getattr(default, inner.name)
            )


def build(kind: type[RunConfig], values: dict[str, Any]) -> RunConfig:
    """The validated config that a nested mapping describes. Raises: UsageError."""
    _check_keys(kind, values, source="config")
    defaults = kind()
    groups = {key: getattr(defaults, key) for key in values if dataclasses.is_dataclass(getattr(defaults, key))}
    config = kind(**{**values, **{key: dataclasses.replace(group, **values[key]) for key, group in groups.items()}})
    config.validate()
    return config


def load_config(algorithm: str, recipe: str | Path, *overrides: str) -> RunConfig:
    """A recipe, by name or path, as a config object; overrides are written as flags: "--train.batch_size=2".

    Raises: UsageError, as the command line does.
    """
    if algorithm not in ALGORITHMS:
        raise UsageError(f"there is no algorithm {algorithm!r}; {nearest(algorithm, ALGORITHMS)}")
    parser = ArgumentParser(exit_on_error=False, allow_abbrev=False)
    add_options(parser, ALGORITHMS[algorithm])
    values = parsed(parser, ["--config", str(recipe), *overrides]).as_dict()
    return build(ALGORITHMS[algorithm], {key: value for key, value in values.items() if key != "config"})


def parsed(parser: ArgumentParser, arguments: list[str]) -> Namespace:
    """What the arguments say. Raises: UsageError."""
    try:
        return parser.parse_args(arguments)
    except ArgumentError as error:
        if isinstance(error.__cause__, UsageError):
            raise error.__cause__ from None
        raise UsageError(" ".join(str(error).split())) from error
    # What jsonargparse lets through of the values that it tries as YAML.
    except (OverflowError, RecursionError, AttributeError) as error:
        raise UsageError(f"one of the values given is a number too large, or no value of its kind ({error})") from error


def to_yaml(config: RunConfig) -> str:
    """The resolved config, every field of it, as a recipe that --config reads back."""
    body = yaml.safe_dump(dataclasses.asdict(config), sort_keys=False, allow_unicode=True)
    return f"# rftcore train {config.algorithm}: the resolved config of a run\n{body}"


def flat_keys(kind: type[RunConfig]) -> list[str]:
    """Every option's dotted name."""
    types = typing.get_type_hints(kind)
    keys = []
    for field in dataclasses.fields(kind):
        if dataclasses.is_dataclass(types[field.name]):
            keys += [f"{field.name}.{inner.name}" for inner in dataclasses.fields(types[field.name])]
        else:
            keys.append(field.name)
    return keys


def _add_option(group: Any, name: str, type_: Any, field: dataclasses.Field, default: Any) -> None:
    group.add_argument(f"--{name}", type=type_, default=default, help=field.metadata["help"].replace("%", "%%"))


def _check_keys(kind: type[RunConfig], values: Any, source: str) -> None:
    known = flat_keys(kind)
    groups = {key.split(".")[0] for key in known if "." in key}
    if not isinstance(values, dict):
        raise UsageError(f"{source}: a mapping of option names to values is expected, not {type(values).__name__}")
    for key, value in values.items():
        if key in groups and isinstance(value, dict):
            for inner in value:
                if f"{key}.{inner}" not in known:
                    raise UsageError(f"{source}: unknown key '{key}.{inner}'; {nearest(f'{key}.{inner}', known)}")
        elif key in groups and not dataclasses.is_dataclass(value):
            raise UsageError(f"{source}: '{key}' is a group; it holds a mapping, not {value!r}")
        elif key not in known and key not in groups:
            raise UsageError(f"{source}: unknown key '{key}'; {nearest(str(key), [*known, *groups])}")


def _recipe_action(kind: type[RunConfig]) -> type[ActionConfigFile]:
    """The action of --config: finds the recipe and checks its keys before jsonargparse checks its types."""

    class Recipe(ActionConfigFile):
        def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
            path = recipes.find(values)
            if values in recipes.names() and (owner := recipes.algorithm(values)) != kind.algorithm:
                raise UsageError(f"{values} is a recipe of {owner}; rftcore train {owner} --config {values}")
            try:
                content = documents.from_yaml(path.read_text(encoding="utf-8"))
            except OSError as error:
                raise UsageError(f"{path} cannot be read: {error.strerror}") from error
            except ValueError as error:
                raise UsageError(f"{path} is not valid YAML: {error}") from error
            # An empty file says nothing, which jsonargparse takes for no config at all.
            if content is not None:
                _check_keys(kind, content, source=str(path))
                super().__call__(parser, cfg, str(path), option_string)

    return Recipe

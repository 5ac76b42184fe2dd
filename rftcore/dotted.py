"""Objects named by a dotted path, as configs and flags name a user's own functions."""

from __future__ import annotations

import difflib
from importlib import import_module
from typing import Any


class DottedPathError(LookupError):
    """A dotted path that names nothing."""


def resolve(path: str) -> Any:
    """The object at "package.module.name" or "package.module:name".

    Raises: DottedPathError where the path, the module or the name is wrong. An import that fails inside the module
    keeps its own error: that one is the module's, not the path's.
    """
    module_name, separator, name = path.partition(":") if ":" in path else path.rpartition(".")
    # One that begins with a dot is relative, and there is nothing here that it would be relative to.
    if not (separator and module_name and name) or module_name.startswith("."):
        raise DottedPathError(f"{path!r} is not of the form module.name")
    try:
        module = import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise
        raise DottedPathError(
            f"there is no module {error.name!r}; run from the folder that holds it, or install it"
        ) from error
    if not hasattr(module, name):
        public = [known for known in dir(module) if not known.startswith("_")]
        close = difflib.get_close_matches(name, public, n=1, cutoff=0.5)
        raise DottedPathError(
            f"module {module_name!r} has no {name!r}" + (f"; did you mean {close[0]!r}?" if close else "")
        )
    return getattr(module, name)

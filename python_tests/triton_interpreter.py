"""Triton's interpreter without what it repeats: the results are the same, and tests wait for it less."""

from triton import language
from triton.runtime import interpreter


def patch_language_once(monkeypatch):
    """Puts NumPy behind Triton's language once a launch, not again at each call of a helper."""
    patched = set()
    launch, patch = interpreter.GridExecutor.__call__, interpreter._patch_lang

    def launched(self, *args, **kwargs):
        patched.clear()
        return launch(self, *args, **kwargs)

    def patched_once(function):
        found = function.__globals__.values()
        languages = {value.__name__ for value in found if value is language or value is language.core}
        if languages <= patched:
            return None  # and a call of a helper looks at nothing that is returned
        patched.update(languages)
        return patch(function)

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", launched)
    monkeypatch.setattr(interpreter, "_patch_lang", patched_once)

"""docs/troubleshooting.md: every message that it quotes is one of the source."""

import ast
import functools
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
# What varies in a message.
GAP = "…"
MESSAGES = [" ".join(block.split()) for block in re.findall(r"^```text\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)]


@functools.cache
def strings():
    """Every string of the package's code, what is filled in written as a gap; and CMake's, which the build prints."""
    found = re.findall(r'"([^"]+)"', (ROOT / "CMakeLists.txt").read_text(encoding="utf-8"))
    for path in sorted((ROOT / "rftcore").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else GAP for part in node.values]
                found.append("".join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return [re.sub(f"{GAP}+", GAP, " ".join(text.split())) for text in found]


def test_the_page_has_messages():
    assert len(MESSAGES) > 40
    assert len(set(MESSAGES)) == len(MESSAGES)


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: message[:60])
def test_a_message_is_in_the_source(message):
    assert any(message in text for text in strings())


def test_a_message_of_other_words_is_not_found():
    changed = MESSAGES[0].replace("Raise it", "Lower it")
    assert changed != MESSAGES[0] and not any(changed in text for text in strings())

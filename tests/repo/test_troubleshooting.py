"""What docs/troubleshooting.md quotes is what the program says."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "troubleshooting.md"
OF_OTHERS = ("size mismatch", "Unknown quantization type, got sab")  # of Transformers; tests/hf sees them


def said():
    """Every string of the package, what is put into it left out."""
    found = []
    for path in (ROOT / "optimum_sab").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "…" for part in node.values]
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def quoted():
    """The messages in the first column of the page's tables."""
    for row in re.findall(r"^\| (.*?) \|", PAGE.read_text(), re.MULTILINE):
        for message in re.findall(r"`([^`]+)`", row):
            if " " in message and message not in OF_OTHERS:
                yield message


def test_every_message_that_is_quoted_is_said_by_the_program():
    messages = said()
    found = list(quoted())
    assert len(found) > 20
    for message in found:
        parts = [part.strip() for part in message.split("…") if part.strip()]
        assert any(all(part in each for part in parts) for each in messages), message

"""What the plugin says to its user, read in its sources: refusals, log lines, and why it cannot be built."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
# Commands have messages of their own, each said to whoever just typed the command.
SOURCES = [p for p in sorted(ROOT.glob("vllm_infllm/**/*.py")) if "tools" not in p.parts] + [ROOT / "setup.py"]
REFUSALS = {"ConfigError", "ValueError", "SystemExit"}
LOGS = {"info", "warning", "error"}
# Functions that return a reason, and lists of reasons that one message is made of.
REASONS = {"check", "unsupported_vllm"}
LISTS = {"refusals"}


def stable_parts() -> dict[str, str]:
    """The longest part of each message that does not depend on values, and where it stands."""
    found = {}
    for path in SOURCES:
        for line, message in _messages(ast.parse(path.read_text())):
            part = max(message, key=len).strip()
            found[" ".join(part.split())] = f"{path.relative_to(ROOT)}:{line}"
    return found


def _messages(tree: ast.Module) -> Iterator[tuple[int, list[str]]]:
    """Line and constant parts of each message of a module."""
    for node in ast.walk(tree):
        said: list[ast.expr] = []
        if isinstance(node, ast.Call) and _called(node) in REFUSALS | LOGS:
            said = node.args[:1]
        elif isinstance(node, ast.FunctionDef) and node.name in REASONS:
            said = [child.value for child in ast.walk(node) if isinstance(child, ast.Return) and child.value]
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            name = node.targets[0].id
            if name in LISTS and isinstance(node.value, ast.List):
                said = [entry.elts[1] for entry in node.value.elts if isinstance(entry, ast.Tuple)]
            elif re.match("NO_[A-Z]+$", name):
                said = [node.value]
        yield from ((text.lineno, parts) for text in said if (parts := _constants(text)))


def _called(call: ast.Call) -> str:
    """The last part of the name of what is called."""
    return getattr(call.func, "attr", "") or getattr(call.func, "id", "")


def _constants(text: ast.expr) -> list[str]:
    """The constant parts of a string, an f-string, or one that is to be formatted."""
    pieces = text.values if isinstance(text, ast.JoinedStr) else [text]
    texts = [p.value for p in pieces if isinstance(p, ast.Constant) and isinstance(p.value, str)]
    return [part for text in texts for part in re.split(r"%[sd]|\{\w*\}", text) if part.strip()]

"""The text of every error that scg raises, read from its own sources: the index of the page of errors."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from scg import errors

_ROOT = Path(__file__).parent
_CLASSES = [name for name in vars(errors) if name.endswith("Error")]
_FOLDERS = (".", "analysis", "estimators", "passes", "backends", "measure")


def texts() -> dict[str, list[str]]:
    """By class, the text of each error that is raised somewhere; ``…`` for what differs from program to program."""
    found: dict[str, set[str]] = {name: set() for name in _CLASSES}
    for folder in _FOLDERS:
        for path in (_ROOT / folder).glob("*.py"):
            for name, text in _raised(ast.parse(path.read_text(encoding="utf-8"))):
                found[name].add(text)
    return {name: sorted(some, key=str.lower) for name, some in found.items()}


def _raised(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """Class and text of each call of an error's class whose text stands there."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _CLASSES and node.args:
            text = re.sub(r"\s+", " ", _text(node.args[0])).strip()
            text = re.sub(r"^(%?…\W*)*(…|:|\))+\s+", "", text)  # names and places come first
            if re.search(r"\w{3}", text):
                yield node.func.id, text


def _text(node: ast.expr) -> str:
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(part) for part in node.values)
    if isinstance(node, ast.BinOp):
        return _text(node.left) + _text(node.right)
    return "…"


def index() -> str:
    """The section, in Markdown."""
    lines = ["## Index of texts", "", "… stands for what differs; names of nodes and places come first in each.", ""]
    for name, some in texts().items():
        lines += [f"### {name}", "", *(f"- {_escaped(text)}" for text in some), ""]
    return "\n".join(lines)


def _escaped(text: str) -> str:
    """Text as Markdown that shows it as it is."""
    return re.sub(r"([\\`*_{}\[\]<>$|#])", r"\\\1", text)

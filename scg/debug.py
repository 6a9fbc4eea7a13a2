"""What a pass changed, as a unified diff of text forms: printed with ``SCG_DEBUG=1``."""

from __future__ import annotations

import difflib
import sys
from typing import TextIO

from scg.ir import Graph


def diff(before: Graph, after: Graph, pass_name: str) -> str:
    """The lines that differ, with three of context; empty if none do."""
    old, new = (str(graph).splitlines() for graph in (before, after))
    return "\n".join(difflib.unified_diff(old, new, f"before {pass_name}", f"after {pass_name}", lineterm=""))


def show_diff(before: Graph, after: Graph, pass_name: str, file: TextIO | None = None) -> None:
    """Prints what the pass changed to ``file``, by default the standard error stream."""
    print(diff(before, after, pass_name) or f"{pass_name}: nothing changed", file=file or sys.stderr)

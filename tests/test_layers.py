"""Imports point one way, torch.fx stays at the two ends, heavy packages wait until they are used."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

LAYERS = (
    {"errors", "ir", "template", "interception"},
    {"operations", "analysis", "verifier", "debug"},
    {"estimators"},
    {"passes"},
    {"backends", "report"},
    {"primitives", "capture", "holder", "host_random", "tracer"},
    {"exact", "exact_marginals"},
    {"pipeline", "diagnostics"},
    {"measure"},
    {"cli", "error_index"},
)
"""Each may import from its own layer and those above it in this list; ``tracer`` stands for ``tracer_*`` as well."""

VIEWS = {("ir", "backends"), ("ir", "analysis")}
"""A graph shows and answers for itself: these imports happen inside the methods that do."""

FX = {"tracer", "tracer_batch", "tracer_frames", "tracer_graph", "tracer_operations", "tracer_recorder", "backends"}
"""Who may import torch.fx."""


def _sources() -> dict[str, Path]:
    """Every module below ``scg`` by its dotted name without ``scg.``."""
    found = {}
    for folder, prefix in ((ROOT / "scg", ""), (ROOT / "passes", "passes."), (ROOT / "backends", "backends.")):
        for path in sorted(folder.rglob("*.py")):
            inside = path.relative_to(folder)
            if not (folder / inside.parts[0]).is_symlink():
                found[prefix + ".".join(inside.with_suffix("").parts)] = path
    return found


def _imports(node: ast.AST) -> Iterator[str]:
    """Dotted names of everything imported at run time below ``node``."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            continue
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, f"relative import of {child.module}"
            yield from (f"{child.module}.{alias.name}" for alias in child.names)
        else:
            yield from _imports(child)


def _part(module: str) -> str:
    """``tracer`` of ``tracer_graph``, ``passes`` of ``passes.credit``."""
    part = module.split(".")[0]
    return "tracer" if part.startswith("tracer_") else part


def _layer(part: str) -> int:
    return next((i for i, layer in enumerate(LAYERS) if part in layer), -1)


SOURCES = _sources()


@pytest.mark.parametrize("module", [module for module in SOURCES if module != "__init__"])
def test_imports_point_down(module: str) -> None:
    part = _part(module)
    assert _layer(part) >= 0, f"scg.{part} has no place in LAYERS"
    for name in _imports(ast.parse(SOURCES[module].read_text())):
        if name.split(".")[0] == "scg":
            target = _part(name.removeprefix("scg.")) if "." in name else "__init__"
            allowed = (part, target) in VIEWS or 0 <= _layer(target) <= _layer(part)
            assert allowed, f"scg.{module} imports {name}: scg.{target} stands above scg.{part}"
        if name.startswith("torch.fx"):
            assert part in FX, f"scg.{module} imports {name}: only {', '.join(sorted(FX))} know torch.fx"


def test_heavy_packages_wait_until_they_are_used() -> None:
    script = (
        "import sys, torch; before = set(sys.modules); import scg; "
        "print(sorted({name.split('.')[0] for name in set(sys.modules) - before}))"
    )
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    loaded = set(ast.literal_eval(out.stdout))
    assert not loaded & {"networkx", "sympy", "pygraphviz", "rich", "matplotlib"}

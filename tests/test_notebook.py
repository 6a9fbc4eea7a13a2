"""The tutorial notebook is a valid one, and runs from the first cell to the last; what it shows has a display."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest

NOTEBOOK = Path(__file__).parent.parent / "examples" / "tutorial.ipynb"


def test_the_tutorial_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notebook = json.loads(NOTEBOOK.read_text())
    assert (notebook["nbformat"], notebook["metadata"]["kernelspec"]["language"]) == (4, "python")
    assert len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])
    monkeypatch.chdir(tmp_path)
    scope: dict[str, Any] = {"__name__": "a_notebook"}
    shown = []
    for number, cell in enumerate(cell for cell in notebook["cells"] if cell["cell_type"] == "code"):
        assert cell["outputs"] == [] and cell["execution_count"] is None, "clear the outputs before committing"
        path = tmp_path / f"cell_{number}.py"
        path.write_text("".join(cell["source"]))
        tree = ast.parse(path.read_text())
        last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, str(path), "exec"), scope)
        if isinstance(last, ast.Expr):
            shown.append(eval(compile(ast.Expression(last.value), str(path), "eval"), scope))
    compiled, report, formula, _, budget, _, written = shown
    assert compiled._repr_html_().startswith("<svg") and "<table" in report._repr_html_()
    assert formula._repr_latex_().startswith("$$") and "<table" in budget._repr_html_()
    assert "</html>" in Path(written).read_text()

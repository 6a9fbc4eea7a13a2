"""The Python in the README and the documentation runs, and the links lead somewhere."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import types
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
import torch

import scg
from benchmarks import variance
from scg import error_index, errors
from scg.estimators import GROUPS
from scg.passes.clean import eliminate_dead_code
from tests.law2 import assert_unbiased
from tests.problems import PROBLEMS

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

PRELUDE = """
from dataclasses import dataclass
from typing import ClassVar
import torch
from torch import Tensor
from scg.estimators.base import YES, ScoreEstimator, SiteContext, SiteInfo, Support
from scg.ir import Graph
from scg.passes.rewriter import Rewriter, is_op
aten = torch.ops.aten
"""


def _run(page: Path, monkeypatch: pytest.MonkeyPatch, folder: Path) -> dict[str, Any]:
    """The names that the page's Python blocks leave behind."""
    if "import gymnasium" in page.read_text():
        pytest.importorskip("gymnasium")
    monkeypatch.chdir(folder)
    module = types.ModuleType("a_page")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    scope = vars(module)
    exec(PRELUDE, scope)
    scope["x"] = (torch.rand(5, 64) < 0.5).float()
    for block in re.findall(r"^```python[^\n]*\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL):
        source = folder / "block.py"
        source.write_text(block)
        exec(compile(block, str(source), "exec"), scope)
    return scope


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _run(page, monkeypatch, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("package", ["pyro", "storch"])
def test_the_other_side_runs(package: str, tmp_path: Path) -> None:
    """What is shown beside our own code, where that package is there; in a process of its own, as some patch torch."""
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    text = (ROOT / "docs" / "coming-from.md").read_text()
    blocks = re.findall(r"^```py(?:thon)?[^\n]*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    program = tmp_path / "program.py"
    program.write_text("\n".join([blocks[0], next(block for block in blocks if f"import {package}" in block)]))
    subprocess.run([sys.executable, program], check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})


def test_the_estimator_of_the_tutorial_is_unbiased(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = ROOT / "docs" / "adding-an-estimator.md"
    scope = _run(page, monkeypatch, tmp_path)
    (whole,) = (block for block in page.read_text().split("```") if "class ConstantBaseline" in block)
    assert len(whole.splitlines()) < 40
    assert_unbiased(PROBLEMS["chain"](), estimator=scope["ConstantBaseline"](b=2.0))


def test_the_pass_of_the_tutorial_rewrites(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rewrite = _run(ROOT / "docs" / "adding-a-pass.md", monkeypatch, tmp_path)["drop_double_negation"]
    before = scg.trace(lambda x: torch.neg(torch.neg(x)).exp().sum(), torch.ones(3))
    after = eliminate_dead_code(rewrite(before))
    assert str(before).count("neg(") == 2 and "neg(" not in str(after)
    assert rewrite(after) == after


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"`[^`]*`", "", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL))
    for target in re.findall(r"\]\(([^)#]+)\)", text) + re.findall(r'src="([^"]+)"', text):
        assert target.startswith("http") or (page.parent / target).exists(), target


def test_every_error_is_on_its_page() -> None:
    page = (ROOT / "docs" / "errors.md").read_text()
    classes = {name for name in vars(errors) if name.endswith(("Error", "Warning"))}
    assert all(f"`{name}`" in page for name in classes)
    texts = error_index.texts()
    assert {len(some) > 0 for some in texts.values()} == {True} and texts.keys() < classes
    assert (
        "nothing is traced yet: call the module once, or give example_inputs to scg.compile" in texts["LoweringError"]
    )
    raised = len(re.findall(r"\n- ", error_index.index()))
    assert raised == sum(map(len, texts.values())) > 70


def test_every_estimator_has_a_plot_of_its_variance() -> None:
    """Those apart whose draws are given."""
    drawn = {path.stem for path in (ROOT / "docs" / "variance").glob("*.svg")}
    assert scg.ESTIMATORS.keys() - drawn == {cls.name for cls in GROUPS["Replayed draws"]}
    assert drawn <= scg.ESTIMATORS.keys()
    for name in drawn:
        ET.parse(ROOT / "docs" / "variance" / f"{name}.svg")


@pytest.mark.slow
def test_variance_plots_are_drawn() -> None:
    """Of an exact estimator, of one with learned parts and of a biased one; the mean is checked on the way."""
    drawn = dict(variance.figures(["enumerate", "critic", "straight_through"]))
    assert "no variance" in drawn["enumerate"] and "squared bias" in drawn["straight_through"]
    assert all(ET.fromstring(text).tag.endswith("svg") for text in drawn.values())

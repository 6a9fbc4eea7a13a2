"""The Python in the README and the documentation runs, and the links lead somewhere."""

from __future__ import annotations

import re
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

import scg
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
    for block in re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL):
        source = folder / "block.py"
        source.write_text(block)
        exec(compile(block, str(source), "exec"), scope)
    return scope


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _run(page, monkeypatch, tmp_path)


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

"""The command line, called as a function and once as a program."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import scg
from scg.cli import FAILED, USAGE, main

MODEL = """
import torch
from torch import nn
from torch.distributions import Bernoulli, Normal
import scg

INPUTS = torch.ones(3, 4)

class VAE(nn.Module):
    def __init__(self):
        super().__init__()
        self.enc = nn.Linear(4, 2)
    def forward(self, x):
        z = Bernoulli(logits=self.enc(x)).sample()
        return ((z.sum(-1) - x.sum(-1)) ** 2).mean()

class Sized(nn.Module):
    def __init__(self, size):
        super().__init__()

model = VAE()
compiled = scg.compile(model, estimator="enumerate")
size = 3

def no_loss(x):
    return x
"""


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "a_vae.py"
    path.write_text(MODEL)
    return str(path)


def test_explain(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", f"{file}:VAE", "--estimator", "score_function", "--samples", "3"]) == 0
    out = capsys.readouterr().out
    assert "score_function, leave_one_out" in out.replace("\n", " ") or "leave_one_out" in out
    assert main(["explain", f"{file}:compiled", "--markdown"]) == 0
    assert "| z | Bernoulli |" in capsys.readouterr().out


@pytest.mark.parametrize("suffix", ["svg", "html", "dot"])
def test_render(file: str, tmp_path: Path, suffix: str, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / f"picture.{suffix}"
    assert main(["render", f"{file}:model", "--output", str(target), "--view", "dataflow"]) == 0
    assert capsys.readouterr().out.strip() == str(target)
    assert target.stat().st_size > 1000


def test_render_names_the_picture_after_the_file(file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["render", "a_vae.py:model"]) == 0
    assert (tmp_path / "a_vae.svg").is_file()


def test_code_formula_and_passes(file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "step.py"
    assert main(["code", f"{file}:model", "-o", str(target)]) == 0
    assert "def forward" in target.read_text()
    assert main(["formula", f"{file}:model"]) == 0
    assert r"\mathcal{L}(\theta)" in capsys.readouterr().out
    assert main(["passes", f"{file}:model"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("graph VAE(x) {") and "+++ after split_costs" in out


def test_estimators(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["estimators"]) == 0
    out = capsys.readouterr().out
    assert all(f"`{name}`" in out for name in scg.ESTIMATORS)


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["explain", "a_vae.py"], USAGE, "must be FILE.py:NAME"),
        (["explain", "missing.py:model"], USAGE, "missing.py: no such Python file"),
        (["explain", "a_vae.py:modle"], USAGE, "did you mean 'model'?"),
        (["explain", "a_vae.py:size"], USAGE, "size is of type int; name a module or a function"),
        (["explain", "a_vae.py:Sized"], USAGE, "name an instance"),
        (["explain", "a_vae.py:compiled", "--samples", "2"], USAGE, "is compiled already"),
        (["explain", "broken.py:model"], USAGE, "ZeroDivisionError at broken.py:1"),
        (["explain", "bare.py:f"], USAGE, "define example_inputs() or INPUTS in bare.py"),
        (["explain", "a_vae.py:model", "--estimator", "enumrate"], FAILED, "did you mean 'enumerate'?"),
        (["explain", "a_vae.py:no_loss"], FAILED, "scalar"),
        (["render", "a_vae.py:model", "-o", "x.docx"], FAILED, "the suffix must be one of"),
    ],
)
def test_mistakes(
    file: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    code: int,
    text: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.py").write_text("1 / 0\n")
    (tmp_path / "bare.py").write_text("def f(x):\n    return x.sum()\n")
    assert main(arguments) == code
    error = capsys.readouterr().err
    assert text in error and error.startswith("scg: ") and "Traceback" not in error


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    out = capsys.readouterr().out
    assert all(name in out for name in ("render", "explain", "formula", "code", "passes", "estimators"))


def test_as_a_program(file: str) -> None:
    done = subprocess.run([sys.executable, "-m", "scg.cli", "code", f"{file}:model"], capture_output=True, text=True)
    assert done.returncode == 0 and "def forward" in done.stdout, done.stderr
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())
    assert project["project"]["scripts"] == {"scg": "scg.cli:main"}

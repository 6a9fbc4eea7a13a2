"""A new user, from the documentation alone, gets from the install to a picture of their own model in five commands."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def _blocks(language: str) -> list[str]:
    text = (ROOT / "README.md").read_text().partition("## Five commands")[2].partition("\n## ")[0]
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def test_five_commands_or_fewer() -> None:
    (commands,) = _blocks("sh")
    assert len(commands.splitlines()) <= 5
    (model,) = _blocks("python")
    assert len(model[model.index("class") :].strip().splitlines()) <= 10


@pytest.mark.parametrize("install", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_from_install_to_picture(install: bool, tmp_path: Path) -> None:
    """Runs the commands in an empty folder; without ``install`` those of scg alone, with the sources at hand."""
    (model,), (commands,) = _blocks("python"), _blocks("sh")
    (tmp_path / "model.py").write_text(model)
    environment = {**os.environ, "PYTHONPATH": "" if install else str(ROOT), "OMP_NUM_THREADS": "1"}
    lines = commands.splitlines()
    if not install:
        lines = [line.replace(".venv/bin/scg", f"{sys.executable} -m scg.cli") for line in lines if "bin/scg" in line]
    assert lines
    for line in lines:
        command = line.replace("pip install .", f"pip install {ROOT}")
        done = subprocess.run(command, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}\n{done.stderr}"
    assert (tmp_path / "model.svg").read_text().startswith("<svg")
    assert "Bernoulli" in done.stdout

"""Each example runs from a shell, warnings being errors."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


_SLOW = {"gallery", "credit_on_a_chain"}
EXAMPLES = [
    pytest.param(path, id=path.stem, marks=[pytest.mark.slow] if path.stem in _SLOW else [])
    for path in sorted((ROOT / "examples").glob("[!_]*.py"))
]


@pytest.mark.parametrize("example", EXAMPLES)
def test_example(example: Path, tmp_path: Path) -> None:
    if "import gymnasium" in example.read_text():
        pytest.importorskip("gymnasium")
    command = [sys.executable, "-W", "error", str(example), "--smoke-test"]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout
    if example.stem == "game_of_life":
        assert "credited with 49 of 81 cells" in done.stdout
    if example.stem == "reinforce_cartpole":
        assert (tmp_path / "out" / "cartpole.svg").read_text().count("reward_") >= 3
    if example.stem == "discrete_vae":
        assert "test ELBO" in done.stdout
        for suffix in ("svg", "html"):
            assert (tmp_path / "out" / f"discrete_vae.{suffix}").stat().st_size > 1000

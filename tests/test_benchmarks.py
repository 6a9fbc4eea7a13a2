"""What the benchmarks compare computes the same, and they run."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import scg
from benchmarks import chain, tokens, vae
from scg.exact import exact
from tests.law2 import expected_estimate

ROOT = Path(__file__).parent.parent

PAIRS: dict[str, tuple[Callable[[], nn.Module], Callable[..., Tensor], Tensor]] = {
    "vae": (lambda: vae.VAE(3, 2, 1), vae.by_hand, torch.tensor([[1.0, 0.0, 1.0]])),
    "chain": (lambda: chain.Chain(2, 2), chain.by_hand, torch.tensor([[0.4, -1.3]])),
}


@pytest.mark.parametrize("name", PAIRS)
def test_the_hand_written_estimator_is_unbiased(name: str) -> None:
    make, by_hand, x = PAIRS[name]
    model, x = make().double(), x.double()
    _, gradient = expected_estimate(lambda: by_hand(model, x, 2), dict(model.named_parameters()))
    torch.testing.assert_close(gradient, exact(model, x)[1], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", PAIRS)
def test_the_compiled_gradient_is_the_hand_written_one(name: str) -> None:
    make, by_hand, x = PAIRS[name]
    model, x = make().double(), x.double()
    compiled = scg.compile(model, estimator="score_function", samples=4, example_inputs=(x,))
    gradients = []
    for loss in (lambda: compiled(x), lambda: by_hand(model, x, 4)):
        torch.manual_seed(1)
        gradients.append(torch.autograd.grad(loss(), list(model.parameters())))
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-12)


def test_the_compiled_loss_of_replayed_tokens_is_the_hand_written_one() -> None:
    model = tokens.Policy(5, 8).double()
    prompt = torch.randint(5, (3,))
    answers, mask, reward = model.answers(prompt, 4, 6)
    batch = (prompt, answers, mask.double(), reward.double())
    losses = (tokens.compiled(model)(*batch), tokens.by_hand(model, *batch))
    torch.testing.assert_close(*losses, rtol=1e-12, atol=1e-12)
    gradients = [torch.autograd.grad(loss, list(model.parameters())) for loss in losses]
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-12)


@pytest.mark.slow
def test_the_benchmarks_run(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.run", "--quick", "--no-inductor", "--out", str(tmp_path / "table.md")]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    assert "VAE, eager" in (tmp_path / "table.md").read_text()


@pytest.mark.slow
def test_the_reproductions_run() -> None:
    command = [sys.executable, "-m", "benchmarks.papers", "--quick"]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    assert done.stdout.count("| what | theirs | ours | holds |") == 6


@pytest.mark.slow
def test_the_variance_of_closed_forms_is_measured() -> None:
    command = [sys.executable, "-m", "benchmarks.closed_forms", "--quick"]
    table = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert table.count("\n") == 2 + 2 * 3 * 3

"""What the benchmarks compare computes the same, and they run."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import scg
from benchmarks import chain, tokens, vae
from benchmarks.by_hand import CASES
from benchmarks.by_hand.models import FewBits, Gaussian
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


def test_every_estimator_is_written_by_hand() -> None:
    assert scg.ESTIMATORS.keys() <= CASES.keys()


@pytest.mark.parametrize("name", CASES)
def test_the_compiled_estimator_is_the_hand_written_one(name: str) -> None:
    case = CASES[name]
    torch.manual_seed(0)
    model = case.model(*case.small).double()
    batch = tuple(each.double() if each.is_floating_point() else each for each in case.inputs(model, 4))
    estimator = case.estimator or name
    compiled = scg.compile(model, estimator=estimator, samples=case.samples, example_inputs=batch).double()
    state = compiled.estimators["z"] if "z" in compiled.estimators else None
    with torch.no_grad():  # what is learned starts where it changes nothing
        for parameter in compiled.estimator_parameters():
            parameter.add_(0.1 * torch.rand_like(parameter))
    compiled(*batch)
    before, found = copy.deepcopy(compiled.state_dict()), []
    for loss in (lambda: compiled(*batch), lambda: case.by_hand(model, *batch, state)):
        torch.manual_seed(1)
        compiled.load_state_dict(before)
        gradients = torch.autograd.grad(loss(), list(compiled.parameters()))
        found.append((gradients, copy.deepcopy(list(compiled.buffers()))))
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-11)


class Products(TorchDispatchMode):
    """Counts the rows that are multiplied by a matrix, by its two sizes."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.rows: Counter[tuple[int, int]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if str(func.overloadpacket) in ("aten.addmm", "aten.mm", "aten.bmm", "aten.linear"):
            left = args[func is torch.ops.aten.addmm.default]
            self.rows[left.shape[-1], out.shape[-1]] += out.numel() // out.shape[-1]
        return out


@pytest.mark.parametrize(
    ("estimator", "model", "rows"),
    [("local_expectation", FewBits, 1 + 3), ("measure_valued", Gaussian, 1 + 3 * 3), ("bitflip", FewBits, 2),
     ("go_gradient", FewBits, 1 + 3), ("rebar", FewBits, 3), ("relax", FewBits, 3), ("muprop", FewBits, 2),
     ("stochastic_ad", FewBits, 2), ("indecater", FewBits, 4 + 3), ("spsa", FewBits, 3), ("double_cv", FewBits, 2),
     ("rodeo", FewBits, 2)],
)  # fmt: skip
def test_reruns_evaluate_what_lies_below_alone(estimator: str, model: Any, rows: int) -> None:
    """The encoder once, the decoder once for the draw and once for each further outcome."""
    made, x = model(7, 3, 5), torch.ones(4, 7)
    compiled = scg.compile(made, estimator=estimator, samples=CASES[estimator].samples, example_inputs=(x,))
    with Products() as forward:
        compiled(x)
    assert forward.rows[7, 3] == 4 * (2 if model is Gaussian else 1)  # the encoder's outputs: mean and scale
    assert forward.rows[5, 7] == 4 * rows  # the decoder's


@pytest.mark.slow
def test_every_estimator_of_the_digits_runs(tmp_path: Path) -> None:
    out = tmp_path / "table.md"
    names = ["disarm", "reinmax", "carms"]
    command = [sys.executable, "-m", "benchmarks.digits", "--smoke-test", "--only", *names, "--out", str(out)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    assert all(f"`{name}`" in out.read_text() for name in names)


@pytest.mark.slow
def test_the_benchmarks_run(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.run", "--quick", "--no-inductor", "--out", str(tmp_path / "table.md")]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    assert "VAE, eager" in (tmp_path / "table.md").read_text()


@pytest.mark.slow
def test_the_reproductions_run() -> None:
    command = [sys.executable, "-m", "benchmarks.papers", "--quick"]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    assert done.stdout.count("| what | theirs | ours | holds |") == 9


@pytest.mark.slow
def test_the_variance_of_closed_forms_is_measured() -> None:
    command = [sys.executable, "-m", "benchmarks.closed_forms", "--quick"]
    table = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert table.count("\n") == 2 + 2 * 3 * 3

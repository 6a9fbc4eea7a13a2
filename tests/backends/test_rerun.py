"""Reruns of the slice below a site, on real tensors: signals and derivatives of each row by hand."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli, Normal

import scg
from scg.analysis.influence import influence
from scg.backends import reruns
from scg.backends.coefficients import CoefficientRule
from scg.backends.lowering import Interpreter
from scg.estimators.base import Rerun
from scg.estimators.score_function import ScoreFunction
from scg.exact import Walk
from scg.ir import Input, Node, Param, Sample
from scg.passes import InsertEstimators
from scg.pipeline import run_passes, trace
from tests.law2 import ForcedDraws

SCORE = ScoreFunction(baseline=None)


class Name:
    """A context manager that does nothing with a name."""

    def __init__(self, name: str) -> None: ...

    def __enter__(self) -> None: ...

    def __exit__(self, *error: object) -> None: ...


def interpreter(model: Callable[..., Any], estimators: Mapping[str, Any], samples: int = 1) -> Interpreter:
    """A finished run of ``model`` on real tensors."""
    graph = run_passes(trace(model), InsertEstimators(overrides=dict(estimators), samples=samples))

    def fetch(node: Node) -> Tensor:
        assert isinstance(node, (Input, Param))
        return graph.tensors[node.path]

    sites = [site.name for site in graph.of(Sample)]
    made = Interpreter(graph, influence(graph, sites), fetch, CoefficientRule(graph), {})
    made.run(Name)
    return made


def rerun(run: Interpreter, site: str, values: Tensor, *, differentiable: bool = False) -> Rerun:
    node = run.graph[site]
    assert isinstance(node, Sample)
    return reruns.rerun(run, node, run.env[site].dims, values, differentiable)


def _params(*values: float) -> Tensor:
    return nn.Parameter(torch.tensor(values, dtype=torch.float64))


W, C = _params(0.4, -0.7), _params(1.3, 0.6)


def two_layers() -> Tensor:
    top = Bernoulli(logits=W).sample()
    bottom = Bernoulli(logits=C * top).sample()
    return ((bottom - 0.3) ** 2 * (1 + top)).sum() / 4 + (C * top).sum() ** 2


def by_hand(top: Tensor) -> tuple[Tensor, Tensor]:
    """Expected costs given ``top``: those of each element, and the shared one."""
    p = torch.sigmoid(C.detach() * top)
    return (p * 0.49 + (1 - p) * 0.09) * (1 + top) / 4, (C.detach() * top).sum(-1) ** 2


ROWS = torch.tensor([[0.0, 1.0], [0.3, 0.8], [1.0, 1.0]], dtype=torch.float64)


def test_signal_is_the_expected_cost_to_go_of_each_row() -> None:
    run = interpreter(two_layers, {"top": SCORE, "bottom": "enumerate"})
    own, shared = by_hand(ROWS)
    _, scale = run.signals.of(run.graph["top"], ()) or (None, 1.0)  # type: ignore[arg-type]
    torch.testing.assert_close(rerun(run, "top", ROWS).signal * scale, own + shared[:, None])


@pytest.mark.parametrize("samples", [1, 3])
def test_derivatives_stay_apart_for_rows_and_draws(samples: int) -> None:
    run = interpreter(two_layers, {"top": SCORE, "bottom": "enumerate"}, samples)
    dims = run.env["top"].dims
    values = (ROWS.unsqueeze(1).expand(-1, samples, -1) if dims else ROWS).clone().requires_grad_()
    found = rerun(run, "top", values, differentiable=True)
    assert found.surrogate is not None
    (slope,) = torch.autograd.grad(found.surrogate.sum(), values)
    rows = ROWS.clone().requires_grad_()
    own, shared = by_hand(rows)
    (expected,) = torch.autograd.grad(own.sum() + shared.sum(), rows)
    _, scale = run.signals.of(run.graph["top"], dims) or (None, 1.0)  # type: ignore[arg-type]
    torch.testing.assert_close(slope * scale, expected.unsqueeze(1).expand_as(slope) if dims else expected)


def test_inner_terms_carry_the_gradient_of_inner_score_sites() -> None:
    """Averaged over the inner draws, the derivative is that of the inner expectation."""
    run = interpreter(two_layers, {"*": SCORE})
    rows = ROWS[1:2].clone().requires_grad_()
    own, shared = by_hand(rows)
    (expected,) = torch.autograd.grad(own.sum() + shared.sum(), rows)
    _, scale = run.signals.of(run.graph["top"], ()) or (None, 1.0)  # type: ignore[arg-type]
    total = torch.zeros_like(rows)
    walk = Walk()
    while walk.more():
        draws = ForcedDraws(walk)
        with draws:
            found = rerun(run, "top", rows, differentiable=True)
        assert found.surrogate is not None
        (slope,) = torch.autograd.grad(found.surrogate.sum(), rows)
        total += draws.probability * slope * scale
    torch.testing.assert_close(total, expected)


def test_the_gradient_reaches_the_rows_alone() -> None:
    run = interpreter(two_layers, {"*": SCORE})
    rows = ROWS.clone().requires_grad_()
    found = rerun(run, "top", rows, differentiable=True)
    assert found.surrogate is not None
    reached = torch.autograd.grad(found.surrogate.sum() + found.signal.sum(), [W, C], allow_unused=True)
    assert all(slope is None for slope in reached)
    assert not rerun(run, "top", rows).signal.requires_grad


def test_inner_draws_are_fresh_in_each_row() -> None:
    mean = _params(0.0)

    def chain() -> Tensor:
        z = Normal(mean, 1.0).sample()
        return (Normal(z, 1.0).sample() ** 2).sum()

    run = interpreter(chain, {"*": SCORE})
    torch.manual_seed(0)
    signal = rerun(run, "z", torch.zeros(1000, 1, dtype=torch.float64)).signal
    assert len(signal.unique()) == 1000
    assert abs(float(signal.mean()) - 1) < 0.2


def test_running_statistics_move_once() -> None:
    norm, net = nn.BatchNorm1d(2), nn.Linear(2, 2)
    assert norm.num_batches_tracked is not None and norm.running_mean is not None
    logits = nn.Parameter(torch.zeros(4, 2))

    def loss() -> Tensor:
        z = Bernoulli(logits=logits).sample()
        return (norm(net(z)) ** 3).mean()

    compiled = scg.compile(loss, estimator="local_expectation")
    compiled().backward()
    assert int(norm.num_batches_tracked) == 1
    once = norm.running_mean.clone()
    with torch.no_grad():
        mean = 0.1 * net.bias  # momentum times the batch mean; the weights' part is bounded by their size
    assert float((once - mean).abs().max()) <= 0.1 * float(net.weight.detach().abs().sum())

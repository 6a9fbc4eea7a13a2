"""order=2: the expected Hessian of the surrogate is the Hessian of the expectation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Gamma, Normal

import scg
from scg.capture import captured
from scg.estimators.score_function import ScoreFunction
from scg.exact import Walk, exact, kept_buffers, objective_of
from tests.law2 import ForcedDraws
from tests.problems import PROBLEMS, Problem

NAMES = [
    "chain", "diamond", "some_costs", "tied_batch", "mixed_batch", "unrolled_loop", "score_below_enumerated",
    "score_above_enumerated", "learned_coefficient", "sampled_mask", "independent_elbo", "reparam_above_both",
]  # fmt: skip
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {"estimator": ScoreFunction(baseline=None)},
    "moving_average": {"estimator": ScoreFunction(baseline="moving_average")},
    "leave_one_out": {"estimator": ScoreFunction(baseline="leave_one_out"), "samples": 2},
    "enumerate": {"estimator": "enumerate"},
}


def _flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([t.reshape(-1) for t in tensors])


def _expected_hessian(compiled: Any, params: list[Tensor], args: tuple[Any, ...]) -> Tensor:
    walk, total = Walk(), torch.zeros(())
    while walk.more():
        draws = ForcedDraws(walk)
        with kept_buffers([compiled]), draws:
            loss = objective_of(compiled(*args))
        slopes = torch.autograd.grad(loss, params, create_graph=True, allow_unused=True)
        gradient = _flat([torch.zeros_like(p) if g is None else g for p, g in zip(params, slopes, strict=True)])
        rows = []
        for value in gradient:
            if not value.requires_grad:
                rows.append(torch.zeros_like(gradient))
                continue
            found = torch.autograd.grad(value, params, retain_graph=True, allow_unused=True)
            rows.append(_flat([torch.zeros_like(p) if g is None else g for p, g in zip(params, found, strict=True)]))
        total = total + draws.probability * torch.stack(rows).detach()
    return total


def _exact_hessian(problem: Problem, params: dict[str, Tensor], args: tuple[Any, ...], step: float = 1e-5) -> Tensor:
    """Central differences of the exact gradient."""
    rows = []
    for p in params.values():
        for i in range(p.numel()):
            sides = []
            for sign in (1, -1):
                with torch.no_grad():
                    p.view(-1)[i] += sign * step
                sides.append(_flat([exact(problem.model, *args)[1][name] for name in params]))
                with torch.no_grad():
                    p.view(-1)[i] -= sign * step
            rows.append((sides[0] - sides[1]) / (2 * step))
    return torch.stack(rows)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))
@pytest.mark.parametrize("name", NAMES)
def test_hessian(name: str, options: dict[str, Any]) -> None:
    problem = PROBLEMS[name]()
    if options.get("samples", 1) * problem.bits > 6:
        pytest.skip("too many joint draws")
    problem.before(0)
    args = problem.calls[0]
    params = {path: p for path, p in captured(problem.model).tensors.items() if p.requires_grad}
    compiled = scg.compile(problem.model, order=2, estimators=problem.estimators, **options)
    compiled(*args)
    got = _expected_hessian(compiled, list(params.values()), args)
    torch.testing.assert_close(got, _exact_hessian(problem, params, args), rtol=1e-5, atol=1e-7)


def test_first_order_surrogates_are_wrong_at_second_order() -> None:
    """What order=2 is for: without it the Hessian misses the squared score."""
    problem = PROBLEMS["chain"]()
    params = {path: p for path, p in captured(problem.model).tensors.items() if p.requires_grad}
    compiled = scg.compile(problem.model, estimator=ScoreFunction(baseline=None))
    compiled()
    got = _expected_hessian(compiled, list(params.values()), ())
    assert not torch.allclose(got, _exact_hessian(problem, params, ()), atol=1e-3)


def test_pathwise_second_derivatives() -> None:
    mu = nn.Parameter(torch.tensor(0.3, dtype=torch.float64))

    def loss() -> Tensor:
        return Normal(mu, torch.ones_like(mu)).rsample() ** 2

    compiled = scg.compile(loss, order=2)
    (first,) = torch.autograd.grad(compiled(), mu, create_graph=True)
    assert float(torch.autograd.grad(first, mu)[0]) == 2.0


def test_what_has_no_second_derivative_is_refused() -> None:
    a = nn.Parameter(torch.tensor(1.3))

    def loss() -> Tensor:
        return Gamma(a, torch.ones(())).rsample()

    with pytest.raises(scg.EstimatorError, match="no second derivative"):
        scg.compile(loss, estimator="reparam", order=2)()
    assert scg.compile(loss, order=2, example_inputs=()).graph.sites["site_0"].estimator == "score_function"
    with pytest.raises(scg.LoweringError, match="differentiate twice"):
        scg.compile(loss, order=2, backend="inductor")

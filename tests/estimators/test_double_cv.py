"""Double control variates: exact over all draws of two copies; a linear cost leaves nothing to chance."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli

import scg
from scg.estimators.double_cv import DoubleCV
from scg.exact import Walk
from tests.estimators.mixes import tied_rows
from tests.law2 import ForcedDraws, assert_unbiased, expected_estimate
from tests.problems import PROBLEMS

SMALL = ("some_costs", "upstream_costs", "shared_logits", "closed_form_kl", "learned_coefficient", "annealed_beta",
         "tied_batch", "mixed_batch", "closure", pytest.param("diamond", marks=pytest.mark.slow))  # fmt: skip


@pytest.mark.parametrize("name", SMALL)
def test_unbiased(name: str) -> None:
    problem = PROBLEMS[name]()
    assert_unbiased(problem, estimator="double_cv", estimators=problem.estimators, samples=2)


@pytest.mark.parametrize("place", [{"top": "double_cv", "*": "enumerate"}, {"bottom": "double_cv", "*": "enumerate"},
                                   {"top": "double_cv", "*": "score_function"}])  # fmt: skip
def test_unbiased_beside_others(place: dict[str, str]) -> None:
    assert_unbiased(PROBLEMS["score_below_enumerated"](), estimators=place, samples=2)


@pytest.mark.slow
def test_tied_rows() -> None:
    assert_unbiased(tied_rows(), estimator="double_cv", samples=2)


def test_a_linear_cost_leaves_no_variance() -> None:
    logits = nn.Parameter(torch.tensor([0.3, -0.7, 1.2], dtype=torch.float64))
    weights = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    compiled = scg.compile(
        lambda: Bernoulli(logits=logits).sample() @ weights + 100.0, estimator="double_cv", samples=2,
        example_inputs=(),
    ).double()  # fmt: skip
    samples = scg.gradient_samples(compiled, n=20, seed=0)["logits"]
    p = torch.sigmoid(logits.detach())
    torch.testing.assert_close(samples, (weights * p * (1 - p)).expand_as(samples))


def test_the_factor_learns_the_gradient_of_the_variance() -> None:
    logits = nn.Parameter(torch.tensor([0.3, -0.7], dtype=torch.float64))

    def loss() -> Tensor:
        return (Bernoulli(logits=logits).sample().sum() - 0.7) ** 3

    compiled = scg.compile(loss, estimator=DoubleCV(), samples=2, example_inputs=()).double()
    (factor,) = compiled.estimator_parameters()

    def second_moment(value: float) -> float:
        with torch.no_grad():
            factor.fill_(value)
        total = 0.0
        walk = Walk()
        with compiled.frozen():
            compiled()
            while walk.more():
                with ForcedDraws(walk) as draws:
                    estimate = compiled()
                (g,) = torch.autograd.grad(estimate, logits)
                total += draws.probability * float((g**2).sum())
        return total

    slope = (second_moment(0.8 + 1e-5) - second_moment(0.8 - 1e-5)) / 2e-5
    with torch.no_grad():
        factor.fill_(0.8)
    compiled()
    _, gradient = expected_estimate(compiled, {"factor": factor})
    assert float(gradient["factor"]) == pytest.approx(slope, rel=1e-6)


def test_one_draw_is_refused() -> None:
    logits = nn.Parameter(torch.zeros(2))
    with pytest.raises(scg.EstimatorError, match="samples=2"):
        scg.compile(lambda: Bernoulli(logits=logits).sample().sum(), estimator="double_cv", example_inputs=())

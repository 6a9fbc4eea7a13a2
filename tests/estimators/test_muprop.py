"""MuProp and stochastic derivatives: exact over all draws; where the expansion is exact, nothing is left to chance."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli, Binomial, Categorical, Geometric, Poisson

import scg
from tests.estimators.mixes import CHAIN, assert_unbiased_in_chain, problems, tied_rows
from tests.law2 import assert_unbiased
from tests.problems import PROBLEMS


@pytest.mark.parametrize("name", list(problems("one_hot", "binomial", "not_differentiable", "opaque_cost")))
def test_muprop_is_unbiased(name: str) -> None:
    problem = PROBLEMS[name]()
    assert_unbiased(problem, estimator="muprop", estimators=problem.estimators)


@pytest.mark.parametrize("name", list(problems("binomial", "not_differentiable", "opaque_cost")))
def test_stochastic_ad_is_unbiased(name: str) -> None:
    problem = PROBLEMS[name]()
    assert_unbiased(problem, estimator="stochastic_ad", estimators=problem.estimators)


@pytest.mark.parametrize("mix", CHAIN)
@pytest.mark.parametrize("estimator", ["muprop", "stochastic_ad"])
def test_unbiased_beside_others(estimator: str, mix: str) -> None:
    assert_unbiased_in_chain(estimator, mix)


@pytest.mark.parametrize("estimator", ["muprop", "stochastic_ad"])
def test_tied_rows(estimator: str) -> None:
    assert_unbiased(tied_rows(), estimator=estimator)


def test_two_draws() -> None:
    assert_unbiased(PROBLEMS["some_costs"](), estimator="muprop", samples=2)


def test_no_variance_below_a_linear_cost() -> None:
    logits = nn.Parameter(torch.tensor([0.3, -0.7, 1.2], dtype=torch.float64))
    weights = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)

    def loss() -> Tensor:
        return Bernoulli(logits=logits).sample() @ weights + 100.0

    samples = scg.gradient_samples(scg.compile(loss, estimator="muprop"), n=20, seed=0)["logits"]
    p = torch.sigmoid(logits.detach())
    torch.testing.assert_close(samples, (weights * p * (1 - p)).expand_as(samples))


@pytest.mark.parametrize(
    ("make", "value", "exact"),
    [(Poisson, 2.0, 5.0), (Geometric, 0.4, (3 * 0.4 - 4) / 0.4**3), (lambda p: Binomial(5, probs=p), 0.3, 17.0)],
)
def test_stochastic_ad_of_counts(make: type, value: float, exact: float) -> None:
    """``d E[z^2] / d theta`` from many elements that share no cost."""
    count = 100_000
    theta = nn.Parameter(torch.full((count,), value, dtype=torch.float64))
    compiled = scg.compile(lambda: (make(theta).sample() ** 2).sum(), estimator="stochastic_ad")
    torch.manual_seed(0)
    (g,) = torch.autograd.grad(compiled(), theta)
    assert abs(float(g.mean()) - exact) < 5 * float(g.std()) / count**0.5


def test_an_index_is_refused() -> None:
    logits = nn.Parameter(torch.zeros(3))
    with pytest.raises(scg.EstimatorError, match="index"):
        scg.compile(lambda: Categorical(logits=logits).sample().float(), estimator="muprop", example_inputs=())


@pytest.mark.parametrize("estimator", ["muprop", "bitflip", "stochastic_ad"])
def test_finite_at_the_edges(estimator: str) -> None:
    logits = nn.Parameter(torch.tensor([-30.0, 30.0, 0.0]))
    probs = nn.Parameter(torch.tensor([0.0, 1.0, 0.5]))

    def loss() -> Tensor:
        z, y = Bernoulli(logits=logits).sample(), Bernoulli(probs=probs).sample()
        return ((z.sum() - 0.3) * (y.sum() - 2.2)) ** 2

    compiled = scg.compile(loss, estimator=estimator)
    for _ in range(10):
        compiled().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in (logits, probs))

"""GO gradients: exact over all draws, in closed form for counts, stable at extremes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli, Binomial, Categorical, Geometric, Normal, OneHotCategorical, Poisson

import scg
from scg.errors import EstimatorError
from tests.estimators.mixes import CHAIN, assert_unbiased_in_chain, problems, tied_rows
from tests.law2 import assert_unbiased
from tests.problems import PROBLEMS


@pytest.mark.parametrize(
    "name", list(problems("one_hot", "integer_index", "binomial", "not_differentiable", "opaque_cost"))
)
def test_unbiased(name: str) -> None:
    problem = PROBLEMS[name]()
    assert_unbiased(problem, estimator="go_gradient", estimators=problem.estimators)


@pytest.mark.parametrize("mix", CHAIN)
def test_unbiased_beside_others(mix: str) -> None:
    assert_unbiased_in_chain("go_gradient", mix)


def test_tied_rows_and_two_draws() -> None:
    assert_unbiased(tied_rows(), estimator="go_gradient")
    assert_unbiased(PROBLEMS["some_costs"](), estimator="go_gradient", samples=2)


class _Count(nn.Module):
    def __init__(self, family: type, value: float) -> None:
        super().__init__()
        self.theta, self.family = nn.Parameter(torch.tensor([value], dtype=torch.float64)), family

    def forward(self) -> Tensor:
        return (self.family(self.theta).sample() ** 2).sum()


@pytest.mark.parametrize(
    ("family", "value", "mean"),
    [(Poisson, 2.0, 2 * 2.0 + 1), (Geometric, 0.4, (3 * 0.4 - 4) / 0.4**3)],  # E z^2 = l + l^2; (1 - p)(2 - p) / p^2
)
def test_mean_of_counts(family: type, value: float, mean: float) -> None:
    samples = scg.gradient_samples(scg.compile(_Count(family, value), estimator="go_gradient", samples=2000), n=100)
    got = samples["theta"].flatten()
    assert abs(float(got.mean()) - mean) < 5 * float(got.std()) / 10


def test_variance_of_a_poisson() -> None:
    """The estimate is 2 z + 1, of variance 4 rate."""
    got = scg.gradient_samples(scg.compile(_Count(Poisson, 2.0), estimator="go_gradient"), n=2000)["theta"].flatten()
    assert bool(((got - 1) / 2 == ((got - 1) / 2).round()).all())
    assert float(got.var()) == pytest.approx(8.0, rel=0.15)


def test_a_constant_added_to_the_cost_changes_nothing() -> None:
    class Shifted(nn.Module):
        def __init__(self, shift: float) -> None:
            super().__init__()
            self.theta, self.shift = nn.Parameter(torch.tensor([0.2, -0.4, 0.7], dtype=torch.float64)), shift

        def forward(self) -> Tensor:
            z = Categorical(logits=self.theta).sample()
            return torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)[z] + self.shift

    plain, shifted = (
        scg.gradient_samples(scg.compile(Shifted(shift), estimator="go_gradient"), n=50)["theta"]
        for shift in (0.0, 1e2)
    )
    torch.testing.assert_close(plain, shifted)


@pytest.mark.parametrize(
    "family", [Bernoulli, Categorical, OneHotCategorical, lambda logits: Binomial(3, logits=logits)]
)
def test_finite_at_extremes(family: type) -> None:
    logits = nn.Parameter(torch.tensor([[0.0, 30.0, -30.0], [1e4, -1e4, 0.0]]))

    def loss() -> Tensor:
        z = family(logits=logits).sample() if isinstance(family, type) else family(logits).sample()
        return ((z - 0.3) ** 2).sum()

    compiled = scg.compile(loss, estimator="go_gradient", samples=100)
    for _ in range(3):
        compiled().backward()
    assert logits.grad is not None and bool(logits.grad.isfinite().all())


def test_refused_for_others() -> None:
    loc = nn.Parameter(torch.zeros(()))
    with pytest.raises(EstimatorError, match="Normal has no next outcome"):
        scg.compile(lambda: Normal(loc, 1.0).sample() ** 2, estimator="go_gradient", example_inputs=())

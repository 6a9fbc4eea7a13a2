"""Weak derivatives: exact on finite programs, moments and closed-form variances on continuous ones."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import (
    Binomial,
    Exponential,
    Gamma,
    Geometric,
    Laplace,
    MultivariateNormal,
    Normal,
    Poisson,
    Uniform,
    Weibull,
)

import scg
from scg.estimators.measure_valued import MeasureValued
from tests.estimators.mixes import CHAIN, assert_unbiased_in_chain, problems, tied_rows
from tests.law2 import assert_unbiased
from tests.problems import PROBLEMS, Problem

N = 100_000
"""Independent estimates of each gradient: elements of one site that share no cost."""


@pytest.mark.parametrize("name", list(problems("one_hot", "integer_index", "binomial", "not_differentiable")))
def test_unbiased(name: str) -> None:
    problem = PROBLEMS[name]()
    assert_unbiased(problem, estimator="measure_valued", estimators=problem.estimators)


@pytest.mark.parametrize("mix", CHAIN)
def test_unbiased_beside_others(mix: str) -> None:
    assert_unbiased_in_chain("measure_valued", mix)


def test_tied_rows() -> None:
    assert_unbiased(tied_rows(), estimator="measure_valued")


@pytest.mark.parametrize("coupled", [True, False])
def test_unbiased_on_joined_counts(coupled: bool) -> None:
    logits = nn.Parameter(torch.tensor([0.3, -0.8], dtype=torch.float64))

    def loss() -> Tensor:
        z = Binomial(2, logits=logits).sample()
        return (z.sum() - 1.3) ** 3 + torch.exp(z[0])

    assert_unbiased(Problem(loss), estimator=MeasureValued(coupled=coupled))


def gradients(
    make: Callable[..., Any], values: dict[str, float], cost: Callable[[Tensor], Tensor], **options: Any
) -> Any:
    """``N`` estimates of the gradient of ``E cost(z)`` in each parameter, and its exact value for ``cost = z^2``."""
    params = {key: nn.Parameter(torch.full((N,), value, dtype=torch.float64)) for key, value in values.items()}

    def loss() -> Tensor:
        return cost(make(**params).sample()).sum()

    torch.manual_seed(0)
    found = torch.autograd.grad(scg.compile(loss, estimator=MeasureValued(**options))(), list(params.values()))
    dist = make(**{key: param[0] for key, param in params.items()})
    whole = torch.autograd.grad(dist.variance + dist.mean**2, list(params.values()))
    return dict(zip(params, found, strict=True)), {k: w.sum() for k, w in zip(params, whole, strict=True)}


CONTINUOUS: dict[str, tuple[Callable[..., Any], dict[str, float]]] = {
    "normal": (Normal, {"loc": 0.7, "scale": 1.3}),
    "laplace": (Laplace, {"loc": -0.4, "scale": 0.8}),
    "uniform": (Uniform, {"low": -0.5, "high": 1.7}),
    "exponential": (Exponential, {"rate": 1.4}),
    "gamma": (lambda rate: Gamma(torch.full_like(rate, 2.5), rate), {"rate": 1.4}),
    "weibull": (lambda scale: Weibull(scale, torch.full_like(scale, 1.7)), {"scale": 0.9}),
    "poisson": (Poisson, {"rate": 2.0}),
    "binomial": (lambda probs: Binomial(5, probs=probs), {"probs": 0.3}),
    "geometric": (Geometric, {"probs": 0.4}),
}


@pytest.mark.parametrize("coupled", [True, False])
@pytest.mark.parametrize("family", CONTINUOUS)
def test_mean_is_the_derivative_of_the_second_moment(family: str, coupled: bool) -> None:
    make, values = CONTINUOUS[family]
    found, exact = gradients(make, values, torch.square, coupled=coupled)
    for name, estimates in found.items():
        error = estimates.std() / math.sqrt(N)
        assert abs(float(estimates.mean() - exact[name])) < 5 * float(error), name


@pytest.mark.parametrize(
    ("k", "loc_variance", "scale_variance"), [(-3.0, 64 * (4 / math.pi - 1), 68.0), (0.0, 1.093, 8.0)]
)
def test_variances_of_a_normal(k: float, loc_variance: float, scale_variance: float) -> None:
    found, _ = gradients(Normal, {"loc": 1.0, "scale": 1.0}, lambda z: (z - k) ** 2)
    assert float(found["loc"].var()) == pytest.approx(loc_variance, rel=0.03)
    assert float(found["scale"].var()) == pytest.approx(scale_variance, rel=0.03)


def test_variance_of_a_poisson() -> None:
    found, _ = gradients(Poisson, {"rate": 2.0}, torch.square)
    assert float(found["rate"].mean()) == pytest.approx(5.0, rel=0.01)
    assert float(found["rate"].var()) == pytest.approx(8.0, rel=0.03)


def test_multivariate_normal() -> None:
    loc = nn.Parameter(torch.tensor([0.4, -0.9, 0.2], dtype=torch.float64))
    raw = nn.Parameter(torch.tensor([[1.1, 0.0, 0.0], [0.6, 0.7, 0.0], [-0.5, 0.3, 1.4]], dtype=torch.float64))
    weights = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)

    def loss() -> Tensor:
        z = MultivariateNormal(loc, scale_tril=raw.tril()).sample((4000,))
        return ((z @ weights) ** 2 + torch.sin(z[:, 0] * z[:, 1])).mean()

    def reference() -> Tensor:
        z = MultivariateNormal(loc, scale_tril=raw.tril()).rsample((400_000,))
        return ((z @ weights) ** 2 + torch.sin(z[:, 0] * z[:, 1])).mean()

    compiled = scg.compile(loss, estimator="measure_valued")
    torch.manual_seed(0)
    runs = [torch.autograd.grad(compiled(), [loc, raw]) for _ in range(40)]
    expected = torch.autograd.grad(reference(), [loc, raw])
    for i, exact in enumerate(expected):
        estimates = torch.stack([run[i] for run in runs])
        error = estimates.std(0) / math.sqrt(len(runs))
        assert bool(((estimates.mean(0) - exact).abs() <= 5 * error + 0.02).all())


def test_a_parameter_without_a_weak_derivative_is_named() -> None:
    shape = nn.Parameter(torch.ones(()))

    def loss() -> Tensor:
        return Gamma(shape, 1.0).sample() ** 2

    with pytest.raises(scg.EstimatorError, match="concentration"):
        scg.compile(loss, estimator="measure_valued", example_inputs=())

"""SPSA: its mean is the central difference of the expected loss, under common random numbers."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import (
    Bernoulli,
    Categorical,
    Exponential,
    Gamma,
    Geometric,
    Normal,
    OneHotCategorical,
    Uniform,
)

import scg
from scg.errors import EstimatorError
from scg.estimators.base import SiteContext
from scg.estimators.spsa import SPSA, quantile
from tests.law2 import expected_estimate

STEP = math.log(5 / 3)
"""Takes a logit of zero to the probabilities 5/8 and 3/8."""


@dataclass(frozen=True)
class FiniteSPSA(SPSA):
    """The uniform is one of eight midpoints: exact where the thresholds are eighths."""

    c: float = STEP

    def uniform(self, context: SiteContext) -> Tensor:
        shape = context.value.shape[: context.value.dim() - context.site.event_ndim]
        bits = torch.bernoulli(torch.full((3, *shape), 0.5, dtype=torch.float64))
        return (bits * torch.tensor([4.0, 2.0, 1.0], dtype=torch.float64).reshape(3, *[1] * len(shape))).sum(
            0
        ) / 8 + 1 / 16


def _expected(model: nn.Module, **options: Any) -> dict[str, Tensor]:
    compiled = scg.compile(model, **options)
    compiled()
    return expected_estimate(compiled, dict(model.named_parameters()))[1]


def _loss_at(model: nn.Module, param: nn.Parameter, step: Tensor) -> Tensor:
    """The exact expected loss with ``param`` moved by ``step``."""
    with torch.no_grad():
        param.add_(step)
        value = scg.exact(model)[0]
        param.sub_(step)
    return value


class _Joined(nn.Module):
    """Two Bernoulli elements, and one cost that sees both."""

    def __init__(self) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.zeros(2, dtype=torch.float64))

    def forward(self) -> Tensor:
        z = Bernoulli(logits=self.theta).sample()
        return torch.exp(z[0] - 1.5 * z[1]) + z[0]


def test_two_elements_are_shifted_at_once() -> None:
    model = _Joined()
    want = torch.zeros(2, dtype=torch.float64)
    for signs in itertools.product([-1.0, 1.0], repeat=2):
        sign = torch.tensor(signs, dtype=torch.float64)
        rise = _loss_at(model, model.theta, STEP * sign) - _loss_at(model, model.theta, -STEP * sign)
        want += rise / (2 * STEP) * sign / 4
    torch.testing.assert_close(_expected(model, estimator=FiniteSPSA())["theta"], want)


class _Chain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.zeros((), dtype=torch.float64))
        self.w = nn.Parameter(torch.tensor([0.7, -1.1], dtype=torch.float64))

    def forward(self) -> Tensor:
        a = Bernoulli(logits=self.theta).sample()
        b = Bernoulli(logits=self.w[0] * a + self.w[1]).sample()
        return torch.round(1.4 * a + b) + (a - 0.3) ** 2 * b


@pytest.mark.parametrize("below", ["enumerate", "score_function"])
def test_central_difference_above_another_site(below: str) -> None:
    model = _Chain()
    got = _expected(model, estimators={"a": FiniteSPSA(), "b": below})
    step = torch.tensor(STEP, dtype=torch.float64)
    rise = _loss_at(model, model.theta, step) - _loss_at(model, model.theta, -step)
    torch.testing.assert_close(got["theta"], rise / (2 * STEP))
    torch.testing.assert_close(got["w"], scg.exact(model)[1]["w"])


def test_several_directions_have_the_same_mean() -> None:
    model = _Chain()
    one = _expected(model, estimators={"a": FiniteSPSA(), "b": "enumerate"})
    two = _expected(model, estimators={"a": FiniteSPSA(directions=2), "b": "enumerate"})
    torch.testing.assert_close(one, two)


class _Square(nn.Module):
    """E of the square of a draw, of a parameter."""

    def __init__(self, family: Callable[[Tensor], Any], value: float, square: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.theta, self.family = nn.Parameter(torch.tensor(value, dtype=torch.float64)), family
        self.square = square

    def forward(self) -> Tensor:
        return self.square(self.family(self.theta).sample())


@scg.opaque()
def _opaque_square(z: Tensor) -> Tensor:
    return z * z


def test_a_mean_of_a_normal_under_an_opaque_square() -> None:
    """Under common random numbers the difference is the pathwise derivative itself, of variance 4."""
    model = _Square(lambda loc: Normal(loc, torch.ones_like(loc)), 0.7, _opaque_square)
    got = scg.gradient_samples(scg.compile(model, estimator=SPSA(c=1e-3)), n=3000)["theta"]
    assert abs(float(got.mean()) - 1.4) < 5 * 2 / math.sqrt(3000)
    assert float(got.var()) == pytest.approx(4.0, rel=0.15)


@pytest.mark.parametrize(
    ("family", "value", "mean"),
    [
        (lambda high: Uniform(torch.zeros_like(high), high), 2.0, 4 / 3),  # E z^2 = high^2 / 3: the bound moves
        (lambda rate: Exponential(rate), 1.5, -4 / 1.5**3),
        (lambda scale: Normal(torch.zeros_like(scale), scale), 0.8, 1.6),
        (lambda p: Geometric(p), 0.4, (3 * 0.4 - 4) / 0.4**3),
    ],
)
def test_means(family: Callable[[Tensor], Any], value: float, mean: float) -> None:
    c = 0.05
    model = _Square(family, value, torch.square)
    got = scg.gradient_samples(scg.compile(model, estimator=SPSA(c=c), samples=3000), n=50)["theta"]
    assert abs(float(got.mean()) - mean) < 5 * float(got.std()) / math.sqrt(50) + 4 * c**2 * abs(mean)


@pytest.mark.parametrize("probs", [[0.2, 0.5, 0.3], [0.0, 1.0, 0.0]])
def test_quantiles_have_the_distribution(probs: list[float]) -> None:
    p = torch.tensor(probs, dtype=torch.float64)
    u = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    assert torch.equal(quantile(OneHotCategorical(p), u).double().mean(0), p)
    assert torch.equal(torch.bincount(quantile(Categorical(p), u), minlength=3).double() / 1000, p)
    assert float(quantile(Bernoulli(p[0]), u).mean()) == pytest.approx(probs[0])


@pytest.mark.parametrize(
    "make",
    [
        lambda x: Bernoulli(logits=x),
        lambda x: Bernoulli(probs=torch.sigmoid(x)),
        lambda x: OneHotCategorical(logits=x),
        lambda x: OneHotCategorical(probs=torch.softmax(x, -1)),
        lambda x: Categorical(logits=x),
        lambda x: Normal(x, torch.sigmoid(x) + 1e-3),
    ],
)
def test_finite_at_extremes(make: Callable[[Tensor], Any]) -> None:
    x = nn.Parameter(torch.tensor([[0.0, 30.0, -30.0], [1.0, 1.0, 1.0]]))

    def model() -> Tensor:
        return ((make(x).sample() - 0.3) ** 2).sum()

    compiled = scg.compile(model, estimator=SPSA(directions=2), samples=10)
    for _ in range(3):
        compiled().backward()
    assert x.grad is not None and bool(x.grad.isfinite().all())


def test_refusals() -> None:
    rate = nn.Parameter(torch.ones(()))
    with pytest.raises(EstimatorError, match="inverse distribution function of Gamma"):
        scg.compile(lambda: Gamma(rate, 1.0).sample(), estimator="spsa", example_inputs=())
    with pytest.raises(EstimatorError, match="biased"):
        scg.compile(lambda: Normal(rate, 1.0).sample(), estimator="spsa", allow_biased=False, example_inputs=())
    with pytest.raises(ValueError, match="must be positive"):
        SPSA(c=0.0)

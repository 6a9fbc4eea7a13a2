"""Pathwise gradients: the path derivative, implicit reparameterization of mixtures, what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import (
    Categorical,
    Cauchy,
    Distribution,
    Laplace,
    MixtureSameFamily,
    Normal,
    OneHotCategoricalStraightThrough,
    Uniform,
)

import scg
from scg.errors import EstimatorError
from scg.estimators.reparam import Reparam
from tests.law2 import assert_unbiased
from tests.problems import Problem

STICKING = Reparam(path_derivative=True)


def _double(*values: float) -> nn.Parameter:
    return nn.Parameter(torch.tensor(values, dtype=torch.float64))


# -- sticking the landing ------------------------------------------------------------------------------------------
class _Bound(nn.Module):
    """A variational bound whose posterior is Normal(0.3, 0.7) in every dim; ``form`` combines log q and log p."""

    def __init__(self, form: Callable[[Tensor, Tensor], Tensor], loc: float = 0.3, scale: float = 0.7) -> None:
        super().__init__()
        self.form, self.loc, self.log_scale = form, _double(loc, loc), _double(math.log(scale), math.log(scale))

    def forward(self) -> Tensor:
        q = Normal(self.loc, self.log_scale.exp())
        z = q.rsample()
        prior = Normal(torch.full_like(z, 0.3), torch.full_like(z, 0.7))
        return self.form(q.log_prob(z), prior.log_prob(z))


def _mean(log_q: Tensor, log_p: Tensor) -> Tensor:
    return (log_q - log_p).mean()


FORMS = (
    _mean,
    lambda log_q, log_p: 0.5 * (log_q - log_p).sum(-1),
    lambda log_q, log_p: torch.stack([log_q, -log_p]).sum(),
)


@pytest.mark.parametrize("credit", ["element", "node", "none"])
@pytest.mark.parametrize("form", FORMS)
def test_no_variance_at_the_optimum(form: Any, credit: str) -> None:
    model = _Bound(form)
    got = scg.gradient_samples(scg.compile(model, estimator=STICKING, credit=credit), n=20)
    assert all(float(g.abs().max()) < 1e-12 for g in got.values())
    plain = scg.gradient_samples(scg.compile(model, estimator="reparam"), n=20)
    assert float(plain["loc"].var(0).min()) > 1e-2


def test_it_drops_the_score_and_nothing_else() -> None:
    model = _Bound(_mean, loc=1.0, scale=0.5)
    sticking, plain = (
        scg.gradient_samples(scg.compile(model, estimator=e, samples=3), n=50, seed=1) for e in (STICKING, "reparam")
    )
    # same draws: d/d loc of log q by its parameters is (z - loc) / scale^2; the pathwise part of log q is its negative
    # d/d loc (log q - log p) = 0 plain minus the pathwise part of log p; sticking keeps -(z - loc) / scale^2 on top
    z = (
        0.3 + 2 * 0.49 * plain["loc"]
    )  # plain gradient (mean over 3 draws, half by the mean over dims): (z - 0.3) / 0.49
    torch.testing.assert_close(sticking["loc"], (z - 0.3) / 0.98 - (z - 1.0) / 0.25 / 2)


class _TwoPoints(nn.Module):
    """Finite noise: a chain with path derivatives at both sites, and a score below a stop of the user's."""

    def __init__(self) -> None:
        super().__init__()
        self.w = _double(0.4, -0.3, 0.8)

    def forward(self) -> Tensor:
        q = Normal(self.w[0], self.w[2].exp())
        z = q.rsample()
        r = Normal(self.w[1] * z, 1.0)
        y = r.rsample()
        return q.log_prob(z) + 2 * r.log_prob(y) + (y - 0.5) ** 2 + (z * q.log_prob(z.detach()))


def test_mean_of_a_chain() -> None:
    model = _TwoPoints()
    options: dict[str, Any] = {"samples": 20_000}
    sticking = scg.gradient_samples(scg.compile(model, estimator=STICKING, **options), n=20)["w"]
    plain = scg.gradient_samples(scg.compile(model, estimator="reparam", **options), n=20, seed=1)["w"]
    error = ((sticking.var(0) + plain.var(0)) / 20).sqrt()
    assert bool(((sticking.mean(0) - plain.mean(0)).abs() < 5 * error).all())


@pytest.mark.parametrize(
    "form",
    [
        lambda log_q, log_p: ((log_q - log_p) ** 2).sum(),
        lambda log_q, log_p: (log_q * log_p).sum(),
        lambda log_q, log_p: -torch.logsumexp(log_p - log_q, 0),
        lambda log_q, log_p: Normal(log_q, 1.0).log_prob(log_p).sum(),
    ],
)
def test_refused_where_the_score_has_a_mean(form: Any) -> None:
    with pytest.raises(EstimatorError, match=r"linear in the site's own log density.*test_reparam.py"):
        scg.compile(_Bound(form), estimator=STICKING, example_inputs=())
    scg.compile(_Bound(form), estimator="reparam", example_inputs=())


def test_refused_at_second_order() -> None:
    with pytest.raises(EstimatorError, match="whose own derivative has a mean"):
        scg.compile(_Bound(_mean), estimator=STICKING, order=2, example_inputs=())
    with pytest.raises(EstimatorError, match="MixtureSameFamily has no second derivative"):
        scg.compile(_Mixture(Normal, torch.square), estimator="reparam", order=2, example_inputs=())


# -- mixtures ------------------------------------------------------------------------------------------------------
class _Mixture(nn.Module):
    def __init__(self, component: Callable[[Tensor, Tensor], Distribution], cost: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.logits, self.loc, self.log_scale = (
            _double(0.3, -0.5, 0.1),
            _double(-1.0, 0.4, 1.5),
            _double(-0.5, -0.2, 0.1),
        )
        self.component, self.cost = component, cost

    def forward(self) -> Tensor:
        parts = self.component(self.loc.expand(2, 3), self.log_scale.exp())
        z = MixtureSameFamily(Categorical(logits=self.logits.expand(2, 3)), parts).sample()  # [2]
        return self.cost(z).sum()

    def moments(self) -> Tensor:
        """E[z^2 + z] of Normal components, twice."""
        second = self.log_scale.exp() ** 2 + self.loc**2
        return 2 * (torch.softmax(self.logits, 0) * (second + self.loc)).sum()


def test_mixture_of_normals_in_closed_form() -> None:
    model = _Mixture(Normal, lambda z: z**2 + z)
    compiled = scg.compile(model, samples=50_000, example_inputs=())
    assert compiled.graph.sites["z"].estimator == "reparam"
    got = scg.gradient_samples(compiled, n=20)
    want = torch.autograd.grad(model.moments(), list(model.parameters()))
    for (name, samples), exact in zip(got.items(), want, strict=True):
        error = samples.std(0) / math.sqrt(20)
        assert bool(((samples.mean(0) - exact).abs() < 5 * error).all()), name


@pytest.mark.parametrize("component", [Normal, Laplace, Cauchy])
def test_mixture_moves_its_distribution_function_along(component: Any) -> None:
    """``d F(z) = 0`` along the draw's derivative: what implicit reparameterization says, of each draw."""
    torch.manual_seed(0)
    model = _Mixture(component, torch.sigmoid)
    parts = component(model.loc.expand(2, 3), model.log_scale.exp())
    dist = MixtureSameFamily(Categorical(logits=model.logits.expand(2, 3)), parts)
    z = Reparam().draw(dist, torch.Size((40,)))  # [40, 2]
    for draw in z.flatten()[::7]:
        for total in torch.autograd.grad(dist.cdf(draw)[0], list(model.parameters()), retain_graph=True):
            assert float(total.abs().max()) < 1e-12
    compiled = scg.compile(model, samples=10)
    compiled().backward()
    assert model.loc.grad is not None and bool(model.loc.grad.isfinite().all())


def test_a_single_component_is_the_component() -> None:
    torch.manual_seed(0)
    loc, scale = _double(0.3), _double(1.7)
    dist = MixtureSameFamily(Categorical(logits=torch.zeros(1)), Normal(loc, scale))
    z = Reparam().draw(dist, torch.Size((5,)))
    for draw in z:
        by_loc, by_scale = torch.autograd.grad(draw, [loc, scale], retain_graph=True)
        torch.testing.assert_close(by_loc, torch.ones_like(by_loc))
        torch.testing.assert_close(by_scale, ((draw - loc) / scale).detach())


def test_other_mixtures_are_refused() -> None:
    rate = nn.Parameter(torch.ones(3))

    def model() -> Tensor:
        return MixtureSameFamily(Categorical(logits=rate), torch.distributions.Gamma(rate.exp(), 1.0)).sample() ** 2

    with pytest.raises(EstimatorError, match="MixtureSameFamily has no rsample"):
        scg.compile(model, estimator="reparam", example_inputs=())


def test_a_score_with_a_mean_is_not_dropped() -> None:
    """That of Uniform(0, theta) is -1 / theta wherever the draw lies."""
    theta = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))

    def model() -> Tensor:
        q = Uniform(torch.zeros((), dtype=torch.float64), theta)
        return q.log_prob(q.rsample())

    compiled = scg.compile(model, estimator="reparam", example_inputs=())
    assert float(torch.autograd.grad(compiled(), theta)[0]) == -0.5
    with pytest.raises(EstimatorError, match="moves with its parameter high, so its score has a mean"):
        scg.compile(model, estimator=STICKING, example_inputs=())


# -- a biased rsample ------------------------------------------------------------------------------------------------
def test_the_one_hot_that_is_straight_through_by_itself_is_not_taken_for_unbiased() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.theta = _double(0.2, -0.4, 0.1)

        def forward(self) -> Tensor:
            z = OneHotCategoricalStraightThrough(logits=self.theta).sample()
            return (z @ torch.arange(3.0, dtype=torch.float64)) ** 3

    assert_unbiased(Problem(Model()))
    with pytest.raises(EstimatorError, match="straight-through estimator, which is biased"):
        scg.compile(Model(), estimator="reparam", example_inputs=())
    scg.compile(Model(), estimator="straight_through", example_inputs=())

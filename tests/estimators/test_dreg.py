"""DReG by Gauss-Hermite quadrature over the noise of two draws: the gradient of the bound, with less variance."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli, Independent, LogNormal, Normal, Uniform
from torch.utils._python_dispatch import TorchDispatchMode

import scg
from tests.law2 import expected_estimate

aten = torch.ops.aten
DTYPE = torch.float64


class GivenNormals(TorchDispatchMode):
    """Hands out standard normal draws from a list."""

    def __init__(self, noise: Sequence[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._noise = list(noise)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is aten.normal_.default:
            return args[0].copy_(self._noise.pop(0).reshape(args[0].shape))
        return func(*args, **(kwargs or {}))


def grid(nodes: int, dims: int) -> tuple[Tensor, Tensor]:
    """Points of standard normal noise ``[dims, N]`` and their weights ``[N]``."""
    x, w = np.polynomial.hermite_e.hermegauss(nodes)
    points = torch.tensor(list(itertools.product(x, repeat=dims)), dtype=DTYPE).T
    weights = torch.tensor(list(itertools.product(w / w.sum(), repeat=dims)), dtype=DTYPE).prod(-1)
    return points, weights


class Setting:
    """A one-dimensional latent variable model on every node of a grid, with parameters of its own for each."""

    def __init__(self, nodes: int = 40, draws: int = 2) -> None:
        self.noise, self.weight = grid(nodes, draws)
        count = len(self.weight)
        self.draws = draws
        self.mu = nn.Parameter(torch.full((count,), 0.7, dtype=DTYPE))
        self.log_sigma = nn.Parameter(torch.full((count,), -0.4, dtype=DTYPE))
        self.theta = nn.Parameter(torch.full((count,), 0.3, dtype=DTYPE))

    def log_weight(self, q: Any, z: Tensor) -> Tensor:
        prior = Normal(torch.zeros_like(z), torch.ones_like(z)).log_prob(z)
        fit = Normal(z, torch.exp(self.theta)).log_prob(torch.full_like(z, 1.2))
        return prior + fit - q.log_prob(z)

    def loss(self, alpha: float = 0.0) -> Callable[[], Tensor]:
        def model() -> Tensor:
            q = Normal(self.mu, torch.exp(self.log_sigma))
            z = q.sample()
            return scg.multisample(-self.log_weight(q, z), "renyi", alpha=alpha).sum()

        return model

    def moments(self, estimator: Any, model: Callable[[], Tensor], **options: Any) -> Any:
        """Mean and variance of the gradient in each parameter."""
        compiled = scg.compile(model, estimator=estimator, samples=self.draws, example_inputs=(), **options)
        with GivenNormals([self.noise]):
            found = torch.autograd.grad(compiled(), [self.mu, self.log_sigma, self.theta])
        means = torch.stack([(self.weight * g).sum() for g in found])
        squares = torch.stack([(self.weight * g**2).sum() for g in found])
        return means, squares - means**2


@pytest.mark.parametrize("alpha", [0.0, pytest.param(0.5, marks=pytest.mark.slow), -0.7])
@pytest.mark.parametrize("draws", [1, 2])
def test_mean_is_the_gradient_of_the_bound(draws: int, alpha: float) -> None:
    setting = Setting(draws=draws)
    model = setting.loss(alpha)
    expected, plain = setting.moments("reparam", model)
    found, variance = setting.moments("dreg", model)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(variance[2], plain[2])  # the model's parameters see the bound as it is
    assert (variance[:2] < plain[:2]).all()


@pytest.mark.slow
def test_three_draws() -> None:
    setting = Setting(nodes=24, draws=3)
    model = setting.loss()
    expected, _ = setting.moments("reparam", model)
    found, _ = setting.moments("dreg", model)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)


def test_no_variance_at_the_posterior() -> None:
    setting = Setting()
    with torch.no_grad():
        precision = 1 + torch.exp(-2 * setting.theta)
        setting.mu.copy_(1.2 * torch.exp(-2 * setting.theta) / precision)
        setting.log_sigma.copy_(-0.5 * torch.log(precision))
    _, plain = setting.moments("reparam", setting.loss())
    found, variance = setting.moments("dreg", setting.loss())
    assert (variance[:2].abs() < 1e-20).all() and (found[:2].abs() < 1e-12).all()
    assert (plain[:2] > 1e-3).all()


def test_independent_elements_and_their_order() -> None:
    """Two latent elements an example, an example's bound: each draw is weighed by its own example."""
    torch.manual_seed(0)
    x = torch.randn(4, 3, dtype=DTYPE)
    mu = nn.Parameter(torch.randn(4, 3, dtype=DTYPE))

    def model() -> Tensor:
        q = Independent(Normal(mu, torch.full_like(mu, 0.8)), 1)
        z = q.rsample()
        prior = Independent(Normal(torch.zeros_like(z), torch.ones_like(z)), 1).log_prob(z)
        log_w = prior + Normal(torch.tanh(z), 0.5).log_prob(x).sum(-1) - q.log_prob(z)
        return scg.multisample(-log_w).mean()

    compiled = scg.compile(model, estimator="dreg", samples=5, example_inputs=())
    noise = torch.randn(5, 4, 3, dtype=DTYPE)
    with GivenNormals([noise]):
        (found,) = torch.autograd.grad(compiled(), mu)
    z = (mu + 0.8 * noise).detach().requires_grad_()
    log_w = (
        Normal(torch.zeros_like(z), torch.ones_like(z)).log_prob(z).sum(-1)
        + Normal(torch.tanh(z), 0.5).log_prob(x).sum(-1)
        - Normal(mu.detach(), 0.8).log_prob(z).sum(-1)
    )
    (slope,) = torch.autograd.grad(log_w.sum(), z)
    share = torch.softmax(log_w.detach(), 0).unsqueeze(-1)
    torch.testing.assert_close(found, -(share**2 * slope).sum(0) / 4)


def test_a_transformed_draw() -> None:
    """Its density is that of the value before the transform: the gradient is weighed there."""
    setting = Setting()

    def model() -> Tensor:
        q = LogNormal(setting.mu, torch.exp(setting.log_sigma))
        z = q.sample()
        prior = LogNormal(torch.zeros_like(z), torch.ones_like(z)).log_prob(z)
        fit = Normal(torch.log(z), torch.exp(setting.theta)).log_prob(torch.full_like(z, 1.2))
        return scg.multisample(q.log_prob(z) - prior - fit).sum()

    expected, _ = setting.moments("reparam", setting.loss())
    found, _ = setting.moments("dreg", model)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)


def test_below_a_reparameterized_draw() -> None:
    points, weight = grid(13, 4)
    mu = nn.Parameter(torch.full((len(weight),), 0.3, dtype=DTYPE))
    v = nn.Parameter(torch.full((len(weight),), 0.6, dtype=DTYPE))

    def model() -> Tensor:
        one = torch.ones_like(mu)
        top = Normal(mu, 0.6 * one)
        y = top.sample()
        q = Normal(v * y, 0.7 * one)
        z = q.sample()
        joint = Normal(0 * one, one).log_prob(y) + Normal(y, one).log_prob(z) + Normal(z, 1.3 * one).log_prob(0.8 * one)
        return scg.multisample(top.log_prob(y) + q.log_prob(z) - joint).sum()

    means = []
    for estimator in ("reparam", "dreg"):
        given = {"y": "reparam", "z": estimator}
        compiled = scg.compile(model, estimators=given, samples=2, example_inputs=())
        with GivenNormals([points[:2], points[2:]]):
            found = torch.autograd.grad(compiled(), [mu, v])
        means.append(torch.stack([(weight * g).sum() for g in found]))
    torch.testing.assert_close(means[1], means[0], rtol=1e-5, atol=1e-6)
    with pytest.raises(scg.EstimatorError, match=r"%z .* is drawn from it: only the last draw"):
        scg.compile(model, estimator="dreg", samples=2)()


def test_below_a_score_type_draw() -> None:
    """Two draws of a bit above, summed over; the noise of those below by quadrature."""
    points, weight = grid(30, 2)
    logit = nn.Parameter(torch.tensor(0.4, dtype=DTYPE))
    v = nn.Parameter(torch.tensor(0.6, dtype=DTYPE))
    count = len(weight)

    def model() -> Tensor:
        bit = Bernoulli(logits=logit)
        b = bit.sample()
        q = Normal((v * b).expand(count), 0.7 * torch.ones(count, dtype=DTYPE))
        z = q.sample()
        prior = Normal(torch.zeros_like(z), torch.ones_like(z)).log_prob(z)
        fit = Normal(z, torch.ones_like(z)).log_prob(b + 0.5)
        bound = scg.multisample(q.log_prob(z) + bit.log_prob(b) - prior - fit + math.log(2.0))
        return (bound * weight).sum()

    means = []
    for estimator in ("reparam", "dreg"):
        given = {"b": "score_function", "z": estimator}
        compiled = scg.compile(model, estimators=given, samples=2, example_inputs=())

        def at_nodes(compiled: Any = compiled) -> Tensor:
            with GivenNormals([points]):
                return compiled()

        means.append(expected_estimate(at_nodes, {"logit": logit, "v": v}))
    torch.testing.assert_close(means[1], means[0], rtol=1e-8, atol=1e-8)


def test_refusals_say_why() -> None:
    mu = nn.Parameter(torch.zeros(3))

    def compiled(cost: Callable[[Any, Tensor], Tensor], joined: bool = True, estimator: str = "dreg") -> Any:
        def model() -> Tensor:
            q = Normal(mu, torch.ones(3))
            z = q.sample()
            return cost(q, z)

        return scg.compile(model, estimator=estimator, samples=2, example_inputs=())

    multi = scg.multisample
    with pytest.raises(scg.EstimatorError, match="no scg.multisample bound"):
        compiled(lambda q, z: (z**2).sum())
    with pytest.raises(scg.EstimatorError, match="another cost beside the bound"):
        compiled(lambda q, z: multi(q.log_prob(z) + z**2).sum() + z.sum())
    with pytest.raises(scg.EstimatorError, match="holds it not at all"):
        compiled(lambda q, z: multi(z**2).sum())
    with pytest.raises(scg.EstimatorError, match="holds it -1 x"):
        compiled(lambda q, z: multi(z**2 - q.log_prob(z)).sum())
    with pytest.raises(scg.EstimatorError, match="a way that is not followed"):
        compiled(lambda q, z: multi(z**2 + q.log_prob(z) * mu).sum())
    with pytest.raises(scg.EstimatorError, match="whose weights differ"):
        compiled(lambda q, z: multi(q.log_prob(z).sum() + z**2).sum())
    with pytest.raises(scg.EstimatorError, match="moves with its parameter high"):

        def moving() -> Tensor:
            q = Uniform(torch.zeros(3), mu + 1)
            z = q.sample()
            return multi(q.log_prob(z) + z**2).sum()

        scg.compile(moving, estimator="dreg", samples=2)()
    with pytest.raises(scg.EstimatorError, match="no rsample"):
        scg.compile(lambda: multi(Bernoulli(logits=mu).sample()).sum(), estimator="dreg", samples=2)()
    model = compiled(lambda q, z: multi(2 * q.log_prob(z).sum() / 2 - (-(z**2)).sum()).sum())
    assert model.graph.sites["z"].estimator == "dreg"


def test_other_outputs_are_not_differentiated_unweighed() -> None:
    mu, theta = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.ones(3))

    def model() -> tuple[Tensor, Tensor, Tensor]:
        q = Normal(mu, torch.ones(3))
        z = q.sample()
        return scg.multisample(q.log_prob(z) + (z * theta - 1) ** 2).sum(), z, theta**2

    loss, z, beside = scg.compile(model, estimator="dreg", samples=2)()
    torch.autograd.grad(loss + beside.sum(), [mu, theta], retain_graph=True)
    with pytest.raises(RuntimeError, match="%z .* put it into the objective, detach it, or use 'reparam'"):
        (loss + z.sum()).backward()


def test_generated_code_and_inductor() -> None:
    setting = Setting(nodes=3)
    model = setting.loss()
    compiled = scg.compile(model, estimator="dreg", samples=2, example_inputs=())
    scope: dict[str, Any] = {}
    exec(compiled.code, scope)
    values = {"mu": setting.mu, "log_sigma": setting.log_sigma, "theta": setting.theta}
    names = scope["forward"].__code__.co_varnames[: scope["forward"].__code__.co_argcount]
    given = [next(p for path, p in values.items() if path in name) for name in names]
    found = []
    runs: list[Callable[[], Tensor]] = [compiled, lambda: scope["forward"](*given)]
    for run in runs:
        with GivenNormals([setting.noise]):
            found.append(torch.autograd.grad(run(), [setting.mu, setting.theta]))
    torch.testing.assert_close(found[0], found[1])
    with pytest.raises(scg.LoweringError, match="weighs gradients on their way back"):
        scg.compile(model, estimator="dreg", samples=2, backend="inductor", example_inputs=())

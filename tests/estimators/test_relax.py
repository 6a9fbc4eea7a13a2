"""REBAR, RELAX: exact by quadrature over their noise, published variances, and training that stays to itself."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli, Categorical, OneHotCategorical

import scg
from scg.estimators.relax import Rebar, Relax
from scg.estimators.score_function import ScoreFunction
from tests.estimators.quadrature import Given, expected_gradient, nodes

U, W = nodes(40)
N = len(U)
FIRST, SECOND = U.repeat_interleave(N).repeat(2), U.repeat(N).repeat(2)
DRAW = torch.tensor([0.0, 1.0], dtype=torch.float64).repeat_interleave(N * N)
WEIGHT = (W[:, None] * W).flatten().repeat(2)
"""The grid of both uniforms and the draw: one independent element of a site for each node."""


def on_grid(estimator: Any, logit: float, t: float) -> tuple[Any, Tensor, Tensor]:
    """The compiled ``sum (z - t)^2`` with an element for each node, its logits, and the nodes' probabilities."""
    logits = nn.Parameter(torch.full((len(DRAW),), logit, dtype=torch.float64))

    def loss() -> Tensor:
        return ((Bernoulli(logits=logits).sample() - t) ** 2).sum()

    compiled = scg.compile(loss, estimator=estimator, example_inputs=()).double()
    p = torch.sigmoid(torch.tensor(logit, dtype=torch.float64))
    return compiled, logits, WEIGHT * torch.where(DRAW > 0, p, 1 - p)


def at_nodes(compiled: Any, *, frozen: bool) -> Tensor:
    """The surrogate with the draw and the uniforms of the grid."""
    with compiled.frozen() if frozen else contextlib.nullcontext():
        compiled()  # traced before the draws are forced
        with Given(DRAW, [FIRST, SECOND]):
            return compiled()


def moments(estimator: Any, logit: float, t: float) -> tuple[float, float]:
    compiled, logits, probability = on_grid(estimator, logit, t)
    (g,) = torch.autograd.grad(at_nodes(compiled, frozen=True), logits)
    mean = (probability * g).sum()
    return float(mean), float((probability * (g - mean) ** 2).sum())


def slope(logit: float, t: float) -> float:
    p = 1 / (1 + math.exp(-logit))
    return p * (1 - p) * (1 - 2 * t)


@pytest.mark.parametrize("estimator", [Rebar(temperature=0.5), Rebar(temperature=1.0), Relax(temperature=1.0)])
@pytest.mark.parametrize(("logit", "t"), [(0.0, 0.499), (1.0, 0.3), (-2.0, 0.3)])
def test_mean_is_the_gradient(estimator: Any, logit: float, t: float) -> None:
    torch.manual_seed(0)
    assert moments(estimator, logit, t)[0] == pytest.approx(slope(logit, t), abs=1e-9)


@pytest.mark.parametrize(
    ("t", "temperature", "variance"),
    [(0.45, 0.1, 0.0873), (0.45, 0.5, 0.02265), (0.45, 1.0, 0.01849), (0.45, 2.0, 0.01667),
     (0.499, 0.1, 0.0837), (0.499, 0.5, 0.02229), (0.499, 1.0, 0.01838), (0.499, 2.0, 0.01663)],
)  # fmt: skip
def test_variances_of_rebar(t: float, temperature: float, variance: float) -> None:
    assert moments(Rebar(temperature=temperature), 0.0, t)[1] == pytest.approx(variance, rel=2e-3)


@pytest.mark.parametrize("estimator", [Rebar(temperature=1.0), Relax(temperature=1.0)])
def test_control_variate_learns_the_gradient_of_the_variance(estimator: Any) -> None:
    """One draw's gradient, averaged over all noise, is the derivative of the variance."""
    torch.manual_seed(0)
    compiled, logits, probability = on_grid(estimator, 0.6, 0.3)
    parameters = list(compiled.estimator_parameters())

    def squared() -> Tensor:  # the mean does not depend on the parameters
        (g,) = torch.autograd.grad(at_nodes(compiled, frozen=True), logits)
        return (probability * g**2).sum()

    expected = []
    for parameter in parameters:
        flat = parameter.detach().view(-1)
        before = float(flat[0])
        ends = []
        for step in (1e-5, -1e-5):
            flat[0] = before + step
            ends.append(squared())
        flat[0] = before
        expected.append(float(ends[0] - ends[1]) / 2e-5)

    def weighted() -> Tensor:
        return ((Bernoulli(logits=logits).sample() - 0.3) ** 2 * probability.sqrt()).sum()

    # a cost times the root of its node's probability: its squared gradient is then weighted by the probability
    other = scg.compile(weighted, estimator=estimator, example_inputs=()).double()
    other.load_state_dict({k: v for k, v in compiled.state_dict().items() if k.startswith("estimators.")}, strict=False)
    loss = at_nodes(other, frozen=False)
    if isinstance(estimator, Rebar):
        for found, exact in zip(torch.autograd.grad(loss, list(other.estimator_parameters())), expected, strict=True):
            assert float(found.view(-1)[0]) == pytest.approx(exact, rel=1e-6)
    else:  # the network is not scaled with the cost: its gradients are there, and finite
        grads = torch.autograd.grad(loss, list(other.estimator_parameters()))
        assert all(bool(g.isfinite().all()) and bool(g.any()) for g in grads[:-1])


class _Chain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([0.4, -0.7], dtype=torch.float64))
        self.c = nn.Parameter(torch.tensor([1.3, -0.5], dtype=torch.float64))

    def forward(self) -> Tensor:
        a = Bernoulli(logits=self.w[0]).sample()
        b = Bernoulli(logits=self.w[1] + self.c[0] * a).sample()
        return (a - 0.3) ** 2 + 2 * (b - 0.8 * a) ** 2 * self.c[1]


@pytest.mark.parametrize(
    "other",
    ["enumerate", *(pytest.param(name, marks=pytest.mark.slow) for name in ("local_expectation", "score"))],
)
@pytest.mark.parametrize("site", ["a", "b"])
def test_unbiased_beside_others(site: str, other: str) -> None:
    model = _Chain()
    given = ScoreFunction(baseline=None) if other == "score" else other
    compiled = scg.compile(model, estimators={site: Rebar(temperature=1.0), "*": given}, example_inputs=()).double()
    with compiled.frozen():
        compiled()
        found = expected_gradient(compiled, dict(model.named_parameters()), noise=2, count=8)
    _, exact = scg.exact(model)
    for name in exact:
        torch.testing.assert_close(found[name], exact[name], rtol=0, atol=1e-5)


class _Vector(nn.Module):
    """``[B, D]`` with a decoder: elements of one example share costs."""

    def __init__(self, one_hot: bool, index: bool = False) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.one_hot, self.index = one_hot, index
        self.logits = nn.Parameter(torch.randn((2, 3) if one_hot else (2, 2), dtype=torch.float64))
        self.decoder = nn.Linear(3 if one_hot else 2, 2, dtype=torch.float64)

    def forward(self) -> Tensor:
        q: Any = OneHotCategorical(logits=self.logits) if self.one_hot else Bernoulli(logits=self.logits)
        if self.index:
            q = Categorical(logits=self.logits)
            z = q.sample()
            decoded = self.decoder.weight.T[z] + self.decoder.bias
            return (torch.tanh(decoded).sum(-1) ** 2 + 0.3 * q.log_prob(z)).mean()
        z = q.sample()
        own = q.log_prob(z) if self.one_hot else q.log_prob(z).sum(-1)
        return (torch.tanh(self.decoder(z)).sum(-1) ** 2 + 0.3 * own).mean()


@pytest.mark.parametrize("kind", ["bits", "one_hot", "index"])
@pytest.mark.parametrize("estimator", ["rebar", "relax", Relax(through_cost=False)])
def test_mean_over_many_draws(estimator: Any, kind: str) -> None:
    model = _Vector(kind != "bits", kind == "index")
    compiled = scg.compile(model, estimator=estimator, samples=20_000, example_inputs=()).double()
    with compiled.frozen():
        torch.manual_seed(0)
        runs = [torch.autograd.grad(compiled(), list(model.parameters())) for _ in range(12)]
    _, exact = scg.exact(model)
    for i, name in enumerate(dict(model.named_parameters())):
        estimates = torch.stack([run[i] for run in runs])
        error = estimates.std(0) / math.sqrt(len(runs))
        assert bool(((estimates.mean(0) - exact[name]).abs() <= 6 * error + 1e-4).all()), name


@pytest.mark.parametrize("estimator", ["rebar", "relax"])
def test_training_touches_the_control_variate_alone(estimator: str) -> None:
    model = _Vector(one_hot=False)
    compiled = scg.compile(model, estimator=estimator, example_inputs=()).double()
    torch.manual_seed(3)
    compiled().backward()
    with_training = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in compiled.estimator_parameters())
    compiled.zero_grad()
    torch.manual_seed(3)
    with compiled.frozen():
        compiled().backward()
    assert all(p.grad is None for p in compiled.estimator_parameters())
    for p, before in zip(model.parameters(), with_training, strict=True):
        torch.testing.assert_close(p.grad, before, rtol=0, atol=1e-14)
    assert all(key.startswith(("model.", "estimators.z.")) for key in compiled.state_dict())


def test_relax_needs_no_derivative_without_the_relaxed_cost() -> None:
    logits = nn.Parameter(torch.tensor([0.3, -0.2]))

    def loss() -> Tensor:
        return (Bernoulli(logits=logits).sample().sum() > 1.5).float()

    with pytest.raises(scg.EstimatorError, match=r"through_cost=False"):
        scg.compile(loss, estimator="relax", example_inputs=())
    with pytest.raises(scg.EstimatorError, match="jumps"):
        scg.compile(loss, estimator="rebar", example_inputs=())
    scg.compile(loss, estimator=Relax(through_cost=False))().backward()


def test_an_index_is_refused() -> None:
    logits = nn.Parameter(torch.zeros(3))
    with pytest.raises(scg.EstimatorError, match="OneHotCategorical"):
        scg.compile(lambda: Categorical(logits=logits).sample().float(), estimator="rebar", example_inputs=())


@pytest.mark.parametrize("estimator", ["rebar", "relax"])
def test_finite_at_the_edges(estimator: str) -> None:
    logits = nn.Parameter(torch.tensor([-30.0, 30.0, 0.0]))
    probs = nn.Parameter(torch.tensor([0.0, 1.0, 0.5]))

    def loss() -> Tensor:
        z, y = Bernoulli(logits=logits).sample(), Bernoulli(probs=probs).sample()
        return ((z.sum() - 0.3) * (y.sum() - 2.2)) ** 2

    compiled = scg.compile(loss, estimator=estimator, example_inputs=())
    for _ in range(20):
        compiled().backward()
    assert all(
        bool(p.grad.isfinite().all()) for p in (logits, probs, *compiled.estimator_parameters()) if p.grad is not None
    )


def test_inductor_is_refused_with_the_way_out() -> None:
    logits = nn.Parameter(torch.zeros(2))

    def loss() -> Tensor:
        z = Bernoulli(logits=logits).sample()
        return (z.sum() - 0.3) ** 2

    with pytest.raises(scg.LoweringError, match="%z: its estimator differentiates"):
        scg.compile(loss, estimator="rebar", backend="inductor", example_inputs=())


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_relax_solves_the_toy_problem(seed: int) -> None:
    torch.manual_seed(seed)
    logit = nn.Parameter(torch.zeros(1))
    compiled = scg.compile(
        lambda: ((Bernoulli(logits=logit).sample() - 0.499) ** 2).sum(),
        estimator=Relax(temperature=math.exp(0.5)),
        example_inputs=(),
    )
    optimizer = torch.optim.Adam([logit, *compiled.estimator_parameters()], lr=0.01)
    for _ in range(5000):
        optimizer.zero_grad()
        compiled().backward()
        optimizer.step()
    assert float(torch.sigmoid(logit.detach())) < 0.3

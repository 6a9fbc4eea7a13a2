"""Relaxations equal their own formulas over all draws, are as biased as theory says, and refuse where they must."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli, Categorical, Normal, OneHotCategorical
from torch.utils._python_dispatch import TorchDispatchMode

import scg
from scg.capture import captured
from scg.errors import EstimatorError
from scg.estimators.base import Estimator
from scg.estimators.decoupled_st import DecoupledST
from scg.estimators.gumbel_rao import GumbelRao
from scg.estimators.gumbel_softmax import GumbelSoftmax
from scg.estimators.reinmax import ReinMax
from scg.estimators.relaxed import Relaxation, logits_of, noise_of
from scg.estimators.score_function import ScoreFunction
from scg.estimators.straight_through import StraightThrough
from tests.law2 import assert_unbiased, expected_estimate
from tests.problems import PROBLEMS, Problem

aten = torch.ops.aten
RELAXATIONS = [cls for cls in scg.ESTIMATORS.values() if issubclass(cls, Relaxation)]


def _double(*values: float) -> nn.Parameter:
    return nn.Parameter(torch.tensor(values, dtype=torch.float64))


# -- the formulas, written a second time as backward passes ---------------------------------------------------------
def _jacobian(s: Tensor) -> Tensor:
    return torch.diag_embed(s) - s[..., :, None] * s[..., None, :]


def _straight_through_matrix(p: Tensor, drawn: Tensor) -> Tensor:
    return _jacobian(p)


def _reinmax_matrix(p: Tensor, drawn: Tensor) -> Tensor:
    return 2 * _jacobian((p + drawn) / 2) - _jacobian(p) / 2


def _decoupled_matrix(p: Tensor, drawn: Tensor) -> Tensor:
    return _jacobian(torch.softmax(p.log() / 2, -1)) / 2


MATRICES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "straight_through": _straight_through_matrix,
    "reinmax": _reinmax_matrix,
    "decoupled_st": _decoupled_matrix,
}
"""From probabilities and outcome, d (gradient in the logits) / d (gradient in the draw), ``[…, C, C]``."""


class _Relaxed(torch.autograd.Function):
    """An outcome whose backward is a given matrix."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, drawn: Tensor, matrix: Tensor) -> Tensor:
        ctx.save_for_backward(matrix)
        return drawn.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (matrix,) = ctx.saved_tensors
        return (matrix @ grad[..., None])[..., 0], None, None


def _by_hand(name: str, logits: Tensor, drawn: Tensor) -> Tensor:
    """``drawn`` of a one-hot with these normalised logits, with the backward of estimator ``name``."""
    logits = logits.expand_as(drawn)
    with torch.no_grad():
        matrix = MATRICES[name](logits.exp(), drawn)
    return _Relaxed.apply(logits, drawn, matrix)  # type: ignore[no-untyped-call]


@contextmanager
def relaxed_by_hand(name: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Plain ``sample()`` gives a draw with the estimator's backward; a Bernoulli is a one-hot of two categories."""
    plain_bernoulli: Any = Bernoulli.sample
    plain_one_hot: Any = OneHotCategorical.sample

    def bernoulli(self: Bernoulli, sample_shape: Any = ()) -> Tensor:
        drawn = plain_bernoulli(self, sample_shape)
        logits = torch.log_softmax(torch.stack([torch.zeros_like(self.logits), self.logits], -1), -1)
        return _by_hand(name, logits, torch.stack([1 - drawn, drawn], -1))[..., 1]

    def one_hot(self: OneHotCategorical, sample_shape: Any = ()) -> Tensor:
        return _by_hand(name, self.logits, plain_one_hot(self, sample_shape))

    with monkeypatch.context() as patch:
        patch.setattr(Bernoulli, "sample", bernoulli)
        patch.setattr(OneHotCategorical, "sample", one_hot)
        yield


PROGRAMS = (
    "chain", "diamond", "some_costs", "upstream_costs", "unrolled_loop", "tied_batch", "mixed_batch", "own_draws",
    "one_hot", "independent_elbo", "closed_form_kl", "shared_logits", "reported_costs",
)  # fmt: skip


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("name", MATRICES)
def test_expected_gradient_is_the_formulas(name: str, program: str, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = PROBLEMS[program]()
    params = {path: p for path, p in captured(problem.model).tensors.items() if p.requires_grad}
    compiled = scg.compile(problem.model, estimator=name)
    args = problem.calls[0]
    compiled(*args)
    got = expected_estimate(compiled, params, *args)
    with relaxed_by_hand(name, monkeypatch):
        want = expected_estimate(problem.model, params, *args)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(got[0], scg.exact(problem.model, *args)[0], rtol=1e-9, atol=1e-10)


# -- bias ---------------------------------------------------------------------------------------------------------
class _Bernoulli(nn.Module):
    def __init__(self, logit: float, cost: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.theta, self.cost = _double(logit), cost

    def forward(self) -> Tensor:
        return self.cost(Bernoulli(logits=self.theta).sample()).sum()


def _expected(model: nn.Module, estimator: Any, **options: Any) -> Tensor:
    compiled = scg.compile(model, estimator=estimator, **options)
    compiled()
    (gradient,) = expected_estimate(compiled, dict(model.named_parameters()))[1].values()
    return gradient


@pytest.mark.parametrize(("t", "logit"), [(0.499, 0.0), (0.45, -1.0), (0.49, 2.0)])
def test_straight_through_of_one_bernoulli(t: float, logit: float) -> None:
    model = _Bernoulli(logit, lambda b: (b - t) ** 2)
    p = 1 / (1 + math.exp(-logit))
    v = p * (1 - p)
    bias = _expected(model, "straight_through") - v * (1 - 2 * t)
    assert bias.item() == pytest.approx(v * (2 * p - 1), abs=1e-14)
    squares = scg.gradient_samples(scg.compile(model, estimator="straight_through"), n=400)["theta"]
    values = {round(2 * (b - t) * v, 12) for b in (0, 1)}  # variance v^3 (f'(1) - f'(0))^2 of these two
    assert {round(g, 12) for g in squares.flatten().tolist()} == values


def _pair(cost: Callable[[Tensor, Tensor], Tensor]) -> Problem:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = _double(0.3, -0.8, 0.1), _double(-1.2, 0.4)

        def forward(self) -> Tensor:
            return cost(OneHotCategorical(logits=self.a).sample(), Bernoulli(logits=self.b).sample())

    return Problem(Pair())


QUADRATIC = torch.randn(5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def _quadratic(a: Tensor, b: Tensor) -> Tensor:
    z = torch.cat([a, b])
    return z @ QUADRATIC @ z + QUADRATIC[0] @ z


def test_reinmax_is_exact_for_quadratics() -> None:
    assert_unbiased(_pair(_quadratic), estimator="reinmax")
    assert_unbiased(_pair(_quadratic), estimator="reinmax", samples=2)


@pytest.mark.parametrize("name", ["tied_batch", "mixed_batch", "one_hot", "shared_logits"])
def test_reinmax_is_exact_for_problems_with_quadratic_costs(name: str) -> None:
    assert_unbiased(PROBLEMS[name](), estimator="reinmax")


def test_reinmax_with_a_cubic_part_is_nearer_than_straight_through() -> None:
    model = _pair(lambda a, b: _quadratic(a, b) + (torch.cat([a, b]) @ QUADRATIC[1]) ** 3 / 30).model
    assert isinstance(model, nn.Module)
    exact = scg.exact(model)[1]
    params = dict(model.named_parameters())
    bias = {}
    for name in ("straight_through", "reinmax"):
        compiled = scg.compile(model, estimator=name)
        compiled()
        got = expected_estimate(compiled, params)[1]
        bias[name] = max(float((got[path] - exact[path]).abs().max()) for path in params)
    assert 1e-4 < bias["reinmax"] < 0.2 * bias["straight_through"]


# -- beside other estimators ----------------------------------------------------------------------------------------
class _Two(nn.Module):
    """``b`` given ``a``, and a cost of both."""

    def __init__(self) -> None:
        super().__init__()
        self.theta, self.w = _double(0.4), _double(0.7, -1.1)

    def cost(self, a: Tensor, b: Tensor | float) -> Tensor:
        return (a - 0.3) ** 2 * (1 + b) + 2 * b * a

    def forward(self) -> Tensor:
        a = Bernoulli(logits=self.theta[0]).sample()
        b = Bernoulli(logits=self.w[0] * a + self.w[1]).sample()
        return self.cost(a, b)

    def given(self, a: Tensor) -> Tensor:
        """Expected cost at a real number ``a``."""
        p = torch.sigmoid(self.w[0] * a + self.w[1])
        return p * self.cost(a, 1.0) + (1 - p) * self.cost(a, 0.0)


@pytest.mark.parametrize("below", ["enumerate", ScoreFunction(baseline=None), "local_expectation"])
def test_upstream_of_unbiased_ones_it_differentiates_the_conditional_expectation(below: Any) -> None:
    model = _Two()
    compiled = scg.compile(model, estimators={"a": "reinmax", "b": below})
    compiled()
    got = expected_estimate(compiled, dict(model.named_parameters()))[1]
    slopes = []
    for outcome in (0.0, 1.0):
        a = torch.tensor(outcome, dtype=torch.float64, requires_grad=True)
        slopes.append(torch.autograd.grad(model.given(a), a)[0])
    p = torch.sigmoid(model.theta[0].detach())
    torch.testing.assert_close(got["theta"][0], p * (1 - p) * (slopes[0] + slopes[1]) / 2)
    torch.testing.assert_close(got["w"], scg.exact(model)[1]["w"])


@pytest.mark.parametrize("above", ["enumerate", ScoreFunction(baseline=None)])
def test_downstream_of_unbiased_ones_these_stay_unbiased(above: Any) -> None:
    model = _Two()
    compiled = scg.compile(model, estimators={"a": above, "b": "straight_through"})
    compiled()
    got = expected_estimate(compiled, dict(model.named_parameters()))[1]
    torch.testing.assert_close(got["theta"], scg.exact(model)[1]["theta"])  # the cost is linear in b: no bias at all
    torch.testing.assert_close(got["w"], scg.exact(model)[1]["w"])


# -- noise: Gauss-Legendre over the uniforms -----------------------------------------------------------------------
NODES = 400


def _quadrature(*splits: float) -> tuple[Tensor, Tensor]:
    """Nodes and weights over [0, 1], split at the jumps.  # [N]"""
    x, w = np.polynomial.legendre.leggauss(NODES)
    edges = [0.0, *sorted(splits), 1.0]
    parts = [(lo + (hi - lo) * (x + 1) / 2, (hi - lo) * w / 2) for lo, hi in zip(edges, edges[1:], strict=False)]
    return tuple(torch.tensor(np.concatenate(column)) for column in zip(*parts, strict=True))  # type: ignore[return-value]


class ForcedNoise(TorchDispatchMode):
    """Makes ``torch.rand`` give these numbers, and ``torch.bernoulli`` this outcome."""

    def __init__(self, uniform: Tensor, outcome: float = 0.0) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.uniform, self.outcome = uniform, outcome

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is aten.rand.default:
            return self.uniform.expand(args[0]).clone()
        if func is aten.bernoulli.default:
            return torch.full_like(args[0], self.outcome)
        return func(*args, **(kwargs or {}))


class _Weighted(nn.Module):
    """The same Bernoulli at every node of a quadrature, whose weights are those of the costs."""

    def __init__(self, logit: float, weights: Tensor) -> None:
        super().__init__()
        self.theta, self.weights = _double(logit), weights

    def forward(self) -> Tensor:
        b = Bernoulli(logits=self.theta.expand(len(self.weights))).sample()
        return ((b - 0.3) ** 3 * self.weights).sum()


def _mean_by_quadrature(estimator: Estimator, logit: float, outcome: float = 0.0, *splits: float) -> float:
    nodes, weights = _quadrature(*splits)
    model = _Weighted(logit, weights)
    compiled = scg.compile(model, estimator=estimator)
    compiled()
    with ForcedNoise(nodes, outcome):
        compiled().backward()
    assert model.theta.grad is not None
    return float(model.theta.grad)


def _slope(b: Tensor) -> Tensor:
    return 3 * (b - 0.3) ** 2


@pytest.mark.parametrize("logit", [0.0, 0.8, -2.0])
@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("tau", [0.5, 1.0])
def test_gumbel_softmax_of_a_bernoulli(logit: float, hard: bool, tau: float) -> None:
    jump = 1 / (1 + math.exp(logit))  # u above it gives 1
    u, w = _quadrature(jump)
    soft = torch.sigmoid((logit + torch.logit(u)) / tau)
    at = (u > jump).double() if hard else soft
    want = float((w * _slope(at) * soft * (1 - soft) / tau).sum())
    got = _mean_by_quadrature(GumbelSoftmax(tau, straight_through=hard), logit, 0.0, jump)
    assert got == pytest.approx(want, rel=1e-10)


@pytest.mark.parametrize("logit", [0.0, 0.8, -2.0])
def test_gumbel_rao_has_the_mean_of_straight_through_gumbel_softmax(logit: float) -> None:
    jump = 1 / (1 + math.exp(logit))
    want = _mean_by_quadrature(GumbelSoftmax(0.7, straight_through=True), logit, 0.0, jump)
    p = 1 - jump
    one = _mean_by_quadrature(GumbelRao(0.7, copies=1), logit, 1.0)
    zero = _mean_by_quadrature(GumbelRao(0.7, copies=1), logit, 0.0)
    assert p * one + (1 - p) * zero == pytest.approx(want, rel=1e-6)


def test_gumbel_rao_has_less_variance() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.theta = _double(0.3, -0.8, 0.1)

        def forward(self) -> Tensor:
            z = OneHotCategorical(logits=self.theta.expand(4000, 3)).sample()
            return ((z * torch.tensor([1.0, -2.0, 0.5])).sum(-1) ** 3).mean()

    model = Model()
    raw = scg.gradient_samples(scg.compile(model, estimator=GumbelSoftmax(0.5, straight_through=True)), n=20)["theta"]
    averaged = scg.gradient_samples(scg.compile(model, estimator=GumbelRao(0.5, copies=20)), n=20)["theta"]
    error = (raw.var(0) / 20 + averaged.var(0) / 20).sqrt()
    assert bool(((raw.mean(0) - averaged.mean(0)).abs() < 5 * error).all())
    assert bool((averaged.var(0) < raw.var(0)).all())


def test_one_hot_gumbel_softmax_over_both_noises() -> None:
    x, w = (t.double() for t in _quadrature())
    x, w = x[::1], w[::1]
    u = torch.stack([x[:, None].expand(NODES, NODES), x[None].expand(NODES, NODES)], -1)  # [N, N, 2]
    weights = w[:, None] * w

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.theta = _double(0.4, -0.3)

        def forward(self) -> Tensor:
            z = OneHotCategorical(logits=self.theta.expand(NODES, NODES, 2)).sample()
            return (((z[..., 0] - 0.2 * z[..., 1]) ** 3) * weights).sum()

    model = Model()
    compiled = scg.compile(model, estimator=GumbelSoftmax(0.6))
    compiled()
    with ForcedNoise(u):
        compiled().backward()
    # the difference of two Gumbels is logistic: one dimension is enough
    soft = torch.sigmoid((0.7 + torch.logit(x)) / 0.6)
    slope = 3 * (soft - 0.2 * (1 - soft)) ** 2 * 1.2 * soft * (1 - soft) / 0.6
    want = float((w * slope).sum())
    assert model.theta.grad is not None
    torch.testing.assert_close(model.theta.grad, torch.tensor([want, -want]).double(), rtol=1e-4, atol=1e-6)


def test_noise_given_the_outcome() -> None:
    noise = noise_of(Bernoulli(0.5))
    for logit in (-30.0, -1.0, 0.0, 2.0, 30.0, 1e4):
        logits = torch.full((1001,), logit, dtype=torch.float64)
        u = torch.linspace(1e-4, 1 - 1e-4, 1001, dtype=torch.float64)
        for b in (0.0, 1.0):
            with ForcedNoise(u):
                x = noise.given(logits, torch.full_like(logits, b))
            assert bool((x >= 0).all() if b else (x <= 0).all()) and bool(x.isfinite().all())
            tail = torch.nn.functional.logsigmoid((2 * b - 1) * (logits - x))  # log P(beyond x)
            inside = torch.nn.functional.logsigmoid((2 * b - 1) * logits)  # log P(this side of zero)
            torch.testing.assert_close((tail - inside).exp(), 1 - u, rtol=1e-7, atol=1e-9)


def test_gumbel_noise_given_the_outcome_is_gumbel_again() -> None:
    torch.manual_seed(1)
    dist = OneHotCategorical(logits=torch.tensor([0.5, -1.0, 2.0, -40.0], dtype=torch.float64))
    drawn = dist.sample((20000,))
    x = noise_of(dist).given(logits_of(dist), drawn)
    assert torch.equal(x.argmax(-1), drawn.argmax(-1))
    ranks = torch.exp(-torch.exp(-(x - dist.logits))).sort(0).values  # uniform, were the outcome forgotten
    grid = (torch.arange(20000) + 0.5) / 20000
    assert float((ranks - grid[:, None]).abs().max()) < 1.95 / math.sqrt(20000)  # Kolmogorov-Smirnov at 0.1 %


# -- densities of relaxed draws ------------------------------------------------------------------------------------
def test_the_log_density_of_a_relaxed_one_hot_is_linear_in_it() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.theta, self.prior = _double(0.4, -0.3, 0.1), torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)

        def forward(self) -> Tensor:
            q = OneHotCategorical(logits=self.theta)
            z = q.sample()
            return q.log_prob(z) - OneHotCategorical(probs=self.prior).log_prob(z)

    assert_unbiased(Problem(Model()), estimator="reinmax")
    assert_unbiased(Problem(Model()), estimator="straight_through")


# -- refusals, labels, temperatures --------------------------------------------------------------------------------
THETA = nn.Parameter(torch.tensor([0.3, -0.4]))


def _jump() -> Tensor:
    return (Bernoulli(logits=THETA).sample() > 0.5).float().mean()


def _index() -> Tensor:
    return Categorical(logits=THETA).sample().float()


def _normal() -> Tensor:
    return Normal(THETA, 1.0).sample().mean()


def _stopped() -> Tensor:
    z = Bernoulli(logits=THETA).sample()
    return (z.detach() * z).mean()


def _jump_above_a_site() -> Tensor:
    a = Bernoulli(logits=THETA).sample()
    return Bernoulli(probs=(a > 0.5).float() * 0.5 + 0.2).sample().sum()


@pytest.mark.parametrize("estimator", RELAXATIONS)
@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (_jump, "gt jumps"),
        (_index, "index, which has no relaxation"),
        (_normal, "Normal has no relaxation"),
        (_stopped, "detach stops"),
        (_jump_above_a_site, "gt jumps"),
    ],
)
def test_refused_with_the_reason(estimator: type[Estimator], model: Callable[[], Tensor], reason: str) -> None:
    site = "a" if model is _jump_above_a_site else "*"
    with pytest.raises(EstimatorError, match=reason):
        scg.compile(model, estimators={site: estimator.name}, example_inputs=())


def test_a_break_before_an_inner_site_rules_reparam_out() -> None:
    def model() -> Tensor:
        x = Normal(THETA, 1.0).rsample()
        y = Bernoulli(probs=(x > 0).float() * 0.5 + 0.2).sample()
        return y.sum()

    compiled = scg.compile(model, example_inputs=())
    assert compiled.graph.sites["x"].estimator == "score_function"
    with pytest.raises(EstimatorError, match="path to %y is broken"):
        scg.compile(model, estimators={"x": "reparam"}, example_inputs=())


@pytest.mark.parametrize("estimator", RELAXATIONS)
def test_biased_and_says_so(estimator: type[Estimator]) -> None:
    def model() -> Tensor:
        z = Bernoulli(logits=THETA).sample()
        return (z**2).mean()

    compiled = scg.compile(model, estimator=estimator.name, example_inputs=())
    assert "BIASED" in str(compiled.explain())
    with pytest.raises(EstimatorError, match="biased and allow_biased=False"):
        scg.compile(model, estimator=estimator.name, allow_biased=False, example_inputs=())


def test_temperature_is_annealed_in_place() -> None:
    theta = _double(0.7)
    tau = torch.tensor(1.0)

    def model() -> Tensor:
        return Bernoulli(logits=theta).sample().sum()

    compiled = scg.compile(model, estimator=GumbelSoftmax(tau))
    u = torch.tensor([0.6], dtype=torch.float64)
    for value in (1.0, 0.5, 0.1):
        tau.fill_(value)
        if value == 0.1:
            compiled.eval()
        compiled()
        with ForcedNoise(u):
            got = compiled()
        assert got.item() == pytest.approx(torch.sigmoid((theta + torch.logit(u)) / value).item(), rel=1e-6)
    assert len(compiled._programs) == 2  # one a mode: a new temperature needs no new program


@pytest.mark.parametrize(
    "wrong", [0.0, -1.0, torch.ones(2), torch.ones((), requires_grad=True), torch.ones((), dtype=torch.int64)]
)
@pytest.mark.parametrize("make", [GumbelSoftmax, ReinMax, GumbelRao, DecoupledST])
def test_what_is_no_temperature(make: Any, wrong: Any) -> None:
    with pytest.raises(ValueError, match="temperature"):
        make(wrong)


# -- stability -----------------------------------------------------------------------------------------------------
EXTREMES = (
    lambda p: Bernoulli(logits=p),
    lambda p: Bernoulli(probs=torch.sigmoid(p)),
    lambda p: OneHotCategorical(logits=p),
    lambda p: OneHotCategorical(probs=torch.softmax(p, -1)),
    lambda p: OneHotCategorical(logits=p.masked_fill(torch.tensor([True, False, False]), -math.inf)),
)


@pytest.mark.parametrize("make", EXTREMES)
@pytest.mark.parametrize("estimator", RELAXATIONS)
def test_finite_at_extremes(estimator: type[Estimator], make: Callable[[Tensor], Any]) -> None:
    logits = nn.Parameter(torch.tensor([[0.0, 30.0, -30.0], [1e4, -1e4, 0.0], [5.0, 5.0, 5.0]]))

    def model() -> Tensor:
        q = make(logits)
        z = q.sample()
        return (z - 0.3).pow(3).sum() + 0.1 * q.log_prob(z).clamp(-100, 100).sum()

    compiled = scg.compile(model, estimator=estimator.name, samples=50)
    for _ in range(3):
        compiled().backward()
    assert logits.grad is not None and bool(logits.grad.isfinite().all())


@pytest.mark.parametrize("make", EXTREMES[:4])
@pytest.mark.parametrize("estimator", RELAXATIONS)
def test_finite_under_autocast(estimator: type[Estimator], make: Callable[[Tensor], Any]) -> None:
    layer = nn.Linear(4, 3)

    def model(x: Tensor) -> Tensor:
        z = make(layer(x) * 30).sample()
        return (z - 0.3).pow(3).sum()

    compiled = scg.compile(model, estimator=estimator.name, samples=20)
    with torch.autocast("cpu", torch.bfloat16):
        compiled(torch.randn(6, 4)).backward()
    assert layer.weight.grad is not None and bool(layer.weight.grad.isfinite().all())


@pytest.mark.parametrize("estimator", [StraightThrough(samples=3), GumbelSoftmax(samples=3)])
def test_draws_of_a_sites_own(estimator: Estimator) -> None:
    theta = _double(0.2)

    def model() -> Tensor:
        z = Bernoulli(logits=theta).sample()
        return ((z - 0.3) ** 2).sum()

    compiled = scg.compile(model, estimator=estimator, samples=2, example_inputs=())
    compiled().backward()
    assert compiled.graph["z"].tensor.sample == ("K", "z") and theta.grad is not None

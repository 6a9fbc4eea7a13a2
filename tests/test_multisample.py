"""Multi-sample bounds: value and gradient over all K-tuples of draws, the sum over examples outside the logarithm."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli, Normal

import scg
from scg.estimators.score_function import ScoreFunction
from tests.law2 import expected_estimate

DTYPE = torch.float64
LIKELIHOOD = torch.tensor([[0.3, -1.2], [-0.5, 0.8]], dtype=DTYPE)  # [B, z]


def _weights(w: Tensor, z: Tensor) -> Tensor:
    """log p(x, z) - log q(z) of each example.  # [*, B]"""
    fit = torch.where(z > 0.5, LIKELIHOOD[:, 1], LIKELIHOOD[:, 0])
    return fit - Bernoulli(logits=w).log_prob(z)


@pytest.mark.parametrize("alpha", [0.0, 0.5])
@pytest.mark.parametrize("K", [2, 3])
def test_bound_and_gradient_are_exact(K: int, alpha: float) -> None:
    w = nn.Parameter(torch.tensor([0.4, -0.7], dtype=DTYPE))

    def model() -> Tensor:
        z = Bernoulli(logits=w).sample()
        bound = scg.multisample(-_weights(w, z), "renyi", alpha=alpha)
        return (bound * torch.tensor([1.0, 3.0], dtype=DTYPE)).sum() + z.sum()  # an ordinary cost beside it

    compiled = scg.compile(model, samples=K)
    compiled()
    assert compiled.graph.sites["z"].estimator == "score_function"
    value, gradient = expected_estimate(compiled, {"w": w})

    exact: Any = 0.0
    for rows in itertools.product([0.0, 1.0], repeat=2 * K):
        z = torch.tensor(rows, dtype=DTYPE).reshape(K, 2)
        p = Bernoulli(logits=w).log_prob(z).sum().exp()
        order = 1 - alpha
        bound = -(order * _weights(w, z)).exp().mean(0).log() / order  # [B]
        exact = exact + p * ((bound * torch.tensor([1.0, 3.0], dtype=DTYPE)).sum() + z.sum() / K)
    torch.testing.assert_close(value, exact.detach())
    torch.testing.assert_close(gradient["w"], torch.autograd.grad(exact, w)[0])


def test_one_draw_is_the_plain_bound() -> None:
    w = nn.Parameter(torch.tensor([0.4, -0.7], dtype=DTYPE))

    def model(joined: bool) -> Tensor:
        z = Bernoulli(logits=w).sample()
        cost = -_weights(w, z)
        return (scg.multisample(cost) if joined else cost).sum()

    values = [scg.compile(model, estimator="enumerate")(joined) for joined in (True, False)]
    torch.testing.assert_close(*values)
    torch.testing.assert_close(scg.exact(model, True)[0], scg.exact(model, False)[0])


def test_pathwise_gradients_go_through_the_bound() -> None:
    mu = nn.Parameter(torch.tensor([0.3, -0.2]))

    def model() -> Tensor:
        z = Normal(mu, 1.0).rsample()
        return scg.multisample(z**2).sum()

    compiled = scg.compile(model, samples=4, example_inputs=())
    assert compiled.graph.sites["z"].estimator == "reparam"
    torch.manual_seed(0)
    got = torch.autograd.grad(compiled(), mu)[0]
    torch.manual_seed(0)
    z = Normal(mu, 1.0).rsample((4,))
    want = torch.autograd.grad(-torch.logsumexp(-(z**2), 0).sum(), mu)[0]
    torch.testing.assert_close(got, want)


def test_vimco_has_less_variance_than_a_bare_bound() -> None:
    w = nn.Parameter(torch.tensor([0.4, -0.7]))

    def model() -> Tensor:
        z = Bernoulli(logits=w).sample()
        return scg.multisample((z - torch.tensor([0.2, 0.7])) ** 2 + 10).sum()

    compiled = scg.compile(model, samples=5)
    variance = scg.gradient_samples(compiled, n=200)["w"].var(0).sum()
    assert variance < 0.1  # the bare bound, about 10 in value, would give two hundred times this


def test_refusals() -> None:
    w = nn.Parameter(torch.tensor([0.4, -0.7]))

    def model() -> Tensor:
        z = Bernoulli(logits=w).sample()
        return scg.multisample(z**2).sum()

    with pytest.raises(scg.EstimatorError, match="joins draws"):
        scg.compile(model, samples=2, estimator="enumerate")()

    def nonlinear() -> Tensor:
        z = Bernoulli(logits=w).sample()
        return scg.multisample(z**2).sum() ** 2

    with pytest.raises(scg.EstimatorError, match="linear"):
        scg.compile(nonlinear, samples=2, estimator=ScoreFunction())()
    with pytest.raises(ValueError, match="below 1"):
        scg.multisample(torch.ones(2), "renyi", alpha=1.0)


def test_wake_sleep_by_stop_gradients() -> None:
    """The recipe of the documentation: both wake gradients, summed over all pairs of draws."""
    w = nn.Parameter(torch.tensor([0.4, -0.7], dtype=DTYPE))
    fit = nn.Parameter(LIKELIHOOD.clone())

    def model() -> Tensor:
        q = Bernoulli(logits=w)
        with torch.no_grad():
            z = q.sample()
        log_q, log_p = q.log_prob(z), torch.where(z > 0.5, fit[:, 1], fit[:, 0])
        wake_model = scg.multisample(log_q.detach() - log_p)
        wake_q = -scg.multisample(log_q - log_p.detach())
        return (wake_model + wake_q).sum()

    compiled = scg.compile(model, samples=2)
    compiled()
    _, gradient = expected_estimate(compiled, {"w": w, "fit": fit})

    exact: Any = 0.0
    for rows in itertools.product([0.0, 1.0], repeat=4):
        z = torch.tensor(rows, dtype=DTYPE).reshape(2, 2)
        log_q, log_p = Bernoulli(logits=w).log_prob(z), torch.where(z > 0.5, fit[:, 1], fit[:, 0])
        share = torch.softmax((log_p - log_q).detach(), 0)  # [K, B]
        exact = exact - log_q.sum().exp().detach() * (share * (log_p + log_q)).sum()
    expected = torch.autograd.grad(exact, [w, fit])
    torch.testing.assert_close((gradient["w"], gradient["fit"]), expected)


def test_two_examples_have_a_logarithm_each() -> None:
    """Not one of their summed log weights, which is another bound."""
    w = nn.Parameter(torch.tensor([0.4, -0.7], dtype=DTYPE))

    def model(apart: bool) -> Tensor:
        z = Bernoulli(logits=w).sample()
        cost = -_weights(w, z)
        return scg.multisample(cost).sum() if apart else scg.multisample(cost.sum())

    apart, together = (scg.compile(model, samples=3, example_inputs=(flag,)) for flag in (True, False))
    values = [expected_estimate(run, {"w": w}, flag)[0] for run, flag in ((apart, True), (together, False))]
    one = [-_weights(w, torch.full((2,), bit, dtype=DTYPE)) for bit in (0.0, 1.0)]  # [B]
    p = torch.sigmoid(w)
    expected: Any = 0.0
    for bits in itertools.product([0, 1], repeat=3):
        law = torch.stack([p if bit else 1 - p for bit in bits]).prod(0)
        expected = expected - law @ torch.stack([-one[bit] for bit in bits]).exp().mean(0).log()
    torch.testing.assert_close(values[0], expected.detach())
    assert values[0] < values[1] - 1e-3


@pytest.mark.parametrize("noise", [lambda w: torch.randn_like(w), lambda w: torch.rand(2, dtype=DTYPE)])
def test_noise_that_all_draws_would_share_is_refused(noise: Any) -> None:
    w = nn.Parameter(torch.tensor([0.4, -0.7], dtype=DTYPE))

    def model() -> Tensor:
        z = w + noise(w)
        return scg.multisample(Normal(w, 1.0).log_prob(z) + z**2).sum()

    with pytest.raises(scg.EstimatorError, match=r"test_multisample.py:\d+.*share this noise(.|\n)*rsample"):
        scg.compile(model, samples=3)()
    scg.compile(model)().backward()  # one draw shares it with none


def test_noise_drawn_from_a_distribution_is_one_a_draw() -> None:
    w = nn.Parameter(torch.tensor([0.4, -0.7], dtype=DTYPE))

    def model() -> Tensor:
        z = w + Normal(0.0, 1.0).expand(w.shape).rsample().double()
        return scg.multisample(Normal(w, 1.0).log_prob(z) + 3 * z**2).sum()

    torch.manual_seed(0)
    one, many = (torch.stack([scg.compile(model, samples=K)().detach() for _ in range(20)]).mean() for K in (1, 50))
    assert many < one - 1


def test_explain_says_which_noise_all_samples_share() -> None:
    w = nn.Parameter(torch.tensor([0.4, -0.7], dtype=DTYPE))

    def model() -> Tensor:
        return ((Bernoulli(logits=w).sample() + torch.randn(2, dtype=DTYPE)) ** 2).sum()

    assert "same for all samples" in str(scg.compile(model, samples=3, example_inputs=()).explain())
    assert "same for all samples" not in str(scg.compile(model, example_inputs=()).explain())

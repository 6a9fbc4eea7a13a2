"""Faults that other libraries have had, and that no other test here would show by its name.

Elsewhere: a constant added to a cost, and the leave-two-out index of the unordered set (`test_subsets`); the
conditional relaxed draw (`test_relaxations`); the decoder's gradient under ARM and memory kept in cycles
(`test_antithetic`); baselines at second order (`tests.test_higher_order`).
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli

import scg
from scg.estimators.score_function import ScoreFunction
from scg.estimators.unordered_set import UnorderedSet


def test_a_moving_average_leaves_the_current_cost_out() -> None:
    """The first step has no baseline; the second that of the first cost alone."""
    theta = nn.Parameter(torch.tensor(0.3, dtype=torch.float64))
    seen: list[Tensor] = []

    def loss() -> tuple[Tensor, Tensor]:
        z = Bernoulli(logits=theta).sample()
        return torch.exp(z), z

    compiled = scg.compile(loss, estimator=ScoreFunction(baseline="moving_average"), example_inputs=())
    torch.manual_seed(0)
    for _ in range(6):
        objective, z = compiled()
        (gradient,) = torch.autograd.grad(objective, theta)
        cost = torch.exp(z)
        decayed = [0.9**age * past for age, past in enumerate(reversed(seen))]
        weights = sum(0.9**age for age in range(len(seen)))
        baseline = sum(decayed) / weights if seen else 0.0
        torch.testing.assert_close(gradient, (cost - baseline) * (z - torch.sigmoid(theta.detach())))
        seen.append(cost)
    assert len({float(cost) for cost in seen}) == 2


def test_three_bernoullis_have_eight_outcomes() -> None:
    """Not three: a vector of bits is no categorical of its length."""
    w = nn.Parameter(torch.tensor([0.3, -0.8, 1.1], dtype=torch.float64))

    def loss() -> Tensor:
        return torch.exp(Bernoulli(logits=w).sample() @ w.detach())

    compiled = scg.compile(loss, estimator=UnorderedSet(samples=8))
    (gradient,) = torch.autograd.grad(compiled(), w)
    torch.testing.assert_close(gradient, scg.exact(loss)[1]["w"])
    with pytest.raises(scg.EstimatorError, match="its support has only 8"):
        scg.compile(loss, estimator=UnorderedSet(samples=9))()


def test_weights_of_two_hundred_bits_do_not_underflow() -> None:
    """Importance weights of e^-140, and of e^-5140, are compared in log space: a common factor changes nothing."""
    w = nn.Parameter(torch.linspace(-1, 1, 200, dtype=torch.float64))

    def loss(shift: float) -> Tensor:
        q = Bernoulli(logits=w)
        z = q.sample()
        fit = Bernoulli(logits=w.detach().flip(0)).log_prob(z).sum()
        return scg.multisample(q.log_prob(z).sum() - fit + 140.0 + shift)

    gradients = []
    for shift in (0.0, 5000.0):
        compiled = scg.compile(loss, samples=4, example_inputs=(shift,))
        torch.manual_seed(1)
        gradients.append(torch.autograd.grad(compiled(shift), w)[0])
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-8, atol=1e-10)
    assert bool((gradients[0] != 0).all())


@pytest.mark.slow
def test_a_program_longer_than_the_recursion_limit() -> None:
    w = nn.Parameter(torch.tensor(0.3, dtype=torch.float64))

    def loss() -> Tensor:
        x = Bernoulli(logits=w).sample()
        for _ in range(1200):
            x = x + torch.sin(x) / 1200
        return x

    compiled = scg.compile(loss, estimator="local_expectation")
    (gradient,) = torch.autograd.grad(compiled(), w)
    torch.testing.assert_close(gradient, scg.exact(loss)[1]["w"])

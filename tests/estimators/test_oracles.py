"""Variances in closed form, each over all draws: the toy ``E[(b - p0)^2]``, and eight outcomes of three coins."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli

import scg
from scg.estimators.baselines import RunningMean
from scg.estimators.score_function import ScoreFunction
from scg.estimators.sum_and_sample import SumAndSample
from scg.estimators.unordered_set import UnorderedSet
from tests.estimators.coins import COSTS, P0, coins, score
from tests.estimators.finite_noise import FiniteARM, moments

TABLE = {
    (0.499, 0.0): (5.0000e-4, 1.56251e-2, 2.5e-7, 4.16667e-8, 8.92857e-9, 8.33333e-8, 0.0),
    (0.49, 0.0): (5.0000e-3, 1.56375e-2, 2.5e-5, 4.16667e-6, 8.92857e-7, 8.33333e-6, 0.0),
    (0.45, 0.0): (2.5000e-2, 1.59391e-2, 6.25e-4, 1.04167e-4, 2.23214e-5, 2.08333e-4, 0.0),
    (0.499, 1.0): (3.93224e-4, 1.22430e-2, 2.38599e-7, 6.77578e-8, 2.65158e-8, 1.45813e-7, 1.32845e-7),
    (0.49, -2.0): (2.09987e-3, 6.97341e-3, 1.65893e-5, 6.82481e-6, 3.20243e-6, 1.41991e-5, 1.40861e-5),
    (0.45, -1.0): (1.96612e-2, 1.49344e-2, 5.96497e-4, 1.69394e-4, 6.62895e-5, 3.64532e-4, 3.32112e-4),
}
"""(p0, theta) to the gradient and the variances of REINFORCE, leave-one-out of 2, 4 and 8 draws, ARM and DisARM."""

ESTIMATORS: dict[str, tuple[Any, int]] = {
    "reinforce": (ScoreFunction(baseline=None), 1),
    "loo-2": (ScoreFunction(baseline="leave_one_out"), 2),
    "loo-4": (ScoreFunction(baseline="leave_one_out"), 4),
}
"""The first columns: those of 8 draws are tested once, and by the formula; `test_antithetic` has the last two."""


def toy(p0: float, theta: float) -> tuple[Callable[[], Tensor], nn.Parameter]:
    logit = nn.Parameter(torch.tensor(theta, dtype=torch.float64))

    def loss() -> Tensor:
        return (Bernoulli(logits=logit).sample() - p0) ** 2

    return loss, logit


def of_toy(estimator: Any, samples: int, p0: float, theta: float) -> tuple[float, float]:
    """Mean and variance of the gradient."""
    loss, logit = toy(p0, theta)
    mean, variance = moments(scg.compile(loss, estimator=estimator, samples=samples), {"theta": logit})["theta"]
    return float(mean), float(variance)


@pytest.mark.parametrize(("p0", "theta"), TABLE)
@pytest.mark.parametrize("column", range(len(ESTIMATORS)), ids=list(ESTIMATORS))
def test_published_variances(column: int, p0: float, theta: float) -> None:
    mean, variance = of_toy(*list(ESTIMATORS.values())[column], p0, theta)
    assert mean == pytest.approx(TABLE[p0, theta][0], rel=1e-5)
    assert variance == pytest.approx(TABLE[p0, theta][1 + column], rel=1e-5, abs=1e-18)


def _loo(k: int, p0: float, theta: float) -> float:
    p = 1 / (1 + math.exp(-theta))
    v, gap = p * (1 - p), 1 - 2 * p0
    return gap**2 * v / k * (1 - v * (4 * k - 6) / (k - 1))


@pytest.mark.parametrize(("p0", "theta"), TABLE)
def test_leave_one_out_in_closed_form(p0: float, theta: float) -> None:
    """It is D times the unbiased sample variance of the draws."""
    for column, k in ((2, 2), (3, 4), (4, 8)):
        assert _loo(k, p0, theta) == pytest.approx(TABLE[p0, theta][column], rel=1e-5)
    assert of_toy("score_function", 3, p0, theta)[1] == pytest.approx(_loo(3, p0, theta), rel=1e-9)


@pytest.mark.slow
def test_leave_one_out_of_eight() -> None:
    assert of_toy("score_function", 8, 0.45, -1.0)[1] == pytest.approx(TABLE[0.45, -1.0][4], rel=1e-5)


@pytest.mark.parametrize("estimator", [UnorderedSet(samples=2), "measure_valued", "local_expectation", "indecater",
                                       "enumerate", SumAndSample()], ids=str)  # fmt: skip
@pytest.mark.parametrize(("p0", "theta"), [(0.499, 1.0), (0.45, -1.0)])
def test_both_outcomes_leave_no_variance(estimator: Any, p0: float, theta: float) -> None:
    loss, logit = toy(p0, theta)
    compiled = scg.compile(loss, estimator=estimator)
    torch.manual_seed(0)
    for _ in range(6):  # whatever is drawn
        (gradient,) = torch.autograd.grad(compiled(), logit)
        torch.testing.assert_close(gradient, scg.exact(loss)[1]["logit"], rtol=1e-12, atol=0)


@pytest.mark.parametrize("samples", [1, 3])
def test_a_constant_baseline(samples: int) -> None:
    """v (q f(1) + p f(0) - c)^2 / K, with the c that a moving average has come to."""
    p0, theta = 0.45, -1.0
    loss, logit = toy(p0, theta)
    compiled = scg.compile(loss, estimator=ScoreFunction(baseline="moving_average"), samples=samples)
    for _ in range(3):
        compiled()
    (state,) = (module for module in compiled.modules() if isinstance(module, RunningMean))
    c, p = float(state.read()), 1 / (1 + math.exp(-theta))
    with compiled.frozen():
        _, variance = moments(compiled, {"theta": logit})["theta"]
    expected = p * (1 - p) * ((1 - p) * (1 - p0) ** 2 + p * p0**2 - c) ** 2 / samples
    assert 0 < c < 1 and float(variance) == pytest.approx(expected, rel=1e-7)


def test_orderings() -> None:
    """DisARM below ARM below REINFORCE; at p = 1/2 four draws with leave-one-out are two pairs of ARM."""
    for p0, theta in TABLE:
        _, reinforce, two, four, eight, arm, disarm = TABLE[p0, theta]
        assert disarm < arm < reinforce and eight < four < two < reinforce
    assert of_toy(FiniteARM(nodes=2), 2, 0.45, 0.0)[1] == pytest.approx(TABLE[0.45, 0.0][3], rel=1e-5)


# -- eight outcomes of three coins, one parameter ---------------------------------------------------------------------
COINS = {
    0.0: (-0.045, 0.438420, (7.2750e-3, 3.2000e-3, 1.9875e-3, 1.4250e-3, 1.1050e-3, 9.0000e-4, 7.5804e-4)),
    -4.0: (-3.179287e-3, 0.0335568, (3.8102e-4, 2.4578e-4, 1.8228e-4, 1.4500e-4, 1.2042e-4, 1.0298e-4, 8.9962e-5)),
}
"""Kool, van Hoof and Welling 2019: the gradient, the variance of REINFORCE, and of leave-one-out of 2 to 8 draws."""


def _of_coins(estimator: Any, samples: int, eta: float) -> tuple[float, float]:
    parameter = nn.Parameter(torch.tensor(eta, dtype=torch.float64))
    compiled = scg.compile(coins(parameter), estimator=estimator, samples=samples)
    mean, variance = moments(compiled, {"eta": parameter})["eta"]
    return float(mean), float(variance)


def _identity(k: int, eta: float) -> float:
    """Leave-one-out is the sample covariance of cost and score: its variance for any distribution and cost."""
    log_p, slope = score(eta)
    p = log_p.exp()
    centred, g = COSTS - p @ COSTS, p @ (COSTS * slope)
    spread = (p @ centred**2) * (p @ slope**2) / (k - 1)
    return float((p @ (centred * slope) ** 2 - (k - 2) / (k - 1) * g**2 + spread) / k)


@pytest.mark.parametrize("eta", [0.0, pytest.param(-4.0, marks=pytest.mark.slow)])
def test_leave_one_out_of_coins(eta: float) -> None:
    gradient, reinforce, loo = COINS[eta]
    assert _of_coins(ScoreFunction(baseline=None), 1, eta) == pytest.approx((gradient, reinforce), rel=1e-5)
    assert _of_coins("score_function", 2, eta) == pytest.approx((gradient, loo[0]), rel=1e-4)
    for k, variance in enumerate(loo, 2):
        assert _identity(k, eta) == pytest.approx(variance, rel=1e-4)


def test_coins_one_by_one_leave_no_variance() -> None:
    """Factorised, with the cost of each coin by itself: what splitting costs and one enumeration each are worth."""
    eta = nn.Parameter(torch.tensor(-4.0, dtype=torch.float64))

    def loss() -> Tensor:
        return (Bernoulli(logits=eta.expand(3)).sample() - P0).square().sum()

    compiled = scg.compile(loss, estimator="indecater")
    for _ in range(3):
        (gradient,) = torch.autograd.grad(compiled(), eta)
        assert float(gradient) == pytest.approx(COINS[-4.0][0], rel=1e-6)

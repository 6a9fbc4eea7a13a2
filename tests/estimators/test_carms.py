"""CARMS: exact over the joint law of its rows, and ARMS where there are two categories."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli, Categorical, OneHotCategorical

import scg
from scg.estimators.carms import CARMS, end_orders
from tests.estimators.categoricals import MIXES, PROGRAMS, mixed
from tests.estimators.finite_noise import FiniteARMS, FiniteCARMS, moments
from tests.law2 import assert_unbiased

SLOW = ("from_probabilities", "integer_index", "one_hot", "categorical_elbo", "opaque_reward", "upstream", "both",
        "below enumerated", "above local expectation", "above a Bernoulli", "tied_vectors")  # fmt: skip
"""Hundreds of joint draws."""


def _marked(names: Any) -> list[Any]:
    return [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in names]


@pytest.mark.parametrize("name", _marked(PROGRAMS))
def test_unbiased(name: str) -> None:
    assert_unbiased(PROGRAMS[name](), estimator=FiniteCARMS(samples=2))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["one_index", "jumps"])
def test_unbiased_with_three_rows(name: str) -> None:
    assert_unbiased(PROGRAMS[name](), estimator=FiniteCARMS(samples=3))


@pytest.mark.parametrize("mix", _marked(MIXES))
def test_unbiased_beside_others(mix: str) -> None:
    problem, estimators = mixed(mix, FiniteCARMS(samples=2))
    assert_unbiased(problem, estimators=estimators)


@pytest.mark.slow
def test_unbiased_with_two_sets_of_rows() -> None:
    assert_unbiased(PROGRAMS["jumps"](), estimator=FiniteCARMS(samples=2), samples=2)


@pytest.mark.slow
@pytest.mark.parametrize("credit", ["node", "none"])
def test_unbiased_with_coarse_credit(credit: str) -> None:
    assert_unbiased(PROGRAMS["one_hot"](), estimator=FiniteCARMS(samples=2), credit=credit)


@pytest.mark.parametrize(("n", "theta"), [(2, 0.8), (2, -1.1), (3, 0.8)])
def test_two_categories_are_arms(n: int, theta: float) -> None:
    logit = nn.Parameter(torch.tensor(theta, dtype=torch.float64))

    def binary() -> Tensor:
        return torch.exp(Bernoulli(logits=logit).sample())

    def categorical() -> Tensor:
        return torch.exp(1.0 - Categorical(logits=torch.stack([logit, 0 * logit])).sample())

    arms = moments(scg.compile(binary, estimator=FiniteARMS(samples=n)), {"theta": logit})
    carms = moments(scg.compile(categorical, estimator=FiniteCARMS(samples=n)), {"theta": logit})
    torch.testing.assert_close(carms, arms)


def test_less_variance_than_independent_draws() -> None:
    w = nn.Parameter(torch.tensor([0.4, -0.9, 0.2], dtype=torch.float64))
    table = torch.tensor([0.3, -1.0, 2.0], dtype=torch.float64)

    def loss() -> Tensor:
        return table[Categorical(logits=w).sample()]

    dependent = moments(scg.compile(loss, estimator=FiniteCARMS(samples=2)), {"w": w})["w"]
    independent = moments(scg.compile(loss, estimator="score_function", samples=2), {"w": w})["w"]
    torch.testing.assert_close(dependent[0], independent[0])
    assert dependent[1].sum() < 0.8 * independent[1].sum()


def test_a_constant_added_to_the_cost_changes_nothing() -> None:
    w = nn.Parameter(torch.tensor([0.4, -0.9, 0.2], dtype=torch.float64))

    def loss(offset: float) -> Tensor:
        return w.detach()[Categorical(logits=w).sample()] + offset

    compiled = scg.compile(loss, estimator=FiniteCARMS(samples=2))
    plain, shifted = (moments(compiled, {"w": w}, offset)["w"] for offset in (0.0, 100.0))
    torch.testing.assert_close(plain, shifted, rtol=1e-9, atol=1e-11)


# -- the law of the rows ----------------------------------------------------------------------------------------------
LAWS = ([0.2, 0.3, 0.5], [0.05, 0.6, 0.1, 0.25], [0.25, 0.25, 0.25, 0.25])


@pytest.mark.parametrize("p", LAWS)
@pytest.mark.parametrize("n", [2, 3, 5])
def test_rows_have_the_law_that_is_corrected_for(n: int, p: list[float]) -> None:
    torch.manual_seed(n)
    estimator, draws, law = CARMS(samples=n), 100_000, torch.tensor(p, dtype=torch.float64)
    orders = end_orders(law).expand(draws, -1, -1)
    rows = estimator.categories(law.expand(draws, len(p)), orders)[:2]  # [2, draws]
    every = torch.cartesian_prod(torch.arange(len(p)), torch.arange(len(p))).T  # [2, C * C]
    joint = law[every].prod(0) / _of_two(estimator, law, every)
    for (first, second), expected in zip(every.T.tolist(), joint.tolist(), strict=True):
        found = float(((rows[0] == first) & (rows[1] == second)).double().mean())
        if first != second:
            assert abs(found - expected) < 5 * math.sqrt(expected / draws)
    for category, expected in enumerate(p):
        assert abs(float((rows[0] == category).double().mean()) - expected) < 5 * math.sqrt(expected / draws)


def _of_two(estimator: CARMS, p: Tensor, rows: Tensor) -> Tensor:
    """The correction of the first two rows, whatever the others are."""
    filled = torch.cat([rows, rows[:1].expand(estimator.rows - 2, -1)])
    count = rows.shape[-1]
    ratio = estimator.corrections(p.expand(count, -1), end_orders(p).expand(count, -1, -1), filled)
    return ratio[0, :, 1]


def test_every_pair_can_meet() -> None:
    """Antithetic uniforms in one fixed order never draw some pairs: the correction would be a bias."""
    p = torch.tensor([0.01, 0.2, 0.3, 0.09, 0.4], dtype=torch.float64)
    every = torch.combinations(torch.arange(5), 2).T
    for n in (2, 3, 8):
        ratio = _of_two(CARMS(samples=n), p, every)
        assert (ratio > 0).all() and (ratio <= 10 + 1e-9).all()


# -- what else must hold ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n", [2, 4])
def test_extreme_probabilities_are_finite(n: int, dtype: torch.dtype) -> None:
    rows = [[30.0, -30.0, 0.0, 30.0], [0.0, -1e4, -1e4, -1e4], [-1e4, -1e4, -300.0, 300.0]]
    logits = nn.Parameter(torch.tensor(rows, dtype=dtype))
    probs = nn.Parameter(torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]], dtype=dtype))

    def loss() -> Tensor:
        z, y = Categorical(logits=logits).sample(), OneHotCategorical(probs=probs).sample()
        return z.float().sum().square() + (y.float() @ torch.arange(3.0)).square().sum()

    compiled = scg.compile(loss, estimator=CARMS(samples=n))
    for _ in range(3):
        objective = compiled()
        grads = torch.autograd.grad(objective, [logits, probs])
        assert objective.isfinite() and all(grad.isfinite().all() for grad in grads)


def test_a_single_category_teaches_nothing() -> None:
    w = nn.Parameter(torch.zeros(2, 1))
    scg.compile(lambda: Categorical(logits=w).sample().sum().float(), estimator="carms")().backward()
    assert w.grad is not None and w.grad.tolist() == [[0.0], [0.0]]


def test_refusals_say_why() -> None:
    w = nn.Parameter(torch.zeros(3))
    with pytest.raises(scg.EstimatorError, match="Bernoulli is not Categorical or OneHotCategorical"):
        scg.compile(lambda: Bernoulli(logits=w).sample().sum(), estimator="carms", example_inputs=())
    with pytest.raises(ValueError, match="no other to be antithetic to"):
        CARMS(samples=1)

"""Law 2 with closed forms, on finite programs: whatever is left to draw, the mean is exact."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli, Binomial, Categorical, OneHotCategorical

import scg
from scg.estimators.score_function import ScoreFunction
from scg.ir import Expected
from tests.law2 import assert_unbiased
from tests.problems import PROBLEMS, Problem

Q = nn.Parameter(torch.tensor([[0.4, -0.7], [0.9, 0.2]], dtype=torch.float64))
P = nn.Parameter(torch.tensor([0.3, -1.1], dtype=torch.float64))
W = nn.Parameter(torch.tensor([[0.8, -0.5], [0.6, 1.2]], dtype=torch.float64))


def _ladder(q: Tensor, p: Tensor, w: Tensor) -> Tensor:
    """The divergence of the lower layer depends on the draw of the upper one."""
    a = Bernoulli(logits=q[0]).sample()
    below, prior = Bernoulli(logits=a @ w), Bernoulli(logits=p * a)
    b = below.sample()
    return (below.log_prob(b) - prior.log_prob(b)).sum() + (a.sum() - b[0] * 2 + b[1]) ** 2


def _gated(q: Tensor, p: Tensor, w: Tensor) -> Tensor:
    """A drawn gate weighs a divergence, and a polynomial of another draw."""
    gate = Bernoulli(logits=p[0]).sample()
    law, prior = Categorical(logits=q[0]), Categorical(logits=p)
    z = law.sample()
    y = Binomial(2, logits=w[0, 0]).sample()
    return gate * (law.log_prob(z) - prior.log_prob(z)) + gate * (y - 0.7) ** 2 * torch.exp(w[1, 0] * z.double())


def _one_hot(q: Tensor, p: Tensor, w: Tensor) -> Tensor:
    """Marginal moments of a one-hot draw, and an affine map of it."""
    z = OneHotCategorical(logits=q[0]).sample()
    return ((z - w[0]) ** 3).sum() + (z @ w).sum() * 0.3 + (z @ w[:, 0]) ** 2


def _chain(q: Tensor, p: Tensor, w: Tensor) -> Tensor:
    """Every step is affine in the one before."""
    z = torch.zeros(2, dtype=torch.float64)
    total = torch.zeros((), dtype=torch.float64)
    for t in range(2):
        z = Bernoulli(logits=q[t] + z * w[t]).sample()
        total = total + ((z - 0.3) ** 2 * p).sum()
    return total


def _joined(q: Tensor, p: Tensor, w: Tensor) -> Tensor:
    """A mean over the batch, elements that meet in one cost, and a term that stays."""
    law = Bernoulli(logits=q)
    z = law.sample()
    mixed = torch.nn.functional.linear(z, w, p)
    return ((mixed - 0.5) ** 2).mean() + 2 * law.log_prob(z).sum(-1).mean() + torch.exp(mixed.sum() * 0.2)


PROGRAMS: dict[str, tuple[Callable[..., Tensor], int]] = {
    "ladder": (_ladder, 4),
    "gated": (_gated, 4),
    "one_hot": (_one_hot, 1),
    "chain": (_chain, 4),
    "joined": (_joined, 4),
}
"""With log2 of the number of outcomes."""
ESTIMATORS: dict[str, tuple[Any, int]] = {
    "score": (ScoreFunction(baseline=None), 1),
    "leave_one_out": (ScoreFunction(baseline="leave_one_out"), 2),
    "auto": ("auto", 1),
}


CASES = [
    pytest.param(name, label, marks=[pytest.mark.slow] * (label == "leave_one_out" and name in ("ladder", "joined")))
    for name in PROGRAMS
    for label in ESTIMATORS
]


@pytest.mark.parametrize(("name", "label"), CASES)
def test_unbiased(name: str, label: str) -> None:
    program, bits = PROGRAMS[name]
    estimator, samples = ESTIMATORS[label]

    def model() -> Tensor:
        return program(Q, P, W)

    compiled = scg.compile(model, closed_forms=True, example_inputs=())
    assert any("closed form" in note for note in compiled.graph.notes)
    assert_unbiased(Problem(model, bits=bits), estimator=estimator, samples=samples, closed_forms=True)


@pytest.mark.parametrize("K", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["chain", "reported_costs", "annealed_beta", "sampled_mask", "score_above_enumerated"])
def test_programs_of_law_2(name: str, K: int) -> None:
    problem = PROBLEMS[name]()
    assert_unbiased(problem, estimators=problem.estimators, samples=K, closed_forms=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, make in PROBLEMS.items() if make().bits <= 4])
def test_every_program_of_law_2(name: str) -> None:
    problem = PROBLEMS[name]()
    estimator = ScoreFunction(baseline=None)
    assert_unbiased(problem, estimator=estimator, estimators=problem.estimators, closed_forms=True)


def test_a_divergence_below_another_draw_carries_its_samples() -> None:
    compiled = scg.compile(lambda: _ladder(Q, P, W), samples=3, estimator="score_function", closed_forms=True)
    compiled()
    (kl,) = [node for node in compiled.graph.of(Expected) if node.form_name == "kl_divergence"]
    assert kl.tensor.sample == ("K",)
    assert compiled.graph.sites["a"].credits

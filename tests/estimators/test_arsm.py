"""ARSM: exact over its Dirichlet noise cut into cells, and ARM where there are two categories."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli, Categorical, OneHotCategorical

import scg
from scg.estimators.arsm import ARSM
from tests.estimators.categoricals import MIXES, PROGRAMS, mixed
from tests.estimators.finite_noise import moments
from tests.estimators.swap_cells import FiniteARSM, cells
from tests.law2 import assert_unbiased

SLOW = (
    "from_probabilities",
    "integer_index",
    "one_hot",
    "above a Bernoulli",
    "categorical_elbo",
    "opaque_reward",
    "upstream",
    "both",
    "below enumerated",
    "above local expectation",
)
"""Hundreds of joint draws."""


def _marked(names: Any) -> list[Any]:
    return [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in names]


@pytest.mark.parametrize("name", _marked(PROGRAMS))
def test_unbiased(name: str) -> None:
    assert_unbiased(PROGRAMS[name](), estimator=FiniteARSM())


@pytest.mark.parametrize("mix", _marked(MIXES))
def test_unbiased_beside_others(mix: str) -> None:
    problem, estimators = mixed(mix, FiniteARSM())
    assert_unbiased(problem, estimators=estimators)


@pytest.mark.parametrize("credit", ["node", "none"])
def test_unbiased_with_coarse_credit(credit: str) -> None:
    assert_unbiased(PROGRAMS["tied_vectors"](), estimator=FiniteARSM(), credit=credit)


def test_two_categories_are_arm() -> None:
    """The variance is that of ARM in closed form."""
    theta = nn.Parameter(torch.tensor(-1.0, dtype=torch.float64))

    def loss() -> Tensor:
        z = 1.0 - Categorical(logits=torch.stack([theta, 0 * theta])).sample()
        return (z - 0.45) ** 2

    mean, variance = moments(scg.compile(loss, estimator=FiniteARSM(nodes=2)), {"theta": theta})["theta"]
    torch.testing.assert_close(float(mean), 1.96612e-2, rtol=1e-5, atol=0)
    torch.testing.assert_close(float(variance), 3.64532e-4, rtol=1e-5, atol=0)


def test_a_constant_added_to_the_cost_changes_nothing() -> None:
    w = nn.Parameter(torch.tensor([0.4, -0.9, 0.2], dtype=torch.float64))

    def loss(offset: float) -> Tensor:
        return w.detach()[Categorical(logits=w).sample()] + offset

    compiled = scg.compile(loss, estimator="arsm")
    found = []
    for offset in (0.0, 100.0):
        compiled(offset)
        torch.manual_seed(0)
        found.append(torch.autograd.grad(compiled(offset), w)[0])
    torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=1e-13)
    assert found[0].abs().sum() > 0


def test_the_noise_has_the_law_of_the_cells() -> None:
    """Given the draw, the swaps and the noise behind them are those of Dirichlet noise."""
    torch.manual_seed(0)
    p, n = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64), 100_000
    z = torch.multinomial(p, n, replacement=True)
    pi = ARSM().noise(p.log(), z)
    assert (pi.sum(-1) - 1).abs().max() < 1e-12
    assert torch.equal((pi.log() - p.log()).argmin(-1), z)
    orders = [[0, 1, 2], [1, 0, 2], [2, 1, 0], [0, 2, 1]]
    drawn = torch.stack([(pi[:, order] / p).argmin(-1) for order in orders], -1)
    for pattern, (area, centroid) in cells(tuple(p.tolist())).items():
        here = pi[(drawn == torch.tensor(pattern)).all(-1)]
        assert abs(len(here) / n - area) < 5 * (area * (1 - area) / n) ** 0.5
        error = (here.mean(0) - torch.from_numpy(centroid)).abs()
        assert (error < 5 * here.std(0) / len(here) ** 0.5).all()


def test_swaps_pack_all_elements() -> None:
    """Three categories are three further evaluations, whatever the batch and the number of elements that meet."""
    w = nn.Parameter(torch.zeros(50, 4, 3))
    seen: list[int] = []

    @scg.opaque(shape=lambda z: z.shape[:-1], dtype=torch.float32, batch_dims=1)
    def cost(z: Tensor) -> Tensor:
        seen.append(len(z))
        return z.float().sum(-1).square()

    compiled = scg.compile(lambda: cost(Categorical(logits=w).sample()).mean(), estimator="arsm", example_inputs=())
    seen.clear()
    compiled().backward()
    assert sum(seen) == 50 * (1 + 3)


def test_extreme_probabilities_are_finite() -> None:
    rows = [[30.0, -30.0, 0.0, 30.0], [0.0, -1e4, -1e4, -1e4], [-1e4, -1e4, -300.0, 300.0]]
    logits = nn.Parameter(torch.tensor(rows))
    probs = nn.Parameter(torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]))

    def loss() -> Tensor:
        z, y = Categorical(logits=logits).sample(), OneHotCategorical(probs=probs).sample()
        return z.float().sum().square() + (y @ torch.arange(3.0)).square().sum()

    compiled = scg.compile(loss, estimator="arsm")
    for _ in range(3):
        objective = compiled()
        grads = torch.autograd.grad(objective, [logits, probs])
        assert objective.isfinite() and all(grad.isfinite().all() for grad in grads)


def test_a_single_category_teaches_nothing() -> None:
    w = nn.Parameter(torch.zeros(2, 1))
    scg.compile(lambda: Categorical(logits=w).sample().sum().float(), estimator="arsm")().backward()
    assert w.grad is not None and w.grad.tolist() == [[0.0], [0.0]]


def test_refusals_say_why() -> None:
    w = nn.Parameter(torch.zeros(3))
    with pytest.raises(scg.EstimatorError, match="Bernoulli is not Categorical or OneHotCategorical"):
        scg.compile(lambda: Bernoulli(logits=w).sample().sum(), estimator="arsm", example_inputs=())

    def replayed(z: Tensor, reward: Tensor) -> Tensor:
        action = scg.sample(Categorical(logits=w), "action", value=z)
        return scg.depends(reward, on=action)

    with pytest.raises(scg.EstimatorError, match="the world was not seen at any other"):
        scg.compile(replayed, estimator="arsm")(torch.tensor(1), torch.tensor(0.3))


@pytest.mark.slow
def test_mean_over_many_draws_with_five_categories() -> None:
    """More categories than the cells take: |z| below 5 over all coordinates."""
    torch.manual_seed(1)
    w, table = nn.Parameter(torch.randn(2, 5, dtype=torch.float64)), torch.randn(5, 5, dtype=torch.float64)

    def loss() -> Tensor:
        z = Categorical(logits=w).sample()
        return table[z[0], z[1]]

    samples = scg.gradient_samples(scg.compile(loss, estimator="arsm", samples=2000, example_inputs=()), n=60)["w"]
    z = (samples.mean(0) - scg.exact(loss)[1]["w"]) / (samples.std(0) / 60**0.5)
    assert z.abs().max() < 5

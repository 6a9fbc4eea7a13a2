"""HNCA: exact over all draws, each unit weighed by the likelihood of the next layer, refusals with their reasons."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli, Categorical, Normal, OneHotCategorical

import scg
from scg.capture import captured
from scg.estimators.hnca import HNCA
from scg.estimators.score_function import ScoreFunction
from scg.exact import Walk
from tests.estimators.mixes import assert_unbiased_in_chain, categorical_chain, problems, tied_rows
from tests.law2 import ForcedDraws, assert_unbiased
from tests.problems import PROBLEMS, Problem


@pytest.mark.parametrize("name", list(problems("one_hot", "integer_index", "not_differentiable", "opaque_cost")))
def test_unbiased(name: str) -> None:
    problem = PROBLEMS[name]()
    assert_unbiased(problem, estimator="hnca", estimators=problem.estimators)


@pytest.mark.parametrize("mix", ["upstream", "downstream", "both", "below_enumerated"])
def test_unbiased_beside_others(mix: str) -> None:
    assert_unbiased_in_chain("hnca", mix)


@pytest.mark.parametrize("name", ["chain", "some_costs", "upstream_costs"])
def test_unbiased_with_two_draws(name: str) -> None:
    assert_unbiased(PROBLEMS[name](), estimator="hnca", samples=2)


def _parameter(*shape: int) -> nn.Parameter:
    count = torch.Size(shape).numel()
    return nn.Parameter(torch.sin(torch.arange(1, 1 + count, dtype=torch.float64) ** 2).reshape(shape))


class _Layers(nn.Module):
    """Two layers of two units and an output, with a cost of each layer alone, of two layers, and of the last."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = _parameter(2), _parameter(2, 2), _parameter(2)

    def forward(self) -> Tensor:
        a = Bernoulli(logits=self.first).sample()
        b = Bernoulli(logits=nn.functional.linear(a, self.second, self.last)).sample()
        c = Bernoulli(logits=b @ self.last).sample()
        skip = (a @ self.last - c - 0.3) ** 2  # reads a itself, and a draw that a moves
        return (a.sum() - 0.4) ** 2 + torch.exp(b @ a) + (c - 0.7) ** 2 * self.last.sum() + skip


class _Categories(nn.Module):
    """A one-hot layer above an index, two draws of which follow each."""

    def __init__(self) -> None:
        super().__init__()
        self.top, self.weight, self.table = _parameter(3), _parameter(3, 3), _parameter(3)

    def forward(self) -> Tensor:
        a = OneHotCategorical(logits=self.top).sample()
        b = Categorical(logits=nn.functional.linear(a, self.weight)).sample((2,))
        return ((self.table[b].sum() - 0.2) ** 2) * (1 + a[0])


class _Elementwise(nn.Module):
    """Each unit has a child of its own; a cost joins all children."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.c = _parameter(2), _parameter(2)

    def forward(self) -> Tensor:
        a = Bernoulli(logits=self.w).sample()
        b = Bernoulli(logits=self.c * a + 0.2).sample()
        return (b.sum() - 0.6) ** 2 + 2 * (b * a).sum()


class _Batch(nn.Module):
    """``[B, D]`` units, tied over the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.v = _parameter(2, 2), _parameter(2)

    def forward(self) -> Tensor:
        a = Bernoulli(logits=self.w).sample()
        b = Bernoulli(logits=a @ self.v).sample()
        return ((b - 0.3) ** 2).mean()


NETWORKS: dict[str, Callable[[], Problem]] = {
    "layers": lambda: Problem(_Layers()),
    "categories": lambda: Problem(_Categories()),
    "elementwise": lambda: Problem(_Elementwise()),
    "batch": lambda: Problem(_Batch()),
    "categorical_chain": categorical_chain,
    "tied_rows": tied_rows,
}


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_are_unbiased(name: str) -> None:
    assert_unbiased(NETWORKS[name](), estimator="hnca")


@pytest.mark.parametrize("credit", ["node", "none"])
@pytest.mark.parametrize("name", ["layers", "batch"])
def test_coarse_credit_is_unbiased(name: str, credit: str) -> None:
    assert_unbiased(NETWORKS[name](), estimator=HNCA(baseline=None), credit=credit)


@pytest.mark.slow
def test_beside_a_reparameterised_draw_below() -> None:
    """A child with a density: its likelihood says how likely each outcome was."""
    w, c = _parameter(2), _parameter(2)

    def loss() -> Tensor:
        a = Bernoulli(logits=w).sample()
        b = Normal(a @ c, 0.5).rsample()
        return (b - 0.3) ** 2

    found = scg.gradient_samples(scg.compile(loss, estimators={"a": "hnca"}), n=4000, seed=1)["w"]
    p = torch.sigmoid(w.detach())
    rest = (p * c.detach()).flip(0)  # E[(b - .3)^2] = var + (mean - .3)^2
    exact = p * (1 - p) * c.detach() * (c.detach() + 2 * (rest - 0.3))
    assert bool((abs(found.mean(0) - exact) < 5 * found.std(0) / len(found) ** 0.5).all())


def _moments(model: Any, estimator: Any) -> tuple[Tensor, Tensor]:
    """Mean and variance of the estimate for the first parameter, over all draws."""
    compiled = scg.compile(
        model, estimators={"a": estimator}, estimator=ScoreFunction(baseline=None), example_inputs=()
    )
    parameter = next(iter(captured(model).tensors.values()))
    total: Tensor = torch.zeros(2, *parameter.shape, dtype=torch.float64)
    walk = Walk()
    while walk.more():
        draws = ForcedDraws(walk)
        with draws:
            estimate = compiled()
        (slope,) = torch.autograd.grad(estimate, parameter)
        total += draws.probability * torch.stack([slope, slope**2])
    return total[0], total[1] - total[0] ** 2


@pytest.mark.parametrize("make", [_Layers, _Categories, _Elementwise])
def test_never_more_variance_than_the_score_function(make: Callable[[], nn.Module]) -> None:
    mean, score = _moments(make(), ScoreFunction(baseline=None))
    same, hindsight = _moments(make(), HNCA(baseline=None))
    torch.testing.assert_close(mean, same)
    assert bool((hindsight < score).all())


def test_one_unit_above_another_by_hand() -> None:
    w, c = _parameter(), _parameter()

    def loss() -> Tensor:
        a = Bernoulli(logits=w).sample()
        b = Bernoulli(logits=c * a - 0.4).sample()
        return (b - 0.3) ** 2

    compiled = scg.compile(loss, estimators={"a": HNCA(baseline=None)}, estimator="score_function")
    p, child = torch.sigmoid(w.detach()), torch.sigmoid(torch.stack([torch.tensor(-0.4).double(), c.detach() - 0.4]))
    for seed in range(4):
        torch.manual_seed(seed)
        a, b = torch.bernoulli(p), None
        b = torch.bernoulli(child[int(a)])
        likely = child if b else 1 - child  # of the child's draw, for both outcomes
        posterior = p * likely[1] / (p * likely[1] + (1 - p) * likely[0])
        expected = (posterior * (1 - p) - (1 - posterior) * p) * (b - 0.3) ** 2
        torch.manual_seed(seed)
        (found,) = torch.autograd.grad(compiled(), w)
        torch.testing.assert_close(found, expected)


def test_a_last_layer_is_summed_as_by_local_expectation() -> None:
    problem = tied_rows()
    gradients = []
    for estimator in ("hnca", "local_expectation"):
        torch.manual_seed(0)
        loss = scg.compile(problem.model, estimator=estimator)()
        gradients.append(torch.autograd.grad(loss, list(captured(problem.model).tensors.values())))
    torch.testing.assert_close(*gradients)


def test_only_what_lies_before_the_next_layer_is_evaluated() -> None:
    """One linear layer a layer, evaluated once: the likelihood of the next one moves with its weights alone."""
    first, second, third = nn.Linear(3, 4), nn.Linear(4, 5), nn.Linear(5, 1)

    def loss(x: Tensor) -> Tensor:
        a = Bernoulli(logits=first(x)).sample()
        b = Bernoulli(logits=second(a)).sample()
        return third(b).pow(2).mean()

    compiled = scg.compile(
        loss, estimators={"a": "hnca"}, estimator="score_function", example_inputs=(torch.zeros(2, 3),)
    )
    assert compiled._latest is not None
    calls = [str(node.target) for node in compiled._latest.program.module.graph.nodes]
    assert sum("linear" in call for call in calls) == 3
    assert sum("log_ratio_of_bits" in call for call in calls) == 1
    assert sum("bernoulli" in call for call in calls) == 2


def test_refusals_say_why() -> None:
    w = nn.Parameter(torch.zeros(2))

    def two_layers() -> Tensor:
        a = Bernoulli(logits=w).sample()
        b = Bernoulli(logits=a.sum() - 0.3).sample()
        return (b - 0.3) ** 2

    def continuous() -> Tensor:
        return (Normal(w, 1.0).sample() ** 2).sum()

    with pytest.raises(scg.EstimatorError, match="no finite support"):
        scg.compile(continuous, estimator="hnca", example_inputs=())
    for inner, reason in (
        ("enumerate", r"%b \(test_hnca.py:\d+\) is enumerated"),
        ("disarm", "coupled draws"),
        ("gumbel_softmax", "is relaxed"),
        (ScoreFunction(samples=3), "several draws for each"),
    ):
        with pytest.raises(scg.EstimatorError, match=reason):
            scg.compile(two_layers, estimators={"a": "hnca", "b": inner}, example_inputs=())
    with pytest.raises(scg.EstimatorError, match="two or more draws"):
        scg.compile(two_layers, estimators={"a": HNCA(baseline="leave_one_out")}, example_inputs=())

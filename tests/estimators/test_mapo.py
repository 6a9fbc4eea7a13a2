"""The memory of good outcomes: exact for whatever it holds, kept, saved, bounded, and filled by exploring."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli, Categorical

import scg
from scg.capture import captured
from scg.estimators.mapo import Mapo, Memory
from scg.exact import exact
from tests.estimators.finite_noise import moments
from tests.estimators.mixes import categorical_chain
from tests.estimators.test_sequences import Batch, EndOfSequence, Pair, Tour
from tests.law2 import assert_unbiased, expected_estimate
from tests.problems import Problem

ZERO = (torch.tensor(0.0, dtype=torch.float64),)


def memory_of(compiled: Any) -> Memory:
    (memory,) = (module for module in compiled.modules() if isinstance(module, Memory))
    return memory


def with_memory(model: Any, estimator: Mapo, rows: list[list[int]], *args: Any) -> Any:
    """A compiled module that remembers just these outcomes."""
    compiled = scg.compile(model, estimator=estimator)
    compiled(*args)
    memory = memory_of(compiled)
    memory.filled.zero_()
    for i, row in enumerate(rows):
        memory.outcomes[..., i, :] = torch.tensor(row)
        memory.filled[..., i] = True
    return compiled


@pytest.mark.parametrize("rows", [[], [[1, 0]], [[0, 1], [1, 1]], [[0, 0], [0, 1], [1, 0], [1, 1]]], ids=len)
@pytest.mark.parametrize("proposals", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_unbiased_whatever_it_remembers(rows: list[list[int]], proposals: int) -> None:
    model = Pair()
    compiled = with_memory(model, Mapo(samples=proposals, memory=4), rows, *ZERO)
    got = expected_estimate(compiled, captured(model).tensors, *ZERO)
    torch.testing.assert_close(got, exact(model, *ZERO), rtol=1e-9, atol=1e-10)


def test_all_outcomes_remembered_is_exact() -> None:
    model = Pair()
    compiled = with_memory(model, Mapo(samples=1, memory=4), [[0, 0], [0, 1], [1, 0], [1, 1]], *ZERO)
    _, variance = moments(compiled, {"w": model.w}, *ZERO)["w"]
    assert variance.abs().max() < 1e-14


@pytest.mark.parametrize(
    "make",
    [
        lambda: Problem(EndOfSequence(2)),
        pytest.param(lambda: Problem(Batch()), marks=pytest.mark.slow),
        pytest.param(categorical_chain, marks=pytest.mark.slow),
        pytest.param(lambda: Problem(Tour(3)), marks=pytest.mark.slow),
    ],
)
def test_unbiased_after_training(make: Any) -> None:
    assert_unbiased(make(), estimator=Mapo(samples=1, memory=2))


@pytest.mark.parametrize(
    "others",
    [
        {"top": Mapo(samples=1, memory=1), "bottom": "enumerate"},
        {"top": "score_function", "bottom": Mapo(samples=1, memory=1)},
    ],
)
def test_unbiased_beside_others(others: dict[str, Any]) -> None:
    assert_unbiased(categorical_chain(), estimators=others)


def test_exploring_rows_weigh_nothing() -> None:
    """Neither in the value nor in the gradient."""
    estimator = Mapo(samples=1, memory=1, explore=1, filter=64)
    w = nn.Parameter(torch.tensor([0.3, -0.8], dtype=torch.float64))

    def loss() -> Tensor:
        z = Categorical(logits=w).sample()
        return torch.exp(0.5 * z + w[z])

    assert_unbiased(Problem(loss), estimator=estimator)


def test_clipping_is_the_formula_and_labelled() -> None:
    """The memory's share of the gradient is raised to the least weight, that of the rest lowered: a known bias."""
    model, clip = Pair(), 0.6
    estimator = Mapo(samples=1, memory=1, clip=clip)
    assert not estimator.unbiased and Mapo().unbiased
    compiled = with_memory(model, estimator, [[1, 0]], *ZERO)
    value, grads = expected_estimate(compiled, captured(model).tensors, *ZERO)
    p, cost = Bernoulli(logits=model.w[0]).probs, {}
    table: dict[tuple[int, int], Tensor] = {}
    for z in (0, 1):
        q = Bernoulli(logits=model.w[1] + z).probs
        for y in (0, 1):
            table[z, y] = (p if z else 1 - p) * (q if y else 1 - q)
            first, last = 2 * (z - 0.3) ** 2, torch.exp(0.5 * torch.tensor(y + 2.0 * z, dtype=torch.float64))
            cost[z, y] = (first + last, last)
    kept = table[1, 0].detach()
    assert kept < clip
    share = {zy: clip / kept if zy == (1, 0) else (1 - clip) / (1 - kept) for zy in table}
    base = [c.detach() if isinstance(c, Tensor) else c for c in cost[1, 0]]
    expected = torch.zeros(2, dtype=torch.float64)
    for (z, y), joint in table.items():
        scores = [Bernoulli(logits=model.w[0]).log_prob(torch.tensor(float(z), dtype=torch.float64))]
        scores += [Bernoulli(logits=model.w[1] + z).log_prob(torch.tensor(float(y), dtype=torch.float64))]
        for score, c, b in zip(scores, cost[z, y], base, strict=True):
            (slope,) = torch.autograd.grad(score, model.w, retain_graph=True)
            expected += (share[z, y] * joint * (c - b)).detach() * slope
    torch.testing.assert_close(grads["w"], expected)
    torch.testing.assert_close(value, exact(model, *ZERO)[0])  # the value is not clipped
    with pytest.raises(scg.EstimatorError, match="'mapo' is biased"):
        scg.compile(model, estimator=estimator, allow_biased=False, example_inputs=ZERO)


def test_it_remembers_the_best_outcomes_once_each() -> None:
    torch.manual_seed(0)
    model = Tour(4)
    compiled = scg.compile(model, estimators={"z*": "mapo"})
    for _ in range(30):
        compiled()
    memory = memory_of(compiled)
    assert memory.outcomes.shape == (4, 4) and memory.filled.all()
    tours = {tuple(row) for row in memory.outcomes.tolist()}
    assert len(tours) == 4 and all(sorted(tour) == [0, 1, 2, 3] for tour in tours)
    assert memory.costs.diff().min() >= 0
    before = memory.outcomes.clone()
    compiled.eval()
    compiled()
    assert torch.equal(before, memory.outcomes)
    compiled.train()
    with compiled.frozen():
        compiled()
    assert torch.equal(before, memory.outcomes)


def test_exploring_finds_every_outcome() -> None:
    """A policy that never draws the best outcome by itself: looking where it has not been does."""
    torch.manual_seed(0)
    w = nn.Parameter(torch.tensor([[9.0, 0.0, -9.0]] * 2))

    def loss() -> Tensor:
        z = Categorical(logits=w[0]).sample()
        z_1 = Categorical(logits=w[1] + 0 * z).sample()
        return -1.0 * ((z == 2) & (z_1 == 2)) + 0.1 * z

    compiled = scg.compile(loss, estimator=Mapo(samples=1, memory=2, explore=1))
    for _ in range(9):
        compiled()
    memory = memory_of(compiled)
    assert memory.outcomes[0].tolist() == [2, 2] and abs(float(memory.costs[0]) + 0.8) < 1e-6
    (grad,) = torch.autograd.grad(compiled(), w)
    assert grad.isfinite().all()


def test_the_memory_is_saved() -> None:
    model = Tour(4)
    first, second = (scg.compile(model, estimators={"z*": "mapo"}) for _ in range(2))
    for _ in range(5):
        first()
    state = first.state_dict()
    assert any(key.endswith("outcomes") for key in state)
    second.load_state_dict(state)
    second.eval()
    second()
    assert torch.equal(memory_of(first).outcomes, memory_of(second).outcomes)


def test_a_batch_shares_its_memory() -> None:
    """Its elements run over the data; those of a parameter have one each."""
    w = nn.Parameter(torch.zeros(3, 2))

    def loss(x: Tensor) -> Tensor:
        z = Categorical(logits=w[0] * x[:, None]).sample()
        y = Categorical(logits=w).sample()
        return (z - x).square().mean() + (y - 0.4).square().mean()

    compiled = scg.compile(loss, estimators={"z": Mapo(memory=1), "y": Mapo(memory=1)})
    compiled(torch.tensor([0.3, 1.2, 0.1, 0.8]))
    shapes = {name: module.outcomes.shape for name, module in compiled.estimators.items()}
    assert shapes == {"z": (1, 1, 1), "y": (3, 1, 1)}


def test_settings_are_checked() -> None:
    with pytest.raises(ValueError, match="memory=0 must be at least 1"):
        Mapo(memory=0)


def test_a_constant_added_to_a_cost_changes_nothing() -> None:
    """As soon as something is remembered: the baseline is its cost."""
    model = Pair()
    compiled = with_memory(model, Mapo(samples=1, memory=1), [[1, 0]], *ZERO)
    plain, shifted = (moments(compiled, {"w": model.w}, ZERO[0] + offset)["w"] for offset in (0.0, 100.0))
    torch.testing.assert_close(plain, shifted, rtol=1e-7, atol=1e-9)

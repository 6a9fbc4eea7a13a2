"""Sequences of sites in one set: stochastic beam search, exact over its draws, and exact when the set is everything."""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli, Categorical, OneHotCategorical

import scg
from scg.estimators.sequences import IMPOSSIBLE, BeamSearch, gumbel, with_maximum
from scg.estimators.subsets import WithoutReplacementEstimator
from scg.estimators.sum_and_sample import SumAndSample
from scg.estimators.unordered_set import UnorderedSet, set_weights
from scg.estimators.without_replacement import WithoutReplacement
from tests.estimators.finite_noise import FiniteUnorderedSet, FiniteWithoutReplacement, moments
from tests.estimators.mixes import categorical_chain
from tests.law2 import assert_unbiased
from tests.problems import PROBLEMS, Problem


def sets(k: int) -> FiniteUnorderedSet:
    return FiniteUnorderedSet(samples=k, sequence=True)


def _vector(*values: float) -> nn.Parameter:
    return nn.Parameter(torch.tensor(values, dtype=torch.float64))


def _matrix(*shape: int) -> nn.Parameter:
    values = torch.arange(math.prod(shape), dtype=torch.float64)
    return nn.Parameter((1.7 * values).sin().reshape(shape))


# -- programs ---------------------------------------------------------------------------------------------------------
class Pair(nn.Module):
    """Two bits, the second below the first, a cost of the first alone."""

    def __init__(self) -> None:
        super().__init__()
        self.w = _vector(0.4, -0.9)

    def forward(self, offset: Tensor) -> Tensor:
        z = Bernoulli(logits=self.w[0]).sample()
        first = (z - 0.3) ** 2
        z = Bernoulli(logits=self.w[1] + z).sample() + 2 * z
        return 2 * first + torch.exp(0.5 * z) + offset


class EndOfSequence(nn.Module):
    """Tokens until the first 0: a finished sequence has one way on, and costs no more."""

    def __init__(self, steps: int = 3) -> None:
        super().__init__()
        self.table, self.steps = _matrix(steps, 2), steps

    def forward(self) -> Tensor:
        loss, open_ = torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.bool)
        for t in range(self.steps):
            stay = torch.tensor([0.0, -math.inf], dtype=torch.float64)
            z = Categorical(logits=torch.where(open_, self.table[t], stay)).sample()
            loss = loss + torch.where(open_, (z + 0.5 - t) ** 2, 0.0)
            open_ = open_ & (z == 1)
        return loss


class Batch(nn.Module):
    """A batch of pairs, a cost each."""

    def __init__(self, size: int = 2) -> None:
        super().__init__()
        self.w = _matrix(size, 2)

    def forward(self) -> Tensor:
        z = Bernoulli(logits=self.w[:, 0]).sample()
        early = (z - 0.3) ** 2
        y = Bernoulli(logits=self.w[:, 1] - z).sample()
        return (torch.exp(z * y - 0.2 * y) + early).mean()


class Transposed(nn.Module):
    """The second site has the dims of the first the other way round; some elements meet in stacked costs."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.v = _matrix(2, 2), _matrix(2, 2)

    def forward(self) -> Tensor:
        z = Bernoulli(logits=self.w).sample()
        y = Bernoulli(logits=self.v + z.T).sample()
        both = torch.cat([(y.T - 0.3 * z).flatten(), (z + 0.2).flatten()])
        return both.square().sum() + torch.exp(z * y.T).sum()


class Mixed(nn.Module):
    """A batch that a cost joins: one sequence of all its elements."""

    def __init__(self) -> None:
        super().__init__()
        self.w = _matrix(2, 2)

    def forward(self) -> Tensor:
        z = Bernoulli(logits=self.w[:, 0]).sample()
        y = Bernoulli(logits=self.w[:, 1] + z).sample()
        return (z.mean() - y.mean() + 0.3) ** 2 + torch.exp(z).sum()


class Words(nn.Module):
    """Different supports, shapes and event dims in one sequence; the vector's elements meet."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = _matrix(2), _matrix(2, 3), _matrix(3, 2)

    def forward(self) -> Tensor:
        z = OneHotCategorical(logits=self.a.expand(2, 2)).sample()  # [2 | 2]
        x = Categorical(logits=z @ self.b).sample()  # [2]
        y = Bernoulli(logits=self.c[x]).sample()  # [2, 2]
        return ((y.sum(-1) - 0.4) ** 2 * (z[:, 0] + 0.2) + torch.exp(0.3 * x)).sum()


class Between(nn.Module):
    """A site of another estimator between two of the sequence, and one beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.w = _vector(0.4, -0.9, 0.7, 1.1)

    def forward(self) -> Tensor:
        z = Bernoulli(logits=self.w[0]).sample()
        x = Bernoulli(logits=self.w[1] + z).sample()
        y = Bernoulli(logits=self.w[2] - z).sample()
        z_1 = Bernoulli(logits=self.w[3] * (x - 0.4)).sample()
        return torch.exp(z_1 - 0.5 * x) * (1 + z) + (y - z_1) ** 2


class Around(nn.Module):
    """A site above the sequence and one below it."""

    def __init__(self) -> None:
        super().__init__()
        self.w = _vector(0.4, -0.9, 0.7, 1.1)

    def forward(self) -> Tensor:
        x = Bernoulli(logits=self.w[0]).sample()
        z = Bernoulli(logits=self.w[1] + x).sample()
        z_1 = Bernoulli(logits=self.w[2] * (z - 0.4) + x).sample()
        y = Bernoulli(logits=self.w[3] - z + z_1).sample()
        return torch.exp(z_1 - 0.5 * y) * (1 + z) + (y - x) ** 2


# -- exact when the set is everything ---------------------------------------------------------------------------------
WHOLE: dict[str, tuple[Callable[[], Any], int]] = {
    "pair": (lambda: Pair(), 4),
    "end_of_sequence": (lambda: EndOfSequence(), 4),
    "categorical_chain": (lambda: categorical_chain().model, 9),
    "batch": (lambda: Batch(3), 4),
    "transposed": (lambda: Transposed(), 4),
    "mixed": (lambda: Mixed(), 16),
    "words": (lambda: Words(), 24),
}


def _whole() -> list[Any]:
    cases = []
    for name, kind in itertools.product(WHOLE, (UnorderedSet, WithoutReplacement)):
        few = WHOLE[name][1] <= 12
        if few or kind is WithoutReplacement:
            marks = [pytest.mark.slow] if few and kind is WithoutReplacement else []
            cases.append(pytest.param(name, kind, marks=marks, id=f"{name}-{kind.name}"))
    return cases


@pytest.mark.parametrize(("name", "kind"), _whole())
def test_the_whole_tree_is_exact(name: str, kind: type[WithoutReplacementEstimator]) -> None:
    """Layout, gathering, weights: value and gradient are those of the enumeration, whatever is drawn."""
    make, outcomes = WHOLE[name]
    model = make()
    args = (torch.tensor(0.0),) if name == "pair" else ()
    compiled = scg.compile(model, estimator=kind(samples=outcomes, sequence=True))
    expected = scg.exact(model, *args)
    for seed in range(2):
        torch.manual_seed(seed)
        objective = compiled(*args)
        grads = torch.autograd.grad(objective, list(model.parameters()))
        found = objective.detach(), dict(zip(expected[1], grads, strict=True))
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)


def test_rows_beyond_the_sequences_weigh_nothing() -> None:
    """Four sequences end in three steps, of eight paths: seven rows hold each of them once."""
    model = EndOfSequence()
    compiled = scg.compile(model, estimator=WithoutReplacement(samples=7, sequence=True))
    objective = compiled()
    (grad,) = torch.autograd.grad(objective, model.table)
    torch.testing.assert_close((objective.detach(), {"table": grad}), scg.exact(model))


# -- exact over all draws ---------------------------------------------------------------------------------------------
ZERO = (torch.tensor(0.0, dtype=torch.float64),)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_unbiased_in_a_pair(k: int) -> None:
    assert_unbiased(Problem(Pair(), (ZERO,)), estimator=sets(k))


@pytest.mark.parametrize("nodes, k", [(20, 1), pytest.param(48, 2, marks=pytest.mark.slow)])
def test_importance_weights_are_unbiased(nodes: int, k: int) -> None:
    estimator = FiniteWithoutReplacement(samples=k, sequence=True, nodes=nodes)
    assert_unbiased(Problem(Pair(), (ZERO,)), estimator=estimator)


@pytest.mark.parametrize("k", [2, 3])
def test_end_of_sequence(k: int) -> None:
    """A finished sequence does not branch and is not counted twice: among its children one is possible."""
    assert_unbiased(Problem(EndOfSequence()), estimator=sets(k))


@pytest.mark.parametrize("k", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_unbiased_in_categorical_chain(k: int) -> None:
    assert_unbiased(categorical_chain(), estimator=sets(k))


@pytest.mark.slow
@pytest.mark.parametrize("model", [Batch, Mixed, Words])
def test_unbiased_with_batches(model: type[nn.Module]) -> None:
    assert_unbiased(Problem(model()), estimator=sets(2 if model is not Words else 1))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["chain", "shared_logits", "unrolled_loop"])
def test_unbiased_in_programs(name: str) -> None:
    problem = PROBLEMS[name]()
    assert_unbiased(problem, estimator=sets(2))


@pytest.mark.parametrize(
    "others",
    [
        {"x": "score_function", "y": "score_function"},
        pytest.param({"x": "score_function", "y": "enumerate"}, marks=pytest.mark.slow),
        pytest.param({"x": "score_function", "y": FiniteUnorderedSet(samples=2)}, marks=pytest.mark.slow),
    ],
    ids=["score_function", "enumerate", "unordered_set"],
)
def test_unbiased_with_a_site_between(others: dict[str, Any]) -> None:
    """Children of one row share what was drawn below it; its score has the weights of those rows."""
    assert_unbiased(Problem(Between()), estimators={"z*": sets(2), **others})


@pytest.mark.parametrize(
    "others",
    [
        {"x": "enumerate", "y": "enumerate"},
        pytest.param({"x": "score_function", "y": "score_function"}, marks=pytest.mark.slow),
        pytest.param({"x": FiniteUnorderedSet(samples=2), "y": "local_expectation"}, marks=pytest.mark.slow),
    ],
    ids=["enumerate", "score_function", "unordered_set"],
)
def test_unbiased_with_sites_around(others: dict[str, Any]) -> None:
    assert_unbiased(Problem(Around()), estimators={"z*": sets(2), **others})


@pytest.mark.slow
def test_unbiased_with_two_draws_of_the_program() -> None:
    assert_unbiased(Problem(Pair(), (ZERO,)), estimator=sets(2), samples=2)


@pytest.mark.slow
@pytest.mark.parametrize("credit", ["node", "none"])
def test_coarse_credit_joins_the_sequences(credit: str) -> None:
    assert_unbiased(Problem(Batch()), estimator=sets(1), credit=credit)


def test_two_sequences_in_one_program() -> None:
    model = Around()
    compiled = scg.compile(model, estimators={"[xz]": sets(4), "*": FiniteUnorderedSet(samples=4, sequence=True)})
    assert {node.sequence for node in compiled_sites(compiled)} == {"x", "z_1"}
    objective = compiled()
    (grad,) = torch.autograd.grad(objective, model.w)
    torch.testing.assert_close((objective.detach(), {"w": grad}), scg.exact(model))


def compiled_sites(compiled: Any) -> list[Any]:
    compiled()
    return [compiled.graph[name] for name in compiled.graph.sites]


# -- the faults -------------------------------------------------------------------------------------------------------
def test_a_constant_added_to_a_cost_changes_nothing() -> None:
    compiled = scg.compile(model := Pair(), estimator=sets(2))
    plain, shifted = (moments(compiled, {"w": model.w}, ZERO[0] + offset)["w"] for offset in (0.0, 100.0))
    torch.testing.assert_close(plain, shifted, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        (UnorderedSet, torch.float32),
        pytest.param(WithoutReplacement, torch.float32, marks=pytest.mark.slow),
        pytest.param(UnorderedSet, torch.bfloat16, marks=pytest.mark.slow),
    ],
)
def test_two_hundred_bits(kind: type[WithoutReplacementEstimator], dtype: torch.dtype) -> None:
    """One site of 200 elements that meet in a cost: probabilities of 2^-200 and less, weights that sum to one."""
    w = nn.Parameter(torch.linspace(-3, 3, 200).to(dtype))
    goal = torch.arange(200) % 2

    def loss() -> Tensor:
        z = Bernoulli(logits=w).sample()
        return (z - goal).float().square().sum().sqrt()

    compiled = scg.compile(loss, estimator=kind(samples=4, sequence=True))
    torch.manual_seed(0)
    objective = compiled()
    (grad,) = torch.autograd.grad(objective, w)
    assert objective.isfinite() and grad.isfinite().all() and grad.abs().max() > 0


def test_weights_of_improbable_sequences() -> None:
    """Exactly those of the ratios: four sequences of probability 2^-5000 each are a quarter apiece."""
    log_p = torch.full((4,), -5000 * math.log(2.0), dtype=torch.float64)
    weight, second = set_weights(log_p, torch.zeros((), dtype=torch.float64))
    torch.testing.assert_close(weight, torch.full_like(weight, 0.25))
    assert second.isfinite().all()


def test_bits_are_no_categories() -> None:
    """L bits are a sequence of L, not one site of L categories: all 2^L outcomes can be met."""
    w = nn.Parameter(torch.zeros(3, dtype=torch.float64))

    def loss() -> Tensor:
        z = Bernoulli(logits=w).sample()
        return torch.exp(z @ torch.tensor([0.3, -0.8, 0.5], dtype=torch.float64))

    compiled = scg.compile(loss, estimator=UnorderedSet(samples=8, sequence=True))
    objective = compiled()
    (grad,) = torch.autograd.grad(objective, w)
    torch.testing.assert_close((objective.detach(), {"w": grad}), scg.exact(loss))


@pytest.mark.slow
def test_long_chains_need_no_recursion() -> None:
    """As deep for 24 sites as for 6."""
    w = nn.Parameter(torch.tensor(0.3))

    def depth(steps: int) -> int:
        deepest, level = 0, 0

        def watch(frame: Any, event: str, arg: Any) -> None:
            nonlocal deepest, level
            level += (event == "call") - (event == "return")
            deepest = max(deepest, level)

        def loss() -> Tensor:
            z = torch.zeros(())
            total = torch.zeros(())
            for _ in range(steps):
                z = Bernoulli(logits=w + z).sample()
                total = total + (z - 0.4) ** 2
            return total

        compiled = scg.compile(loss, estimator=WithoutReplacement(samples=2, sequence=True))
        sys.setprofile(watch)
        try:
            compiled()
        finally:
            sys.setprofile(None)
        return deepest

    depth(2)  # what is made once
    short = depth(6)
    assert depth(24) <= short + 5


def test_sum_and_sample_below_a_site() -> None:
    """Partial sums in a conditional sequence: the mass that is summed is that of the row above."""
    for mix in ({"*": SumAndSample()}, {"top": SumAndSample(top=2), "bottom": SumAndSample()}):
        assert_unbiased(categorical_chain(), estimators=mix)


# -- five cities ------------------------------------------------------------------------------------------------------
class Tour(nn.Module):
    """Plackett-Luce over tours: the next city in proportion to its score, among those not visited."""

    def __init__(self, cities: int = 5) -> None:
        super().__init__()
        self.cities, self.score = cities, _matrix(cities, cities)
        angle = torch.arange(cities, dtype=torch.float64) * 2.4
        self.place = torch.stack([angle.cos() * (1 + 0.1 * angle), angle.sin()], -1)

    def forward(self) -> Tensor:
        visited = torch.zeros(self.cities, dtype=torch.bool)
        at, length = torch.zeros((), dtype=torch.long), torch.zeros((), dtype=torch.float64)
        start = at
        for step in range(self.cities):
            logits = torch.where(visited, -math.inf, self.score[at])
            z = Categorical(logits=logits).sample()
            visited = visited | (torch.arange(self.cities) == z)
            length = length + ((self.place[z] - self.place[at]).square().sum() if step else 0.0)
            start, at = (z if step == 0 else start), z
        return length + (self.place[at] - self.place[start]).square().sum()


def test_all_tours_of_five_cities() -> None:
    model = Tour()
    compiled = scg.compile(model, estimators={"z*": WithoutReplacement(samples=120, sequence=True)})
    objective = compiled()
    (grad,) = torch.autograd.grad(objective, model.score)
    torch.testing.assert_close((objective.detach(), {"score": grad}), scg.exact(model), rtol=1e-9, atol=1e-10)


@pytest.mark.slow
def test_tours_of_three_cities_are_unbiased() -> None:
    assert_unbiased(Problem(Tour(3)), estimators={"z*": sets(2)})


@pytest.mark.slow
@pytest.mark.parametrize("kind", [UnorderedSet, WithoutReplacement])
def test_sets_of_tours_have_the_exact_mean(kind: type[WithoutReplacementEstimator]) -> None:
    torch.manual_seed(0)
    model = Tour()
    compiled = scg.compile(model, estimators={"z*": kind(samples=6, sequence=True)})
    found = scg.gradient_samples(compiled, n=400)["score"]
    z = (found.mean(0) - scg.exact(model)[1]["score"]) / (found.std(0) / math.sqrt(len(found))).clamp_min(1e-12)
    assert z.abs().max() < 5


# -- the search -------------------------------------------------------------------------------------------------------
def test_a_beam_finishes_as_a_race_over_all_sequences_would() -> None:
    """Two levels of two: the order of the first two leaves is that of draws without replacement."""
    torch.manual_seed(0)
    n = 100_000
    top, below = torch.tensor([0.3, 0.7]), torch.tensor([[0.9, 0.1], [0.2, 0.8]])
    search = BeamSearch()
    first = top.double().log().expand(n, 1, 2)
    beam, place = search.extend(None, first, 2)
    second = below.double().log()[place]  # [n, 2, 2]
    beam, child = search.extend(beam, second, 2)
    leaf = place.gather(-1, child // 2) * 2 + child % 2
    p = (top[:, None] * below).flatten().double()
    for a, b in itertools.permutations(range(4), 2):
        expected = float(p[a] * p[b] / (1 - p[a]))
        seen = float(((leaf[:, 0] == a) & (leaf[:, 1] == b)).double().mean())
        assert abs(seen - expected) < 5 * math.sqrt(expected / n)
    torch.testing.assert_close(beam.log_p, p.log()[leaf])
    torch.testing.assert_close(beam.rest.exp() + beam.log_p.exp().sum(-1), torch.ones(n, dtype=torch.float64))


def test_gumbels_given_their_maximum() -> None:
    torch.manual_seed(0)
    log_p = torch.tensor([0.0, -3.0, IMPOSSIBLE])
    found = with_maximum(log_p + gumbel(log_p.expand(10_000, 3)), torch.full((10_000, 1), 1.7))
    assert (found.amax(-1) == 1.7).all() and found.isfinite().all() and (found[:, 2] < -9e5).all()


# -- what does not fit ------------------------------------------------------------------------------------------------
def test_refusals_say_why_and_where() -> None:
    def refused(model: Any, match: str, **estimators: Any) -> None:
        with pytest.raises(scg.EstimatorError, match=match):
            scg.compile(model, estimators=estimators, example_inputs=())

    refused(
        Between(), r"%x .*between %z and %z_1, has rows of its own \('enumerate'\)", **{"z*": sets(2), "x": "enumerate"}
    )
    refused(
        Around(),
        r"%z .*which cannot be drawn once more, .*: %x \('local_expectation'\)",
        **{"z*": sets(2), "x": "local_expectation"},
    )
    refused(Tour(2), "5 distinct outcomes were asked for, and %z, %z_1 have 4 together", **{"z*": sets(5)})

    w = _vector(0.3, 0.4)

    def later() -> Tensor:
        z = Bernoulli(logits=w[0]).sample()
        x = Bernoulli(logits=w[1]).sample()
        z_1 = Bernoulli(logits=w[0] + x).sample()
        return torch.exp(z_1 - z) * (x + 1)

    refused(later, "has a row for each outcome of %x, which %z", **{"z*": sets(2), "x": "enumerate"})

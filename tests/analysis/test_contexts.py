"""Sufficient contexts against d-separation by its definition: every trail of a small graph is walked."""

from __future__ import annotations

import itertools
import random
from collections.abc import Collection, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli, Normal

import scg
from scg.analysis.contexts import RandomValues, contexts_of
from scg.errors import EstimatorError
from scg.estimators.learned import Learned
from scg.estimators.score_function import ScoreFunction

Edges = set[tuple[str, str]]


def _separated(edges: Edges, one: Collection[str], other: Collection[str], given: Collection[str]) -> bool:
    """Pearl's definition: no trail from one to the other is active given the third."""
    children: dict[str, set[str]] = {}
    for a, b in edges:
        children.setdefault(a, set()).add(b)

    def below(name: str) -> set[str]:
        return {name}.union(*(below(child) for child in children.get(name, ())))

    opened = {name for edge in edges for name in edge if below(name) & set(given)}

    def active(trail: list[str]) -> bool:
        for a, b, c in zip(trail, trail[1:], trail[2:], strict=False):
            collider = (a, b) in edges and (c, b) in edges
            if (b not in opened) if collider else (b in given):
                return False
        return True

    def trails(trail: list[str]) -> Iterator[list[str]]:
        if trail[-1] in other:
            yield trail
            return
        for a, b in edges:
            step = b if a == trail[-1] else a if b == trail[-1] else None
            if step is not None and step not in trail and active([*trail, step]):
                yield from trails([*trail, step])

    return not any(True for start in one if start not in given for _ in trails([start]))


def _random_graph(seed: int) -> tuple[RandomValues, Edges]:
    chance = random.Random(seed)
    names = [f"z{i}" for i in range(chance.randint(2, 5))]
    density = chance.uniform(0.2, 0.8)
    parents = {n: frozenset(m for m in names[:i] if chance.random() < density) for i, n in enumerate(names)}
    costs = {f"c{i}": frozenset(m for m in names if chance.random() < 0.4) for i in range(chance.randint(1, 2))}
    edges = {(parent, name) for name, above in parents.items() for parent in above}
    edges |= {(parent, f"cost: {cost}") for cost, above in costs.items() for parent in above}
    return RandomValues(parents, costs), edges


def _subsets(names: Collection[str]) -> Iterator[set[str]]:
    for size in range(len(names) + 1):
        yield from map(set, itertools.combinations(names, size))


@pytest.mark.parametrize("block", range(4))
def test_contexts_equal_brute_force_d_separation(block: int) -> None:
    """200 random graphs: the sets are sufficient, least, and unique; the smallest critic is legal and minimal."""
    for seed in range(50 * block, 50 * (block + 1)):
        values, edges = _random_graph(seed)
        site = random.Random(seed).choice(list(values.parents))
        below = {name for name in values.parents if _reaches(edges, site, name)}
        costs = [cost for cost in values.costs if _reaches(edges, site, f"cost: {cost}")]
        found = contexts_of(values, site, costs)
        assert set(found.allowed) == set(values.parents) - below
        ends = {f"cost: {cost}" for cost in costs}
        enough = [s for s in _subsets(found.allowed) if _separated(edges, set(found.allowed) - s, ends, s)]
        least = [s for s in enough if not any(t < s for t in enough)]
        assert least == [set(found.baseline)], (seed, site)
        assert all(found.suffices(s) == (s in enough) for s in _subsets(found.allowed))
        enough = [s | {site} for s in _subsets(found.allowed)]
        enough = [s for s in enough if _separated(edges, set(found.allowed) - s, ends, s)]
        assert [s for s in enough if not any(t < s for t in enough)] == [set(found.critic)], (seed, site)
        scored = edges | {(name, "score") for name in (site, *values.parents[site])}
        legal = [s | {site} for s in _subsets(set(values.parents) - {site})]
        legal = [s for s in legal if _separated(scored, {"score"}, ends, s)]
        assert all(found.allows_critic(s) == (s in legal) for s in _subsets(values.parents))
        smallest = set(found.smallest_critic)
        assert smallest in legal and not any(smallest - {name} in legal for name in smallest - {site})
        assert set(found.critic) in legal, (seed, site)


@pytest.mark.parametrize("block", range(4))
def test_markov_equals_brute_force_d_separation(block: int) -> None:
    """200 random graphs: may a prediction from these values stand for those costs in a target of the site?"""
    answers = []
    for seed in range(50 * block, 50 * (block + 1)):
        values, edges = _random_graph(seed)
        site = random.Random(seed).choice(list(values.parents))
        costs = [cost for cost in values.costs if _reaches(edges, site, f"cost: {cost}")]
        found = contexts_of(values, site, costs)
        for some in _subsets(costs):
            ends = {f"cost: {cost}" for cost in some}
            for later in _subsets(values.parents):
                expected = _separated(edges, set(found.baseline) - later, ends, later)
                assert found.markov(later, some) == expected, (seed, site, later, some)
                if some and not set(found.baseline) <= later:
                    answers.append(expected)
    assert any(answers) and not all(answers)


def _reaches(edges: Edges, start: str, end: str) -> bool:
    return start == end or any(_reaches(edges, b, end) for a, b in edges if a == start)


class _Program(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([0.3, -0.2, 0.5, 0.1]))

    def forward(self, x: Tensor) -> Tensor:
        noise = torch.randn(())
        a = Bernoulli(logits=self.w[0] * x).sample()
        b = Bernoulli(logits=self.w[1] + a).sample()
        c = Bernoulli(logits=self.w[2] + b).sample()
        d = Bernoulli(logits=self.w[3] + 0 * c).sample()
        return scg.cost(a * x, "early") + scg.cost((c - noise) ** 2 + d, "late")


def test_of_a_program() -> None:
    compiled = scg.compile(_Program(), estimator="score_function", example_inputs=(torch.tensor(1.0),))
    found = compiled.graph.context("b")
    assert {compiled.graph.costs[cost].label for cost in found.costs} == {"late"}  # the early cost is upstream
    assert set(found.allowed) == {"x", "a", "randn"}
    assert set(found.baseline) == {"a", "randn"}
    assert set(found.critic) == {"b", "randn"}
    assert found.smallest_critic == ("b",)
    assert found.allows_baseline({"x", "a"}) and not found.allows_baseline({"c"})
    assert "baseline {randn, a}; critic {randn, b}" in str(compiled.explain())
    assert compiled.graph.context("d").critic == ("d",) and compiled.graph.context("d").baseline == ("c",)


def test_before_the_passes_named_costs_count_whole() -> None:
    assert set(scg.trace(_Program(), torch.tensor(1.0)).context("d").baseline) == {"randn", "c"}


def test_a_baseline_of_a_descendant_is_refused_with_the_path() -> None:
    estimator = ScoreFunction(baseline=Learned(nn.Identity(), inputs=("c",)))
    with pytest.raises(EstimatorError, match=r"reads %c, which depends on the draw \(%a -> .*%b -> .*%c\)"):
        scg.compile(_Program(), estimators={"a": estimator}, example_inputs=(torch.tensor(1.0),))


class _Replayed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(1, 1)

    def forward(self, state: Tensor, action: Tensor, reward: Tensor) -> Tensor:
        z = scg.sample(Normal(self.net(state)[:, 0], 1.0), "z", value=action)
        return -scg.depends(reward, on=z, dims=("tied",)).mean()


def test_a_replayed_site_knows_what_its_parameters_are_computed_from() -> None:
    graph = scg.compile(_Replayed(), example_inputs=(torch.ones(3, 1), torch.ones(3), torch.ones(3))).graph
    assert graph.context("z").allowed == ("state",)
    assert graph.context("z").baseline == ("state",) and not graph.context("z").allows_baseline({"reward"})


class _Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(1, 1)

    def forward(self, tokens: Tensor, reward: Tensor) -> Tensor:
        z = scg.sample(Normal(self.net(tokens[:, :-1, None])[..., 0], 1.0), "z", value=tokens[:, 1:])
        return -scg.depends(reward, on=z, dims=("tied",)).mean()


def test_a_baseline_may_not_read_the_tensor_that_holds_the_outcome() -> None:
    class Sum(nn.Module):
        def forward(self, tokens: Tensor) -> Tensor:
            return tokens[:, 1:]

    estimator = ScoreFunction(baseline=Learned(Sum(), inputs=("tokens",)))
    with pytest.raises(EstimatorError, match="holds the outcome"):
        scg.compile(_Tokens(), estimator=estimator, example_inputs=(torch.ones(3, 4), torch.ones(3)))

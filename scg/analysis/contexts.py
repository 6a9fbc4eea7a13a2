"""Sufficient contexts: what a baseline may read, and what a baseline or a critic needs to read.

On the graph of random values (sites, inputs, noise) and costs, for a site ``v`` with the credited costs ``L``:

* a baseline may read what ``v`` does not influence;
* it needs no more of that than ``B``, the least set with ``L _||_ rest | B``;
* a critic needs ``v`` and no more than ``C``, the least set with ``v in C`` and ``L _||_ rest | C``;
* a critic may leave out even more, as long as ``score_v _||_ L | C``.

Weber et al. 2019. Independence is d-separation. Elements of one site count as one value.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from scg.ir import Cost, Graph, Input, Node, Op, Opaque, Sample
from scg.operations import is_random

if TYPE_CHECKING:
    import networkx

_SCORE = "score of the site"
_COST = "cost: "


@dataclass(frozen=True)
class RandomValues:
    """The directed graph of random values: each with the ones that its law is a function of."""

    parents: Mapping[str, frozenset[str]]
    """In topological order."""
    costs: Mapping[str, frozenset[str]]
    """For each cost, the random values it is a function of."""
    replayed: Mapping[str, tuple[frozenset[str], frozenset[str]]] = field(default_factory=dict)
    """For each replayed site, what is known to come before it, and the values that hold its outcome."""

    @cached_property
    def network(self) -> networkx.DiGraph:
        """Random values and, as sinks called ``cost: …``, the costs."""
        import networkx

        found = networkx.DiGraph()
        found.add_nodes_from(self.parents)
        for name, above in self.parents.items():
            found.add_edges_from((parent, name) for parent in above)
        for cost, above in self.costs.items():
            found.add_node(_COST + cost)
            found.add_edges_from((parent, _COST + cost) for parent in above)
        return found

    def below(self, site: str) -> frozenset[str]:
        """The values that ``site`` influences, itself included."""
        import networkx

        return frozenset(networkx.descendants(self.network, site) & set(self.parents)) | {site}


@dataclass(frozen=True)
class SiteContexts:
    """The answer of `Graph.context`: all names are those of sites, inputs and noise."""

    site: str
    costs: tuple[str, ...]
    """The costs credited to the site."""
    allowed: tuple[str, ...]
    """What a baseline may read: values that the site does not influence."""
    baseline: tuple[str, ...]
    """The least of them that a baseline needs: given these, the rest says nothing about the cost-to-go."""
    critic: tuple[str, ...]
    """The least that a critic needs to know the cost-to-go as well as all of `allowed` and the site could."""
    values: RandomValues = field(repr=False, compare=False)

    @cached_property
    def smallest_critic(self) -> tuple[str, ...]:
        """A smallest set (nothing can be left out) that a critic may read without bias."""
        found = _smallest_critic(self.values, self.site, self._ends, list(self.allowed))
        return tuple(sorted(found, key=list(self.values.parents).index))

    def allows_baseline(self, names: Iterable[str]) -> bool:
        """May a baseline read these?"""
        return set(names) <= set(self.allowed)

    def suffices(self, names: Collection[str]) -> bool:
        """Does the rest of `allowed` say nothing more about the cost-to-go once ``names`` are known?"""
        rest = [name for name in self.allowed if name not in names]
        return _separated(self.values.network, rest, self._ends, names)

    def allows_critic(self, names: Collection[str]) -> bool:
        """May the cost-to-go be replaced by its expectation given these, for this site's score?"""
        if self.site not in names:
            return False
        network = self.values.network.copy()
        network.add_edges_from((parent, _SCORE) for parent in (self.site, *self.values.parents[self.site]))
        return _separated(network, [_SCORE], self._ends, names)

    def markov(self, later: Collection[str], costs: Collection[str]) -> bool:
        """Does a prediction from ``later`` of these costs say all that the site's baseline context knows of them?

        Then an expectation given ``later`` may stand for the costs in a target (Weber et al. 2019).
        """
        rest = [name for name in self.baseline if name not in later]
        return _separated(self.values.network, rest, [_COST + cost for cost in costs], later)

    @property
    def _ends(self) -> list[str]:
        return [_COST + cost for cost in self.costs]

    def __str__(self) -> str:
        return f"baseline {_text(self.baseline)}; critic {_text(self.critic)}"


def _text(names: tuple[str, ...]) -> str:
    return "{" + ", ".join(names) + "}"


def contexts(graph: Graph, site: str, values: RandomValues | None = None) -> SiteContexts:
    """The contexts of one site.

    Args:
        graph: with credit assigned; before that, the whole objective is the cost of every site.
        site: its name.
        values: of the graph, where they are known already.

    Raises:
        KeyError: for a name that is no site's.
    """
    node = graph[site]
    if not isinstance(node, Sample):
        raise KeyError(f"%{site} is no site; sites: {', '.join(graph.sites)}")
    values = values or random_values(graph)
    if graph.credit:
        costs = [cost for name, cost in graph.credit if name == site]
    else:
        costs = [cost for cost, above in values.costs.items() if above & values.below(site)]
    return contexts_of(values, site, costs)


def contexts_of(values: RandomValues, site: str, costs: Collection[str]) -> SiteContexts:
    """The contexts of ``site`` with the credited ``costs``."""

    below = values.below(site)
    allowed = [name for name in values.parents if name not in below]
    if site in values.replayed:
        above, outcome = values.replayed[site]
        allowed = [name for name in allowed if name in above and name not in outcome]
    ends = [_COST + cost for cost in costs]
    order = list(values.parents)
    return SiteContexts(
        site=site,
        costs=tuple(costs),
        allowed=tuple(allowed),
        baseline=_boundary(values.network, ends, allowed),
        critic=tuple(sorted({*_boundary(values.network, ends, [*allowed, site]), site}, key=order.index)),
        values=values,
    )


def _boundary(network: networkx.DiGraph, ends: list[str], given: list[str]) -> tuple[str, ...]:
    """Those of ``given`` that some active path from ``ends`` meets: the least set that separates the rest from them.

    d-separation has the intersection property, so that this set is unique. One walk ("Bayes ball", Shachter 1998).
    """
    import networkx

    known = set(given)
    seen_below = known.union(*(networkx.ancestors(network, name) for name in given))
    found: set[str] = set()
    visited: set[tuple[str, bool]] = set()
    stack = [(end, True) for end in ends]
    while stack:
        name, upwards = step = stack.pop()
        if step in visited:
            continue
        visited.add(step)
        if name in known:
            found.add(name)
        else:
            stack += [(child, False) for child in network.successors(name)]
        if name not in known if upwards else name in seen_below:  # from above: a collider
            stack += [(parent, True) for parent in network.predecessors(name)]
    return tuple(name for name in given if name in found)


def _smallest_critic(values: RandomValues, site: str, ends: list[str], allowed: list[str]) -> set[str]:
    import networkx

    if not ends:
        return {site}
    network = values.network.copy()
    network.add_edges_from((parent, _SCORE) for parent in (site, *values.parents[site]))
    found = networkx.find_minimal_d_separator(
        network, {_SCORE}, set(ends), included={site}, restricted={site, *allowed}
    )
    return {site, *values.parents[site]} if found is None else set(found)


def _separated(network: networkx.DiGraph, one: Collection[str], other: Collection[str], given: Collection[str]) -> bool:
    import networkx

    one, other = set(one) - set(given), set(other)
    return not one or not other or bool(networkx.is_d_separator(network, one, other, set(given)))


def random_values(graph: Graph) -> RandomValues:
    """The random values of a graph: inputs, sites, noise, and calls of stateful functions one after the other."""
    behind: dict[str, frozenset[str]] = {}
    parents: dict[str, frozenset[str]] = {}
    replayed: dict[str, tuple[frozenset[str], frozenset[str]]] = {}
    stateful: frozenset[str] = frozenset()
    for node in graph:
        refs = node.inputs
        if isinstance(node, Sample) and node.value is not None:
            refs = (node.dist,)
        above: frozenset[str] = frozenset().union(*(behind[ref] for ref in refs))
        if not _is_random(node):
            behind[node.name] = above
            continue
        if isinstance(node, Opaque):
            above, stateful = above | stateful, frozenset([node.name])
        if isinstance(node, Sample) and node.value is not None:
            replayed[node.name] = (_closure(parents, above), behind[node.value])
        parents[node.name] = above
        behind[node.name] = frozenset([node.name])
    named = {node.name: behind[node.name] for node in graph.of(Cost)}
    return RandomValues(parents, named or {graph.objective: behind[graph.objective]}, replayed)


def _is_random(node: Node) -> bool:
    if isinstance(node, (Input, Sample)):
        return True
    return (isinstance(node, Op) and is_random(node)) or (isinstance(node, Opaque) and not node.pure)


def _closure(parents: Mapping[str, frozenset[str]], names: frozenset[str]) -> frozenset[str]:
    found, stack = set(names), list(names)
    while stack:
        for parent in parents[stack.pop()]:
            if parent not in found:
                found.add(parent)
                stack.append(parent)
    return frozenset(found)

"""The frame of a sequence of sites: the element dims along which its rows are drawn apart.

z    [B]      z_1  [B, L]        a cost per example: each of the B examples has rows of its own, of 1 + L elements
z    [B]      z_1  [B, L]        a cost of the batch mean: one set of rows, of B + B L elements
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from scg.analysis.influence import Influence, Relation
from scg.analysis.rules import tight
from scg.errors import EstimatorError
from scg.estimators.base import EnumeratingEstimator
from scg.ir import Cost, Dist, Graph, Node, Sample


@dataclass(frozen=True)
class Frame:
    """One sequence: its sites, and where its frame lies in each."""

    sites: tuple[str, ...]
    """In program order; the first one names the sequence and its sample dim."""
    sizes: tuple[int, ...]
    """Of the dims of the frame."""
    dims: Mapping[str, tuple[int, ...]]
    """For each site, its element dims along the frame."""
    joined: Mapping[str, tuple[int, ...]]
    """For each site, its other element dims: their elements follow each other in the sequence."""
    lengths: Mapping[str, int]
    """For each site, how many joined elements it has."""

    @property
    def name(self) -> str:
        return self.sites[0]

    @property
    def last(self) -> str:
        return self.sites[-1]

    @property
    def length(self) -> int:
        """How many joined elements all sites have."""
        return sum(self.lengths.values())

    def offset(self, site: str) -> int:
        """How many joined elements the sites before ``site`` have."""
        before = self.sites[: self.sites.index(site)]
        return sum(self.lengths[name] for name in before)

    def relations(self, found: Influence, node: str) -> dict[str, Relation]:
        """How ``node`` (one tensor) depends on the sites."""
        pairs = ((site, found.relation(node, site)) for site in self.sites)
        return {site: relation for site, relation in pairs if relation is not None}

    def points(self, found: Influence, node: str) -> tuple[Tensor, ...]:
        """For each dim of the frame, the index that each element of ``node`` sees; zero, where it sees none.

        Each broadcasts to the shape of ``node``.
        """
        points = []
        for i in range(len(self.sizes)):
            sight: _Sight | None = None
            for site, relation in self.relations(found, node).items():
                sight = _look(sight, relation, self.dims[site][i])
                if sight is None:
                    raise EstimatorError(f"%{node} meets several sequences of %{self.name} in one element")
            assert sight is not None, f"%{node} does not depend on {self.sites}"
            points.append(sight.point)
        return tuple(points)


def frames(graph: Graph, found: Influence) -> dict[str, Frame]:
    """The sequences of a graph with estimators, by name."""
    groups: dict[str, list[Sample]] = {}
    for site in graph.of(Sample):
        if site.sequence:
            groups.setdefault(site.sequence, []).append(site)
    return {name: _frame(graph, found, sites) for name, sites in groups.items()}


def _frame(graph: Graph, found: Influence, sites: list[Sample]) -> Frame:
    free = {site.name: _separable(graph, site) for site in sites}
    nodes = list(_meeting_points(graph, found, sites)) if all(free.values()) else []
    dims: dict[str, list[int]] = {site.name: [] for site in sites}
    sizes = []
    for dim in free[sites[0].name]:
        size = sites[0].tensor.shape[dim]
        match = _match(graph, found, nodes, sites, {n: [d for d in free[n] if d not in dims[n]] for n in free}, dim)
        if match is not None:
            sizes.append(size)
            for name, d in match.items():
                dims[name].append(d)
    elements = {site.name: site.tensor.shape[: site.tensor.ndim - site.tensor.event_ndim] for site in sites}
    joined = {
        name: tuple(d for d, size in enumerate(shape) if size > 1 and d not in dims[name])
        for name, shape in elements.items()
    }
    return Frame(
        sites=tuple(site.name for site in sites),
        sizes=tuple(sizes),
        dims={name: tuple(chosen) for name, chosen in dims.items()},
        joined=joined,
        lengths={name: math.prod(elements[name][d] for d in joined[name]) for name in elements},
    )


def _match(
    graph: Graph, found: Influence, nodes: list[Node], sites: list[Sample], free: Mapping[str, list[int]], first: int
) -> dict[str, int] | None:
    """A dim of every site, ``first`` of the first one, such that no element of a node sees two indices along them."""
    if any(isinstance(node.type, tuple) for node in nodes):
        return None  # what its outputs see is not known
    size = sites[0].tensor.shape[first]
    match: dict[str, int] = {}
    sights: dict[str, _Sight] = {}
    for site in sites:
        candidates = [d for d in free[site.name] if site.tensor.shape[d] == size] if match else [first]
        for d in candidates:
            grown = _sights(found, nodes, sights, site.name, d)
            if grown is not None:
                match[site.name], sights = d, grown
                break
        else:
            return None
    for node in nodes:
        inner = isinstance(node, Sample) and not isinstance(node.estimator, EnumeratingEstimator)
        if inner and not bool(sights[node.name].seen.all()):
            return None  # elements that see no sequence could not say with which one they are weighted
    return match


def _separable(graph: Graph, site: Sample) -> list[int]:
    """Element dims that no credit mixes: coarse credit hands an element the costs of others too."""
    wide = [d for d in range(site.tensor.ndim - site.tensor.event_ndim) if site.tensor.shape[d] > 1]
    edges = [graph.credit.get((site.name, cost.name)) for cost in graph.of(Cost)]
    mixed = {d for edge in edges if edge is not None for d in wide if edge.mixed[d]}
    return [d for d in wide if d not in mixed]


def _meeting_points(graph: Graph, found: Influence, sites: list[Sample]) -> Iterator[Node]:
    """Costs and draws below the sequence, and values made between its sites that are read after a later one.

    The rows of the latter are rearranged: each of their elements must know which sequence it belongs to.
    """
    names = {site.name for site in sites}
    place = {node.name: i for i, node in enumerate(graph)}
    draws = [place[site.name] for site in sites]
    for node in graph:
        if node.name in graph.tail or isinstance(node, Dist) or not names & found.sites(node.name):
            continue
        last = max((len(place) if isinstance(graph[u], Dist) else place[u] for u in graph.users[node.name]), default=0)
        if isinstance(node, (Cost, Sample)) or any(place[node.name] < draw < last for draw in draws):
            yield node


@dataclass(frozen=True)
class _Sight:
    """Which index along one dim the elements of a node see, and which of them see any."""

    point: Tensor
    seen: Tensor


def _sights(
    found: Influence, nodes: list[Node], sights: Mapping[str, _Sight], site: str, dim: int
) -> dict[str, _Sight] | None:
    """``sights`` with what the nodes see of one more site; None where some element sees two indices."""
    grown = dict(sights)
    for node in nodes:
        relation = found.relation(node.name, site)
        if relation is not None:
            sight = _look(sights.get(node.name), relation, dim)
            if sight is None:
                return None
            grown[node.name] = sight
    return grown


def _look(sight: _Sight | None, relation: Relation, dim: int) -> _Sight | None:
    low, high, sees = tight(relation.lo[dim]), tight(relation.hi[dim]), ~tight(relation.empty)
    if bool((sees & (low != high)).any()):
        return None
    if sight is None:
        return _Sight(torch.where(sees, low, 0), sees)
    if bool((sees & sight.seen & (low != sight.point)).any()):
        return None
    return _Sight(torch.where(sight.seen, sight.point, torch.where(sees, low, 0)), sight.seen | sees)

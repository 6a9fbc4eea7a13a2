"""Credit assignment: each cost element is charged only to the site elements that influence it.

    before   %z = sample f32[B, D | ]  %d              %c = cost f32[B]  %nll
    after    %z = sample f32[B, D | ]  %d  credits=nll         (dim 0 tied: row b of the cost teaches row b of z)

Unbiased: a score has mean zero given everything its draw does not influence (Schulman et al. 2015, theorem 1).
"""

from __future__ import annotations

import dataclasses

from scg.analysis.influence import Relation, influence
from scg.analysis.smoothness import Smoothness, smoothness
from scg.ir import Cost, CreditEdge, Dist, Graph, Node, Sample


def assign_credit(graph: Graph, credit: str = "element") -> Graph:
    """Fills ``Graph.credit`` and the ``credits`` of every site.

    Args:
        graph: with its costs split.
        credit: ``"element"`` credits cost elements to site elements; ``"node"`` and ``"none"`` whole cost tensors.
    """
    found = influence(graph)
    smooth = smoothness(graph)
    costs = graph.of(Cost)
    edges: dict[tuple[str, str], CreditEdge] = {}
    sites: list[Node] = []
    for site in graph.of(Sample):
        labels: dict[str, None] = {}
        for cost in costs if not site.data else ():
            relation = found.relation(cost.name, site.name)
            if relation is None or bool(relation.empty.all()) or not _asks(site, cost, smooth):
                continue
            edges[site.name, cost.name] = _edge(graph, site, cost, relation, credit)
            labels[cost.label] = None
        sites.append(dataclasses.replace(site, credits=tuple(labels)))
    return graph.replace(*sites, credit=edges)


def _asks(site: Sample, cost: Cost, smooth: Smoothness) -> bool:
    """A site drawn by ``rsample`` does not answer for a cost that it reaches through stop-gradients alone."""
    return site.method == "sample" or smooth.live(site.name, cost.name) or not smooth.stopped(site.name, cost.name)


def _edge(graph: Graph, site: Sample, cost: Cost, relation: Relation, credit: str) -> CreditEdge:
    dist = graph[site.dist]
    assert isinstance(dist, Dist)
    shape = site.tensor.shape
    ndim = len(shape) - site.tensor.event_ndim
    if credit != "element":
        return CreditEdge(site.name, cost.name, (None,) * ndim, (True,) * ndim, ("mixed",) * ndim)
    axes: list[int | None] = []
    mixed: list[bool] = []
    words: list[str] = []
    links = relation.classify()
    for dim in range(ndim):
        whole = shape[dim] == 1 or relation.mixed(dim)
        tied = None if whole else relation.tied(dim)
        if tied in axes:
            tied = None
        axes.append(tied)
        mixed.append(whole)
        words.append("mixed" if whole else "tied" if tied is not None else links[dim])
    simple = all(whole or axis is not None for whole, axis in zip(mixed, axes, strict=True)) and not bool(
        relation.empty.any()
    )
    bounds = {} if simple else {"lo": relation.lo, "hi": relation.hi}
    return CreditEdge(site.name, cost.name, tuple(axes), tuple(mixed), tuple(words), **bounds)

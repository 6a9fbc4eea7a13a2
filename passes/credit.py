"""Credit assignment: each cost element is charged only to the site elements that influence it.

    before   %z = sample f32[B, D | ]  %d              %c = cost f32[B]  %nll
    after    %z = sample f32[B, D | ]  %d  credits=nll         (dim 0 tied: row b of the cost teaches row b of z)

Unbiased: a score has mean zero given everything its draw does not influence (Schulman et al. 2015, theorem 1).
"""

from __future__ import annotations

import dataclasses

from scg.analysis.edges import coarse_edge, element_edge
from scg.analysis.influence import influence
from scg.analysis.smoothness import Smoothness, smoothness
from scg.ir import Cost, CreditEdge, Graph, Node, Sample


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
            edges[site.name, cost.name] = (
                element_edge(site, cost.name, relation) if credit == "element" else coarse_edge(site, cost.name)
            )
            labels[cost.label] = None
        sites.append(dataclasses.replace(site, credits=tuple(labels)))
    return graph.replace(*sites, credit=edges)


def _asks(site: Sample, cost: Cost, smooth: Smoothness) -> bool:
    """A site drawn by ``rsample`` does not answer for a cost that it reaches through stop-gradients alone."""
    return site.method == "sample" or smooth.live(site.name, cost.name) or not smooth.stopped(site.name, cost.name)

"""Running and learned parts of estimators: made once a site, shared by all signatures."""

from __future__ import annotations

from torch import nn

from scg.analysis.influence import Influence, influence
from scg.analysis.support import finite_support
from scg.estimators.base import SiteInfo
from scg.estimators.rows import joined_dims
from scg.ir import Dist, Graph, Input, Sample


def make_states(graph: Graph, owner: nn.ModuleDict) -> dict[str, nn.Module]:
    """The state of every site that needs one, made where ``owner`` has none yet."""
    states: dict[str, nn.Module] = {}
    found: Influence | None = None
    along_batch = _BatchDims(graph)
    for site in graph.of(Sample):
        if site.estimator is None or not site.credits:
            continue
        key = site.name.replace(".", "_")
        if key not in owner:
            dist = graph[site.dist]
            assert isinstance(dist, Dist)
            found = found or influence(graph)
            info = SiteInfo(
                site.name,
                dist.template,
                site.tensor.shape,
                site.tensor.event_ndim,
                support=finite_support(graph, dist),
                joined=joined_dims(graph, found, site),
            )
            made = site.estimator.make_state(info, along_batch(site), draws(graph, site))
            if made is None:
                continue
            owner[key] = made
        states[site.name] = owner[key]
    return states


def draws(graph: Graph, site: Sample) -> int:
    """How many i.i.d. draws the site has."""
    if site.value is not None:
        return 1
    return graph.samples * (site.estimator.samples or 1)


class _BatchDims:
    """Element dims of sites that run over the data batch: tied to the leading dim of an input."""

    def __init__(self, graph: Graph) -> None:
        self.inputs = [node.name for node in graph.of(Input) if node.tensor.ndim >= 1]
        self.found = influence(graph, self.inputs) if self.inputs else None

    def __call__(self, site: Sample) -> tuple[int, ...]:
        dims = set()
        for name in self.inputs:
            relation = None if self.found is None else self.found.relation(site.name, name)
            tied = None if relation is None else relation.tied(0)
            if tied is not None and tied < site.tensor.ndim - site.tensor.event_ndim:
                dims.add(tied)
        return tuple(sorted(dims))

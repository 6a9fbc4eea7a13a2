"""Cuts below a site: the sites whose predictions may stand for the costs behind them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from scg.analysis.edges import element_edge
from scg.backends.credit_sums import credit_sum
from scg.backends.recorder import compile_time
from scg.backends.sample_dims import Batched
from scg.estimators.base import Predicts
from scg.ir import CreditEdge, Sample

if TYPE_CHECKING:
    from scg.backends.lowering import Interpreter
    from scg.backends.site_context import Context


@dataclass(frozen=True)
class Below:
    """One site of a cut, as the site above it sees it."""

    context: Context
    predictor: Predicts
    above: Context
    edge: CreditEdge
    """Which elements of the site above influence which of its own."""

    def gather(self, tensor: Tensor) -> Tensor:
        of, site, dims = self.above.run, self.context.site, self.above.dims
        if self.context.scale != self.above.scale:
            tensor = tensor * (self.context.scale / self.above.scale)
        value = of.expectation(Batched(tensor, self.context.dims), site.name, keep=dims, detach=True)
        return credit_sum(of.dims.align(value, dims), len(dims), self.edge, self.above.site.element_shape)


def cut_below(run: Interpreter, above: Sample) -> Iterator[tuple[Sample, CreditEdge]]:
    """The predicting sites next below ``above``, such that each cost is credited to at most one element of them.

    What no site of the cut is credited with stays as it was drawn, so that any such set is a cut.
    """
    graph = run.graph
    credited = {edge.cost for edge in run.signals.edges(above)}
    taken: set[str] = set()
    below = graph.descendants([above.name]) - {above.name}
    for site in graph.of(Sample):
        if site.name not in below or site.name not in run.env or getattr(site.estimator, "predictor", None) is None:
            continue
        edges = run.signals.edges(site)
        costs = {edge.cost for edge in edges}
        if not costs or not costs <= credited or costs & taken:
            continue
        with compile_time():
            relation = run.found.relation(site.name, above.name)
            link = None if relation is None else element_edge(above, site.name, relation)
        if link is not None and link.simple and all(_once(site, edge, link) for edge in edges):
            taken |= costs
            yield site, link


def _once(site: Sample, edge: CreditEdge, link: CreditEdge) -> bool:
    """Does each element of the cost see one of those elements of ``site`` that one element above influences?"""
    if not edge.simple:
        return False
    wide = [dim for dim, size in enumerate(site.tensor.shape[: len(edge.axes)]) if size > 1]
    return all(edge.axes[dim] is not None or dim in link.axes for dim in wide)


def causal_dim(run: Interpreter, site: Sample) -> int | None:
    """An element dim along which each index is credited with no more than the one before it; the others are tied."""
    found: set[int] = set()
    edges = run.signals.edges(site)
    for edge in edges:
        if edge.simple:
            continue
        with compile_time():
            size = site.tensor.shape
            open_dims = [dim for dim, axis in enumerate(edge.axes) if axis is None and not edge.mixed[dim]]
            if len(open_dims) != 1 or bool((edge.lo[open_dims[0]] != 0).any()) or size[open_dims[0]] < 2:
                return None
        found.add(open_dims[0])
    if len(found) != 1 or not all(edge.mixed[min(found)] for edge in edges if edge.simple):
        return None
    return found.pop()

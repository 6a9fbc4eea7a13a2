"""Credit edges: which elements of a site a value's elements teach, made from the relation between the two."""

from __future__ import annotations

from scg.analysis.influence import EdgeParts, Relation
from scg.ir import CreditEdge, Sample


def element_edge(site: Sample, value: str, relation: Relation) -> CreditEdge:
    """The edge that credits each element of ``value`` to the elements of ``site`` that it depends on."""
    shape, elements = site.tensor.shape, site.tensor.ndim - site.tensor.event_ndim
    key = (shape, elements)
    if key not in relation.edges:  # all sites of a chain have one relation to what is below them
        relation.edges[key] = _parts(shape, elements, relation)
    axes, mixed, words, simple = relation.edges[key]
    lo, hi = ((), ()) if simple else (relation.lo, relation.hi)
    return CreditEdge(site.name, value, axes, mixed, words, lo=lo, hi=hi)


def _parts(shape: tuple[int, ...], elements: int, relation: Relation) -> EdgeParts:
    axes: list[int | None] = []
    mixed: list[bool] = []
    words: list[str] = []
    links = relation.classify()
    for dim in range(elements):
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
    return tuple(axes), tuple(mixed), tuple(words), simple


def coarse_edge(site: Sample, value: str) -> CreditEdge:
    """The edge that credits every element of ``value`` to every element of ``site``."""
    ndim = site.tensor.ndim - site.tensor.event_ndim
    return CreditEdge(site.name, value, (None,) * ndim, (True,) * ndim, ("mixed",) * ndim)

"""Which values below a site need no row for each change of one element.

Element e of a value that reads element g of the site at most (along a joined dim) is, in the row in which g is changed,
what it is in the program in which *all* elements are changed. Such a value *holds all changes at once*: one evaluation,
instead of one a row, for as long as nothing joins its elements.

    z [B, D], exp(z) [B, D]     hold all changes along dim 1
    linear(z) [B, H]            rows: [D, B, H]
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor

from scg.analysis.influence import Influence, Relation
from scg.backends.recorder import compile_time
from scg.estimators.base import EnumeratingEstimator, RowEstimator
from scg.ir import Dist, Graph, Node, Op, Ref, Sample, TensorType
from scg.operations import is_random

Level = frozenset[int]
"""The joined element dims along which a value holds all changes at once; along the others it has rows."""


def levels(
    graph: Graph, found: Influence, site: Sample, below: Collection[str], joined: Sequence[int], rows: bool = False
) -> dict[str, Level]:
    """The level of ``site``, which is all of ``joined``, and of all nodes ``below`` it, none if they must have rows."""
    if any(isinstance(node, Sample) and _weighted(node) for node in map(graph.__getitem__, below)):
        rows = True  # the probabilities of its outcomes are those of whole rows
    known = {site.name: frozenset(joined)}
    for node in graph:
        if node.name in below:
            known_inputs = (known[ref] for ref in node.inputs if ref in known)
            inherited = frozenset[int]() if rows else frozenset(joined).intersection(*known_inputs)
            known[node.name] = _level(graph, found, site, node, inherited)
    return known


def _level(graph: Graph, found: Influence, site: Sample, node: Node, inherited: Level) -> Level:
    if isinstance(node, Dist):
        return inherited
    if not isinstance(node.type, TensorType) or isinstance(node, Op) and is_random(node):
        return frozenset()  # elements may share their noise
    if isinstance(node, Sample) and _dist(graph, node.dist).template.cls.__name__ == "TransformedDistribution":
        return frozenset()  # what it was before its transforms is kept as it was drawn
    relation = found.relation(node.name, site.name)
    with compile_time():
        return frozenset(dim for dim in inherited if relation is None or relation.pointlike(dim))


def readers(relation: Relation, dim: int, rows: range) -> Tensor:
    """Which elements read element g of the site along ``dim``.  ``[rows, *S]``, of size 1 where it does not vary"""
    lo, hi = (narrowed(bound[dim]) for bound in (relation.lo, relation.hi))
    index = torch.arange(rows.start, rows.stop)
    return (lo == hi) & (lo == index.reshape([-1, *[1] * lo.dim()]))


def positions(relation: Relation, dims: dict[int, range]) -> tuple[tuple[int, ...], Tensor] | None:
    """Which positions of a value each row changes.

    Args:
        relation: of the value to the site.
        dims: the joined dims with rows, and which rows.

    Returns:
        The dims of the value that tell rows apart, and the positions along them, flattened, ``[rows, members]``; None
        where rows change different numbers of positions.
    """
    total: Tensor = torch.zeros([1] * len(relation.shape), dtype=torch.int64)
    for dim in dims:
        lo, hi = (narrowed(bound[dim]) for bound in (relation.lo, relation.hi))
        total = torch.where((lo == hi) & (total >= 0), total * relation.extent[dim] + lo, -1)
    total = narrowed(total)
    axes = tuple(axis for axis, size in enumerate(total.shape) if size > 1)
    flat = total.reshape(-1)
    extent = [relation.extent[dim] for dim in dims]
    counts = torch.bincount(flat[flat >= 0], minlength=math.prod(extent))
    if not axes or not len(counts) or int(counts.min()) == 0 or int(counts.min()) != int(counts.max()):
        return None
    order = flat.argsort(stable=True)[int((flat < 0).sum()) :].reshape([*extent, -1])
    for axis, rows in enumerate(dims.values()):
        order = order.narrow(axis, rows.start, len(rows))
    return axes, order.flatten(0, -2)


def narrowed(x: Tensor) -> Tensor:
    """``x`` with size 1 along every dim over which its values do not vary."""
    for dim, size in enumerate(x.shape):
        if size > 1 and bool((x == x.narrow(dim, 0, 1)).all()):
            x = x.narrow(dim, 0, 1)
    return x


def largest(graph: Graph, known: dict[str, Level], size: Callable[[Level], int]) -> int:
    """Bytes of the largest value, of which there are ``size`` copies at a level."""
    types = ((graph[name].type, level) for name, level in known.items())
    sizes = (
        size(level) * math.prod(type_.shape) * type_.dtype.itemsize
        for type_, level in types
        if isinstance(type_, TensorType)
    )
    return max(sizes)


def _weighted(site: Sample) -> bool:
    return isinstance(site.estimator, (EnumeratingEstimator, RowEstimator))


def _dist(graph: Graph, ref: Ref) -> Dist:
    node = graph[ref]
    assert isinstance(node, Dist)
    return node

"""What stands between a draw and a multi-sample bound: where its score terms may be reparameterized."""

from __future__ import annotations

import math
from collections.abc import Sequence

from scg.analysis.influence import Influence, Relation
from scg.analysis.smoothness import Smoothness
from scg.ir import Bound, Cost, Depends, Graph, LogProb, Node, Op, Ref, Sample
from scg.operations import packet_name

_KEEPS = {
    "sum", "view", "reshape", "_unsafe_view", "squeeze", "unsqueeze", "permute", "transpose", "t", "flatten", "clone",
    "contiguous", "alias", "_to_copy", "to",
}  # fmt: skip
"""Operations after which every element has the weight it had before."""


def doubly_break(graph: Graph, found: Influence, smooth: Smoothness, site: Sample, costs: Sequence[str]) -> str | None:
    """Why the score terms of ``site`` in a bound cannot be reparameterized, with the place; None where they can.

    They can where the site is the last draw on its way to one bound, each of its elements meets one element of that
    bound, and the negative log weight holds its log density once.
    """
    nodes = [graph[name] for name in costs]
    bounds = {node.value for node in nodes if isinstance(node, Cost) and isinstance(graph[node.value], Bound)}
    outside = [node for node in nodes if isinstance(node, Cost) and node.value not in bounds]
    if not bounds:
        return "it stands below no scg.multisample bound; 'reparam' with path_derivative=True is for other costs"
    if outside or len(bounds) > 1:
        where = outside[0] if outside else graph[sorted(bounds)[1]]
        return f"it reaches another cost beside the bound, {_place(where)}"
    (bound,) = (graph[name] for name in bounds)
    assert isinstance(bound, Bound)
    above, below = graph.ancestors([bound.value]), graph.descendants([site.name])
    for inner in graph.of(Sample):
        if inner.name in above & below and inner.name != site.name:
            return f"{_place(inner)} is drawn from it: only the last draw can be doubly reparameterized, use 'reparam'"
    if smooth.stopped(site.name, bound.name):
        return "part of its way to the bound is detached, and the score terms need the whole derivative"
    relation = found.relation(bound.name, site.name)
    assert relation is not None
    elements = site.tensor.ndim - site.tensor.event_ndim
    tied = {axis for axis in tied_axes(relation, elements) if axis is not None}
    if any(size > 1 and axis not in tied for axis, size in enumerate(bound.tensor.shape)):
        return f"its elements meet several elements of the bound, {_place(bound)}, whose weights differ"
    weight = density_weight(graph, site, bound.value)
    if weight != 1.0:
        share = (
            "not at all" if weight == 0.0 else "in a way that is not followed" if weight is None else f"{weight:g} x"
        )
        return (
            f"the negative log weight must hold the site's own log density once, as q.log_prob({site.name}) - …, and "
            f"{_place(bound)} holds it {share}"
        )
    return None


def tied_axes(relation: Relation, elements: int) -> list[int | None]:
    """For each element dim of the site, the dim of the value that is tied to it and to none before it."""
    axes: list[int | None] = []
    for dim in range(elements):
        tied = relation.tied(dim)
        axes.append(None if tied in axes else tied)
    return axes


def density_weight(graph: Graph, site: Sample, end: str) -> float | None:
    """What the site's own log density is multiplied by on its way to ``end``; None where that is not a number."""
    weights: dict[str, float | None] = {}
    above = graph.ancestors([end])
    for node in graph:
        if node.name not in above:
            continue
        if isinstance(node, LogProb) and node.dist == site.dist and node.value == site.name:
            weights[node.name] = 1.0
        elif any(ref in weights for ref in node.inputs):
            weights[node.name] = _weight(graph, node, weights)
    return weights.get(end, 0.0)


def _weight(graph: Graph, node: Node, weights: dict[str, float | None]) -> float | None:
    if isinstance(node, (Cost, Depends)):
        return weights.get(node.value)
    if not isinstance(node, Op):
        return None
    name, args = packet_name(node.target), node.args

    def of(operand: object) -> float | None:
        if not isinstance(operand, Ref) or operand not in weights:
            return 0.0
        whole = math.prod(graph[operand].tensor.shape) == math.prod(node.tensor.shape)
        return weights[operand] if whole else None

    if name in ("add", "sub"):
        first, second = of(args[0]), of(args[1])
        factor = float(node.kwargs.get("alpha", 1)) * (1 if name == "add" else -1)
        return None if first is None or second is None else first + factor * second
    if name == "rsub" and not node.kwargs.get("alpha"):
        first, second = of(args[0]), of(args[1])
        return None if first is None or second is None else second - first
    if name in ("mul", "div") and isinstance(args[1], (int, float)):
        first = of(args[0])
        return None if first is None else first * args[1] if name == "mul" else first / args[1]
    if name == "neg":
        first = of(args[0])
        return None if first is None else -first
    return weights[args[0]] if name in _KEEPS and args[0] in weights else None


def _place(node: Node) -> str:
    return f"%{node.name} ({node.loc})" if node.loc else f"%{node.name}"

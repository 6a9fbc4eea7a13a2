"""Elementwise operations that differ in the slice they start from run once, on all slices.

    before   a = x.select(1, 0); b = (a - m) ** 2        after   s = (x.movedim(1, 0) - m) ** 2
             c = x.select(1, 1); d = (c - m) ** 2                b, d = s.unbind(0)

These are steps of an unrolled loop that do not wait for each other, such as the emissions of a hidden Markov model.
Values and gradients are those of the separate calls.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

FEWEST = 8
"""Slices from which on it pays."""

_FUNCTIONS = {
    operator.add, operator.sub, operator.mul, operator.truediv, operator.neg, operator.pow, torch.add, torch.sub,
    torch.mul, torch.div, torch.neg, torch.exp, torch.log, torch.sigmoid, torch.tanh, torch.abs, torch.square,
    torch.clamp_min,
}  # fmt: skip
_METHODS = {"exp", "log", "sigmoid", "tanh", "abs", "square", "sqrt", "log1p", "expm1", "neg", "pow"}


@dataclass(frozen=True)
class _Family:
    """Calls that differ in nothing but the slice: the first is what the others look like."""

    members: dict[int, fx.Node]
    """By index of the slice, in program order."""

    @property
    def first(self) -> fx.Node:
        return next(iter(self.members.values()))


def stack_slices(graph: fx.Graph) -> None:
    """Rewrites ``graph``, whose nodes hold their tensors under ``meta["fake"]``, in place."""
    families = list(_families(graph))
    home = {member: family for family in families for member in family.members.values()}
    calls = [family for family in families if not _slice_of(family.first)]
    stacked: dict[fx.Node, fx.Node] = {}  # by the first member of each family
    for family in families:  # in program order: operands come first
        with graph.inserting_before(family.first):
            stacked[family.first] = _emit(graph, family, home, stacked)
    for family in calls:
        outside = [m for m in family.members.values() if any(user not in home for user in m.users)]
        if outside:
            with graph.inserting_before(family.first):
                pieces = graph.call_method("unbind", (stacked[family.first], 0))
                for place, member in enumerate(family.members.values()):
                    if member in outside:
                        member.replace_all_uses_with(graph.call_function(operator.getitem, (pieces, place)))
    for family in reversed(families):
        for member in reversed(family.members.values()):
            if not member.users:
                graph.erase_node(member)
    for node in reversed(list(graph.nodes)):  # of slices that are only taken one by one
        if node in stacked.values() and not node.users:
            graph.erase_node(node)


def _families(graph: fx.Graph) -> Iterator[_Family]:
    """Slices, and the calls that follow from them, where there are as many of each."""
    groups: dict[Any, dict[int, fx.Node]] = {}
    where: dict[fx.Node, tuple[Any, int]] = {}
    for node in graph.nodes:
        found = _slice_of(node)
        if found is not None:
            source, dim, index = found
            key: Any = ("slice", source, dim)
        elif _is_elementwise(node):
            indices = {where[arg][1] for arg in node.all_input_nodes if arg in where}
            if len(indices) != 1:
                continue
            (index,) = indices
            key = ("call", node.op, node.target, *map(lambda arg: _template(arg, where), node.args))
        else:
            continue
        if index not in groups.setdefault(key, {}):
            groups[key][index] = node
            where[node] = key, index
    kept: set[Any] = set()
    for key, members in groups.items():
        order = list(members)
        first = next(iter(members.values()))
        if key[0] == "slice":
            ready = order == list(range(order[0], order[0] + len(order)))
        else:
            needed = [part[1] for part in key[3:] if part[0] == "family"]
            ready = all(other in kept and list(groups[other]) == order for other in needed)
        if ready and len(members) >= FEWEST and _alike(members.values(), first):
            kept.add(key)
            yield _Family(members)


def _template(arg: Any, where: dict[fx.Node, tuple[Any, int]]) -> tuple[str, Any]:
    if isinstance(arg, fx.Node):
        return ("family", where[arg][0]) if arg in where else ("node", arg)
    return ("constant", (type(arg), arg))


def _alike(members: Any, first: fx.Node) -> bool:
    shape = first.meta["fake"].shape
    return all(member.meta["fake"].shape == shape for member in members)


def _slice_of(node: fx.Node) -> tuple[fx.Node, int, int] | None:
    """Source, dim and index of ``torch.select(source, dim, index)``."""
    if node.target is not torch.select or len(node.args) != 3 or "fake" not in node.meta:
        return None
    source, dim, index = node.args
    if not isinstance(source, fx.Node) or not isinstance(dim, int) or not isinstance(index, int) or index < 0:
        return None
    return source, dim, index


def _is_elementwise(node: fx.Node) -> bool:
    known = node.target in (_FUNCTIONS if node.op == "call_function" else _METHODS if node.op == "call_method" else ())
    if not known or node.kwargs or not isinstance(node.meta.get("fake"), Tensor):
        return False
    if not all(isinstance(arg, (fx.Node, int, float)) for arg in node.args):
        return False
    dtypes = {arg.meta["fake"].dtype for arg in node.all_input_nodes if isinstance(arg.meta.get("fake"), Tensor)}
    return dtypes == {node.meta["fake"].dtype}  # of mixed ones, the result depends on which has no dims


def _emit(graph: fx.Graph, family: _Family, home: dict[fx.Node, _Family], stacked: dict[fx.Node, fx.Node]) -> fx.Node:
    """One call for all members, slices in front."""
    first = family.first
    found = _slice_of(first)
    if found is not None:
        source, dim, start = found
        moved = graph.call_method("movedim", (source, dim, 0))
        if len(family.members) == source.meta["fake"].shape[dim]:
            return moved
        return graph.call_method("narrow", (moved, 0, start, len(family.members)))
    rank = first.meta["fake"].dim()

    def operand(arg: Any) -> Any:
        if arg not in home:
            return arg
        node = stacked[home[arg].first]
        for _ in range(rank - arg.meta["fake"].dim()):  # broadcasting is from the right
            node = graph.call_method("unsqueeze", (node, 1))
        return node

    args = tuple(operand(arg) if isinstance(arg, fx.Node) else arg for arg in first.args)
    return graph.create_node(first.op, first.target, args, name=f"{first.name}_all")

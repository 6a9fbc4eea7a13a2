"""What is done with the index of a category, written for its one-hot vector.

    table[z]             ->  one_hot @ table
    x.gather(-1, z)      ->  (x * one_hot).sum(-1)
    z.view(-1)           ->  one_hot.view(-1, C)

Equal at every outcome, linear in the one-hot in between: what a relaxed draw is differentiated through.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from scg.ir import Op, Param, Ref
from scg.operations import bind, packet_name
from scg.passes.rewriter import Rewriter

aten = torch.ops.aten


class NoOneHotForm(Exception):
    """A use of an index that means nothing between the outcomes."""


@dataclass(frozen=True)
class Use:
    """An operation that reads indices, and where the new graph has their one-hots."""

    new: Rewriter
    node: Op
    hot: Mapping[str, Ref]
    """The one-hot ``[*shape, C]`` of each node that holds indices ``[*shape]``, by its name."""

    @property
    def arguments(self) -> dict[str, Any]:
        return bind(self.node)

    def categories(self, hot: Ref) -> int:
        return self.new.shape(hot)[-1]

    def hot_shape(self, index: Any) -> tuple[int, ...]:
        """The shape of drawn indices."""
        return self.new.shape(self.hot[index])[:-1]

    def op(self, target: Callable[..., Any], *args: Any) -> Ref:
        return self.new.op(target, *args, at=self.node)

    def result(self, target: Callable[..., Any], *args: Any) -> Ref:
        """The last operation, which takes the node's name."""
        return self.new.op(target, *args, at=self.node, name=self.node.name, type=self.node.type)

    def chain(self, ref: Ref, *steps: tuple[Any, ...]) -> Ref:
        """Operations one after the other, each given as its target and what follows the result of the one before."""
        for target, *args in steps[:-1]:
            ref = self.op(target, ref, *args)
        return self.result(steps[-1][0], ref, *steps[-1][1:])

    def table(self, ref: Ref, dim: int, hot: Ref) -> Ref:
        """What is looked up along ``dim``: as many entries as there are categories, all finite."""
        size, categories = self.new.shape(ref)[dim], self.categories(hot)
        dtype = self.new.nodes[ref].tensor.dtype
        if not dtype.is_floating_point:
            raise NoOneHotForm("looks up values that are not floating numbers")
        if size < categories:
            raise NoOneHotForm(f"looks up {size} entries by {categories} categories")
        if size > categories:
            ref = self.op(aten.slice.Tensor, ref, dim, 0, categories)
        if not isinstance(self.new.nodes[ref], Param):  # entries of -inf that are not looked up: 0 * inf
            limits = torch.finfo(dtype)
            ref = self.op(aten.clamp.default, ref, limits.min, limits.max)
        return ref

    def like(self, hot: Ref, table: Ref) -> Ref:
        """The one-hot in the table's dtype."""
        dtype = self.new.nodes[table].tensor.dtype
        return hot if self.new.nodes[hot].tensor.dtype == dtype else self.op(aten.to.dtype, hot, dtype)


# -- views: the same view of the one-hot, categories last -------------------------------------------------------------
def _reshaped(use: Use, hot: Ref, shape: tuple[int, ...]) -> Ref:
    return use.op(aten.reshape.default, hot, [*shape, use.categories(hot)])


def _same(use: Use, hot: Ref, shape: tuple[int, ...]) -> Ref:
    return hot


def _cast(use: Use, hot: Ref, shape: tuple[int, ...]) -> Ref:
    if use.node.tensor.dtype.is_floating_point or use.node.tensor.dtype == torch.bool:
        raise NoOneHotForm("takes the index for a number")
    return hot


def _expanded(use: Use, hot: Ref, shape: tuple[int, ...]) -> Ref:
    return use.op(aten.expand.default, hot, [*shape, use.categories(hot)])


def _detached(use: Use, hot: Ref, shape: tuple[int, ...]) -> Ref:
    return use.op(aten.detach.default, hot)


def _selected(use: Use, hot: Ref, shape: tuple[int, ...]) -> Ref:
    named, rank = use.arguments, len(use.new.shape(hot)) - 1
    return use.op(aten.select.int, hot, named["dim"] % rank, named["index"])


def _sliced(use: Use, hot: Ref, shape: tuple[int, ...]) -> Ref:
    named, rank = use.arguments, len(use.new.shape(hot)) - 1
    return use.op(aten.slice.Tensor, hot, named["dim"] % rank, named["start"], named["end"], named["step"])


def _permuted(use: Use, hot: Ref, shape: tuple[int, ...]) -> Ref:
    named, rank = use.arguments, len(use.new.shape(hot)) - 1
    dims = [*range(rank)]
    if "dims" in named:
        dims = [dim % rank for dim in named["dims"]]
    elif "dim0" in named:
        a, b = named["dim0"] % rank, named["dim1"] % rank
        dims[a], dims[b] = b, a
    else:
        dims.reverse()
    return use.op(aten.permute.default, hot, [*dims, rank])


def _joined(use: Use, *, new_dim: bool) -> Ref:
    named = use.arguments
    refs = named["tensors"]
    if not all(ref in use.hot for ref in refs) or len({use.categories(use.hot[ref]) for ref in refs}) > 1:
        raise NoOneHotForm("joins indices of different kinds")
    hots = [use.hot[ref] for ref in refs]
    rank = len(use.new.shape(hots[0])) - 1 + new_dim
    target = aten.stack.default if new_dim else aten.cat.default
    return use.op(target, hots, named["dim"] % rank)


VIEWS: dict[str, Callable[[Use, Ref, tuple[int, ...]], Ref]] = {
    **dict.fromkeys(("view", "reshape", "flatten", "unflatten", "unsqueeze", "squeeze", "_unsafe_view"), _reshaped),
    **dict.fromkeys(("expand", "expand_as", "broadcast_to"), _expanded),
    **dict.fromkeys(("clone", "contiguous", "alias"), _same),
    **dict.fromkeys(("to", "_to_copy", "type_as"), _cast),
    **dict.fromkeys(("transpose", "permute", "t", "numpy_T"), _permuted),
    "detach": _detached,
    "select": _selected,
    "slice": _sliced,
}
"""Operations whose result holds indices again."""

JOINS = {"stack": True, "cat": False}
"""Likewise, of several indices; whether they make a dim."""


def view(use: Use) -> Ref | None:
    """The one-hot of the indices that ``use.node`` makes of indices; None where it makes something else."""
    name = packet_name(use.node.target) or ""
    if name in JOINS:
        return _joined(use, new_dim=JOINS[name])
    rule = VIEWS.get(name)
    if rule is None or not (isinstance(use.node.args[0], Ref) and use.node.args[0] in use.hot):
        return None
    return rule(use, use.hot[use.node.args[0]], use.node.tensor.shape)


# -- look-ups ---------------------------------------------------------------------------------------------------------
def _rows(use: Use, ref: Ref, dim: int, hot: Ref) -> Ref:
    """``table.index_select(dim, z)`` with the dims of ``z`` in the place of ``dim``, as a product of matrices."""
    new, index = use.new, use.new.shape(hot)[:-1]
    rank = len(new.shape(ref))
    table = use.table(ref, dim, hot)
    if dim:
        table = use.op(aten.permute.default, table, [dim, *(d for d in range(rank) if d != dim)])
    rest = new.shape(table)[1:]
    if rank != 2:
        table = use.op(aten.reshape.default, table, [use.categories(hot), math.prod(rest)])
    steps: list[tuple[Any, ...]] = [(aten.matmul.default, table)]  # [*index, prod(rest)]
    if dim or rank != 2:
        steps.append((aten.reshape.default, [*index, *rest]))
    if dim:
        n = len(index)
        steps.append((aten.permute.default, [*range(n, n + dim), *range(n), *range(n + dim, n + len(rest))]))
    if (*rest[:dim], *index, *rest[dim:]) != use.node.tensor.shape:
        steps.append((aten.reshape.default, [*use.node.tensor.shape]))
    return use.chain(use.like(hot, table), *steps)


def _embedding(use: Use) -> Ref:
    named = use.arguments
    if named["padding_idx"] >= 0 or named["scale_grad_by_freq"] or named["sparse"]:
        raise NoOneHotForm("scales or drops gradients by the index (padding_idx, scale_grad_by_freq, sparse)")
    return _rows(use, named["weight"], 0, use.hot[named["indices"]])


def _index_select(use: Use) -> Ref:
    named = use.arguments
    return _rows(use, named["self"], named["dim"] % len(use.new.shape(named["self"])), use.hot[named["index"]])


def _take(use: Use) -> Ref:
    named = use.arguments
    flat = use.op(aten.reshape.default, named["self"], [-1])
    return _rows(use, flat, 0, use.hot[named["index"]])


def _along(use: Use, ref: Ref, dim: int, hot: Ref) -> Ref:
    """``x.gather(dim, z)``: entries of ``x`` at their own places along all other dims."""
    rank = len(use.new.shape(ref))
    table = use.table(ref, dim, hot)
    if dim != rank - 1:
        table = use.op(aten.permute.default, table, [*(d for d in range(rank) if d != dim), dim])
    table = use.op(aten.unsqueeze.default, table, dim)  # [*others with a 1 at dim, C]
    return use.result(aten.sum.dim_IntList, use.op(aten.mul.Tensor, table, hot), [-1])


def _gather(use: Use) -> Ref:
    named = use.arguments
    x, hot = named["self"], use.hot[named["index"]]
    shape, index = use.new.shape(x), use.new.shape(hot)[:-1]
    dim = named["dim"] % max(len(shape), 1)
    if any(shape[d] != index[d] for d in range(len(shape)) if d != dim):
        raise NoOneHotForm("looks up in a part of a larger tensor")
    return _along(use, x, dim, hot)


def _take_along_dim(use: Use) -> Ref:
    named = use.arguments
    if named["dim"] is None:
        return _rows(use, use.op(aten.reshape.default, named["self"], [-1]), 0, use.hot[named["indices"]])
    return _along(use, named["self"], named["dim"] % len(use.new.shape(named["self"])), use.hot[named["indices"]])


def _index(use: Use) -> Ref:
    """``table[…, z, …]``: by rows where ``z`` is the only index, else all entries weighted by the one-hots."""
    new, named = use.new, use.arguments
    table, indices = named["self"], named["indices"]
    places = [i for i, index in enumerate(indices) if index is not None]
    drawn = [i for i in places if indices[i] in use.hot]
    if len(places) == 1:
        return _rows(use, table, places[0], use.hot[indices[places[0]]])
    if any(new.nodes[new.read(indices[i])].tensor.dtype in (torch.bool, torch.uint8) for i in places):
        raise NoOneHotForm("is combined with a mask")
    shapes = [use.hot_shape(indices[i]) if i in drawn else new.shape(indices[i]) for i in places]
    common = tuple(torch.broadcast_shapes(*shapes))
    fixed = tuple(torch.broadcast_shapes(*(new.shape(indices[i]) for i in places if i not in drawn)))
    adjacent = places[-1] - places[0] + 1 == len(places)
    size = new.shape(table)
    before = size[: places[0]] if adjacent else ()
    after = [size[d] for d in range(len(size)) if d not in places][len(before) :]
    for i in drawn:
        table = use.table(table, i, use.hot[indices[i]])
    every: list[Any] = list(indices)
    for i in places:
        if i in drawn:
            ones = [1] * (len(drawn) - 1 - drawn.index(i))
            categories = torch.arange(use.categories(use.hot[indices[i]]), device=new.nodes[table].tensor.device)
            name = new.fresh(f"{use.node.name}_categories")
            every[i] = new.constant(categories.reshape([-1, *ones]), at=use.node, name=name)
        else:
            shape = [*new.shape(indices[i]), *[1] * len(drawn)]
            every[i] = use.op(aten.reshape.default, indices[i], shape)
    looked = use.op(aten.index.Tensor, table, every)  # [*before, *fixed, C_1, …, *after]
    counts = [use.categories(use.hot[indices[i]]) for i in drawn]
    if len(fixed) < len(common):
        missing = [1] * (len(common) - len(fixed))
        looked = use.op(aten.reshape.default, looked, [*before, *missing, *fixed, *counts, *after])
    for j, i in enumerate(drawn):
        hot = use.hot[indices[i]]
        at = use.hot_shape(indices[i])
        own = [1] * j + [counts[j]] + [1] * (len(drawn) - 1 - j)
        weight = use.op(aten.reshape.default, hot, [*[1] * (len(common) - len(at)), *at, *own, *[1] * len(after)])
        looked = use.op(aten.mul.Tensor, looked, weight)
    first = len(before) + len(common)
    return use.result(aten.sum.dim_IntList, looked, [first + j for j in range(len(drawn))])


LOOK_UPS: dict[str, tuple[Callable[[Use], Ref], str]] = {
    "embedding": (_embedding, "indices"),
    "index": (_index, "indices"),
    "index_select": (_index_select, "index"),
    "gather": (_gather, "index"),
    "take": (_take, "index"),
    "take_along_dim": (_take_along_dim, "indices"),
}
"""Operations that look something up by an index, and the argument where the index stands."""


def look_up(use: Use) -> Ref:
    """The value of ``use.node`` by the one-hots of its indices, under its name."""
    name = packet_name(use.node.target) or ""
    if name not in LOOK_UPS:
        raise NoOneHotForm("has no meaning between two categories")
    rule, argument = LOOK_UPS[name]
    elsewhere = {key: value for key, value in use.arguments.items() if key != argument}
    if any(isinstance(value, Ref) and value in use.hot for value in elsewhere.values()):
        raise NoOneHotForm("looks up indices")
    return rule(use)

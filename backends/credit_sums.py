"""Sums cost elements into the signals of the site elements they teach."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from scg.backends.recorder import compile_time, record_constant
from scg.ir import CreditEdge

_MATRIX_ENTRIES = 1 << 22
"""Most entries of the 0/1 matrix that sums a general credit relation; beyond, a difference array does it."""


def credit_sum(tensor: Tensor, lead: int, edge: CreditEdge, elements: tuple[int, ...]) -> Tensor:
    """Sums cost elements ``[*dims | *cost]`` into the site elements they teach, ``[*dims | *elements]``."""
    return _gather(tensor, lead, edge, elements, torch.sum, _sum_of_boxes)


def credit_max(tensor: Tensor, edge: CreditEdge, elements: tuple[int, ...]) -> Tensor:
    """The largest of the cost elements ``[*cost]`` that teach each site element; of compile time, zero or more."""
    return _gather(tensor, 0, edge, elements, torch.amax, _max_of_boxes)


def running_max(tensor: Tensor, edge: CreditEdge, elements: tuple[int, ...]) -> Tensor:
    """As `credit_max`, step by step: no less than it."""
    return _gather(tensor, 0, edge, elements, torch.amax, _bound_of_boxes)


def _gather(
    tensor: Tensor,
    lead: int,
    edge: CreditEdge,
    elements: tuple[int, ...],
    whole: Callable[[Tensor, list[int]], Tensor],
    boxes: Callable[[Tensor, list[Tensor], list[Tensor], list[int]], Tensor],
) -> Tensor:
    ndim = tensor.dim() - lead
    if edge.simple:
        kept = [axis for axis in edge.axes if axis is not None]
        over = [lead + axis for axis in range(ndim) if axis not in kept]
        if over and ndim == len(elements) and all(axis in (None, dim) for dim, axis in enumerate(edge.axes)):
            return tensor.sum(over, keepdim=True)
        if over:
            tensor = whole(tensor, over)
        rank = {axis: i for i, axis in enumerate(sorted(kept))}
        tensor = (
            tensor.permute([*range(lead), *(lead + rank[axis] for axis in kept)]) if kept != sorted(kept) else tensor
        )
        shape = [elements[dim] if axis is not None else 1 for dim, axis in enumerate(edge.axes)]
        return tensor.reshape([*tensor.shape[:lead], *shape])
    return _by_boxes(tensor, lead, edge, elements, boxes)


def spread(tensor: Tensor, lead: int, edge: CreditEdge, cost_shape: tuple[int, ...]) -> Tensor:
    """The transpose of `credit_sum`: for each cost element the sum over the site elements that influence it.

    From ``[*dims | *elements]`` to ``[*dims | *cost]``, of size 1 where it does not vary.
    """
    elements = tuple(tensor.shape[lead:])
    if edge.simple:
        over = [lead + dim for dim, axis in enumerate(edge.axes) if axis is None]
        if over:
            tensor = tensor.sum(over)
        kept = [axis for axis in edge.axes if axis is not None]
        order = sorted(range(len(kept)), key=kept.__getitem__)
        tensor = tensor.permute([*range(lead), *(lead + i for i in order)])
        shape = [cost_shape[axis] if axis in kept else 1 for axis in range(len(cost_shape))]
        return tensor.reshape([*tensor.shape[:lead], *shape])

    def matrix() -> Tensor:
        lo = [bound.expand(cost_shape).reshape(-1) for bound in edge.lo]
        hi = [bound.expand(cost_shape).reshape(-1) for bound in edge.hi]
        return _box_matrix(lo, hi, list(elements or (1,))).T.to(dtype=tensor.dtype, device=tensor.device)

    flat = tensor.reshape([*tensor.shape[:lead], -1])  # [*dims, S]
    return (flat @ record_constant(matrix)).reshape([*flat.shape[:lead], *cost_shape])


def _by_boxes(
    tensor: Tensor,
    lead: int,
    edge: CreditEdge,
    elements: tuple[int, ...],
    boxes: Callable[[Tensor, list[Tensor], list[Tensor], list[int]], Tensor],
) -> Tensor:
    """General boxes over the dims that are not tied, shared by the tied ones where they may be."""
    shape = tuple(tensor.shape[lead:])
    sizes = elements or (1,)
    with compile_time():
        los = [lo.expand(shape) for lo in edge.lo]
        his = [hi.expand(shape) for hi in edge.hi]
        tied = _shared_ties(edge, los, his)
        rest_cost = [axis for axis in range(len(shape)) if axis not in tied.values()]
        rest_site = [dim for dim in range(len(sizes)) if dim not in tied]
        pick = tuple(slice(None) if axis in rest_cost else 0 for axis in range(len(shape)))
        lo = [los[dim][pick].reshape(-1) for dim in rest_site]  # each [C]
        hi = [his[dim][pick].reshape(-1) for dim in rest_site]
    site_sizes = [sizes[dim] for dim in rest_site]
    order = [*range(lead), *(lead + tied[dim] for dim in sorted(tied)), *(lead + axis for axis in rest_cost)]
    flat = tensor.permute(order)
    kept = list(flat.shape[: lead + len(tied)])
    flat = flat.reshape([*kept, -1])  # [*dims, *tied, C]
    found = boxes(flat, lo, hi, site_sizes).reshape([*kept, *site_sizes])
    place = [*sorted(tied), *rest_site]
    back = [place.index(dim) for dim in range(len(place))]
    return found.permute([*range(lead), *(lead + i for i in back)]).reshape([*found.shape[:lead], *elements])


def _sum_of_boxes(flat: Tensor, lo: list[Tensor], hi: list[Tensor], sizes: list[int]) -> Tensor:
    """A 0/1 matrix, or a difference array where that is too large.  ``[*dims, *tied, prod(sizes)]``"""
    if lo[0].numel() * math.prod(sizes) > _MATRIX_ENTRIES:
        return _difference_sum(flat, lo, hi, sizes)
    matrix = record_constant(lambda: _box_matrix(lo, hi, sizes).to(flat.device, flat.dtype))
    return flat @ matrix


def _max_of_boxes(flat: Tensor, lo: list[Tensor], hi: list[Tensor], sizes: list[int]) -> Tensor:
    """Box after box: no table of all is kept.  ``[*tied, prod(sizes)]``"""
    found = flat.new_zeros([*flat.shape[:-1], math.prod(sizes)])
    for axis in range(flat.dim() - 1):
        if bool((flat == flat.narrow(axis, 0, 1)).all()):
            flat = flat.narrow(axis, 0, 1)
    for i in range(len(lo[0])):
        inside = _box_matrix([low[i : i + 1] for low in lo], [high[i : i + 1] for high in hi], sizes)  # [1, S]
        found = torch.maximum(found, flat[..., i : i + 1] * inside[0])
    return found


def _shared_ties(edge: CreditEdge, los: list[Tensor], his: list[Tensor]) -> dict[int, int]:
    """Tied site dims whose cost dim moves no other bound: they need no part in the matrix."""
    tied: dict[int, int] = {}
    for dim, axis in enumerate(edge.axes):
        if axis is None or axis in tied.values():
            continue
        others = [b for i, pair in enumerate(zip(los, his, strict=True)) if i != dim for b in pair]
        if all(bool((b == b.narrow(axis, 0, 1)).all()) for b in others):
            tied[dim] = axis
    if len(tied) == len(los):  # nothing would be left to say which elements are empty
        tied.popitem()
    return tied


def _box_matrix(lo: list[Tensor], hi: list[Tensor], sizes: list[int]) -> Tensor:
    """1 where cost element c sees site element i.  ``[C, prod(sizes)]``"""
    matrix = torch.ones(len(lo[0]), 1, dtype=torch.bool)
    for low, high, size in zip(lo, hi, sizes, strict=True):
        index = torch.arange(size)
        inside = (low[:, None] <= index) & (index <= high[:, None])  # [C, size]
        matrix = (matrix[:, :, None] & inside[:, None, :]).reshape(len(low), -1)
    return matrix


def _bound_of_boxes(flat: Tensor, lo: list[Tensor], hi: list[Tensor], sizes: list[int]) -> Tensor:
    """Along a causal dim a running maximum from its end, else the largest of all.  ``[*tied, prod(sizes)]``"""
    with compile_time():
        causal = len(sizes) == 1 and not bool(lo[0].any()) and hi[0].tolist() == list(range(sizes[0]))
    if causal:
        return flat.flip(-1).cummax(-1).values.flip(-1)
    return flat.amax(-1, keepdim=True).expand([*flat.shape[:-1], math.prod(sizes)])


def _difference_sum(flat: Tensor, lo: list[Tensor], hi: list[Tensor], sizes: list[int]) -> Tensor:
    """Box sums by a difference array: add at each box's corners, then running sums along every dim."""
    padded = [size + 1 for size in sizes]

    def corner_of(ends: tuple[bool, ...]) -> tuple[Tensor, Tensor]:
        empty = torch.stack([low > high for low, high in zip(lo, hi, strict=True)]).any(0)
        index = torch.zeros_like(lo[0])
        for end, low, high, size in zip(ends, lo, hi, padded, strict=True):
            index = index * size + torch.where(empty, 0, high + 1 if end else low)
        sign = torch.where(empty, 0.0, -1.0 if sum(ends) % 2 else 1.0)
        return index.to(flat.device), sign.to(device=flat.device, dtype=flat.dtype)

    total = flat.new_zeros([*flat.shape[:-1], math.prod(padded)])
    for ends in itertools.product((False, True), repeat=len(sizes)):
        with compile_time():
            corner, signs = corner_of(ends)
        index, sign = (
            record_constant(functools.partial(_same, corner)),
            record_constant(functools.partial(_same, signs)),
        )
        total = total.index_add(-1, index, flat * sign)
    total = total.reshape([*flat.shape[:-1], *padded])
    for axis in range(len(sizes)):
        total = total.cumsum(axis - len(sizes))
    for axis, size in enumerate(sizes):
        total = total.narrow(axis - len(sizes), 0, size)
    return total.flatten(-len(sizes))


def _same(tensor: Tensor) -> Tensor:
    return tensor

"""Rows of other outcomes for estimators that evaluate the program below a site again.

Elements along dims that are not joined change in the same row, since no cost sees two of them: all single-element
changes of a ``[B, D]`` site whose costs are tied over ``B`` are ``D`` rows, not ``B * D``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from scg.estimators.base import SiteContext


def other_outcomes(context: SiteContext) -> Tensor:
    """The ``S - 1`` outcomes of each element that were not drawn.  ``[S-1, *dims | *elements | *event]``"""
    support, value, event = context.site.support, context.value, context.site.event_ndim
    assert support is not None
    count = len(support)
    if count == 2 and event == 0:
        return (support.sum() - value)[None]
    steps = torch.arange(1, count, device=value.device)
    return support[(drawn_index(context) + steps.reshape([-1, *[1] * (value.dim() - event)])) % count]


def drawn_index(context: SiteContext) -> Tensor:
    """Which outcome of the support each element is.  ``[*dims | *elements]``"""
    support, value, event = context.site.support, context.value, context.site.event_ndim
    assert support is not None
    same = value.unsqueeze(value.dim() - event) == support  # [*dims | *elements, S | *event]
    if event:
        same = same.flatten(-event).all(-1)
    return same.to(torch.int64).argmax(-1)


def joined_sizes(context: SiteContext) -> list[int]:
    """Sizes of the joined element dims."""
    return [context.site.element_shape[dim] for dim in context.joined]


def groups(context: SiteContext) -> int:
    """How many elements one cost may see: one row each changes all elements of all costs."""
    return math.prod(joined_sizes(context))


def selectors(context: SiteContext) -> Tensor:
    """Which elements each row changes.  ``[G, *elements | 1…]`` with size 1 along dims that are not joined"""
    shape = [size if dim in context.joined else 1 for dim, size in enumerate(context.site.element_shape)]
    count = groups(context)
    chosen = torch.eye(count, dtype=torch.bool, device=context.value.device)
    lead = context.value.dim() - len(shape) - context.site.event_ndim
    return chosen.reshape([count, *[1] * lead, *shape, *[1] * context.site.event_ndim])


def one_by_one(context: SiteContext, outcomes: Tensor, rest: Tensor | None = None) -> Tensor:
    """Rows in which one joined element takes an outcome and the others keep their draw.

    Args:
        context: of the site.
        outcomes: ``[R, *dims | *elements | *event]``.
        rest: what the other elements are, broadcastable to ``[R, G, *dims | *elements | *event]``; the draw if
            not given.

    Returns:
        ``[R * G, *dims | *elements | *event]``
    """
    rest = context.value if rest is None else rest
    return torch.where(selectors(context), outcomes.unsqueeze(1), rest).flatten(0, 1)


def own_rows(context: SiteContext, signal: Tensor) -> Tensor:
    """Of the signals of `one_by_one`'s rows, that of the row in which an element itself was changed.

    Args:
        context: of the site.
        signal: ``[R * G, *dims | *elements]``, of size 1 along elements where it does not vary.

    Returns:
        ``[R, *dims | *elements]``, of full size along joined dims.
    """
    lead = signal.dim() - 1 - len(context.site.element_shape)
    table = signal.reshape([-1, *joined_sizes(context), *signal.shape[1:]])
    for done, dim in enumerate(context.joined):
        axis = 1 + len(context.joined) - done + lead + dim  # of the element dim; that of the rows comes first
        if table.shape[axis] == 1:
            table = table.squeeze(axis).movedim(1, axis - 1)
        else:
            table = table.diagonal(0, 1, axis).movedim(-1, axis - 1)
    return table


def sum_joined(context: SiteContext, tensor: Tensor) -> Tensor:
    """Sums ``[*lead | *elements]`` along the joined dims, which stay with size 1."""
    first = tensor.dim() - len(context.site.element_shape)
    axes = [first + dim for dim in context.joined]
    return tensor.sum(axes, keepdim=True) if axes else tensor


def sum_like(tensor: Tensor, like: Tensor) -> Tensor:
    """Sums a full ``[*dims | *elements]`` along the dims where ``like`` has size 1, so that the two can be added."""
    axes = [axis for axis, size in enumerate(like.shape) if size == 1 and tensor.shape[axis] > 1]
    return tensor.sum(axes, keepdim=True) if axes else tensor

"""Other outcomes of a site, for estimators that evaluate the program below it again.

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
        return (context.constant(support.sum) - value)[None]
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


def sum_joined(context: SiteContext, tensor: Tensor) -> Tensor:
    """Sums ``[*lead | *elements]`` along the joined dims, which stay with size 1."""
    first = tensor.dim() - len(context.site.element_shape)
    axes = [first + dim for dim in context.joined]
    return tensor.sum(axes, keepdim=True) if axes else tensor


def sum_like(tensor: Tensor, like: Tensor) -> Tensor:
    """Sums a full ``[*dims | *elements]`` along the dims where ``like`` has size 1, so that the two can be added."""
    axes = [axis for axis, size in enumerate(like.shape) if size == 1 and tensor.shape[axis] > 1]
    return tensor.sum(axes, keepdim=True) if axes else tensor

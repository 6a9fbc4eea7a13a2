"""Other outcomes of a site, for estimators that evaluate the program below it again.

Elements along dims that are not joined change in the same row, since no cost sees two of them: all single-element
changes of a ``[B, D]`` site whose costs are tied over ``B`` are ``D`` rows, not ``B * D``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

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


@dataclass(frozen=True)
class Picked:
    """One of the joined elements of every group."""

    context: SiteContext
    index: Tensor | None
    """Which one, ``[*dims | *alone, 1]``; None where each element is its own group."""

    def of(self, tensor: Tensor, event_ndim: int = 0) -> Tensor:
        """The picked elements of ``[*lead, *dims | *elements | *event]``, of size 1 along joined dims.

        ``[*dims | *elements]`` are up to broadcasting.
        """
        if self.index is None:
            return tensor
        full, end = element_sizes(self.context), tensor.dim() - event_ndim
        wide = tensor.expand([*tensor.shape[: max(end - len(full), 0)], *full, *tensor.shape[end:]])
        axes = self._axes(wide, event_ndim)
        own = [axis - wide.dim() + tensor.dim() for axis in axes]
        if all(axis < 0 or tensor.shape[axis] == 1 for axis in own):
            return tensor
        flat, at = flat_groups(wide, axes, event_ndim)
        return _apart(flat.gather(at, self._index_in(flat, at)), axes, at, [1] * len(axes))

    def put(self, new: Tensor, tensor: Tensor, event_ndim: int = 0) -> Tensor:
        """``tensor`` with ``new``, as `of` gives it, for the picked elements; ``new`` may have dims in front."""
        if self.index is None:
            return new
        axes = self._axes(new, event_ndim)
        wide = tensor.expand([*new.shape[: new.dim() - tensor.dim()], *tensor.shape])
        (flat, at), (filled, _) = flat_groups(wide, axes, event_ndim), flat_groups(new, axes, event_ndim)
        changed = flat.scatter(at, self._index_in(flat, at), filled)
        return _apart(changed, axes, at, joined_sizes(self.context))

    def _axes(self, tensor: Tensor, event_ndim: int) -> list[int]:
        first = tensor.dim() - event_ndim - len(self.context.site.element_shape)
        return [first + dim for dim in self.context.joined]

    def _index_in(self, flat: Tensor, at: int) -> Tensor:
        assert self.index is not None
        lead, event = at + 1 - self.index.dim(), flat.shape[at + 1 :]
        index = self.index.reshape([*[1] * lead, *self.index.shape, *[1] * len(event)])
        return index.expand([*flat.shape[:at], 1, *event])


def pick(context: SiteContext, weights: Tensor) -> Picked:
    """One of the joined elements, with probability proportional to ``weights [*dims | *elements]``."""
    if not context.joined:
        return Picked(context, None)
    first = weights.dim() - len(context.site.element_shape)
    flat, _ = flat_groups(weights, [first + dim for dim in context.joined], 0)
    index = torch.multinomial(flat.reshape([-1, flat.shape[-1]]), 1)
    return Picked(context, index.reshape([*flat.shape[:-1], 1]))


def element_sizes(context: SiteContext) -> list[int]:
    """Full sizes of ``[*dims | *elements]``."""
    return list(context.value.shape[: context.value.dim() - context.site.event_ndim])


def flat_groups(tensor: Tensor, axes: Sequence[int], event_ndim: int) -> tuple[Tensor, int]:
    """The dims ``axes`` as one, before those of the event, and where that is."""
    at = tensor.dim() - event_ndim - len(axes)
    moved = tensor.movedim(tuple(axes), tuple(range(at, at + len(axes))))
    size = math.prod(moved.shape[at : at + len(axes)])
    return moved.reshape([*moved.shape[:at], size, *moved.shape[at + len(axes) :]]), at


def _apart(flat: Tensor, axes: Sequence[int], at: int, sizes: Sequence[int]) -> Tensor:
    """Undoes `flat_groups`."""
    parted = flat.reshape([*flat.shape[:at], *sizes, *flat.shape[at + 1 :]])
    return parted.movedim(tuple(range(at, at + len(axes))), tuple(axes))

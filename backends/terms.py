"""Parts of the surrogate, and their sum."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from scg.backends.recorder import summed

MANY = 4
"""From how many parts on they are joined before they are summed."""

SMALL = 1 << 13
"""Elements up to which a part is quicker joined as it is than summed along some dims first."""


@dataclass(frozen=True)
class Weighted:
    """A part of a scalar: the sum of ``tensor``, times ``factor``."""

    tensor: Tensor
    factor: float


def total_of(parts: Sequence[Weighted]) -> Tensor | None:
    """The sum of all parts; those with one factor are joined first, which a long chain has many of."""
    groups: dict[float, list[Tensor]] = {}
    for part in parts:
        groups.setdefault(part.factor, []).append(part.tensor)
    total: Tensor | None = None
    for factor, tensors in groups.items():
        if len(tensors) >= MANY:
            whole = [summed(tensor) for tensor in tensors]
            small = [tensor if of.numel() > SMALL else of for tensor, of in zip(tensors, whole, strict=True)]
            tensors = [torch.cat([tensor.reshape(-1) for tensor in small])]
        value = functools.reduce(torch.add, [summed(tensor).sum() if tensor.dim() else tensor for tensor in tensors])
        value = value if factor == 1.0 else value * factor
        total = value if total is None else total + value
    return total

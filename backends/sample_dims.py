"""Values with named sample dims: what the interpreter computes with.

A value of a node of shape ``[*S]`` is held as ``[*dims | *S]`` with exactly the sample dims it depends on, so that work
above a draw is done once however many rows the draw has. Names say which dims of two values are the same.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Batched:
    """A tensor ``[*dims | *S]`` and the names of its sample dims."""

    tensor: Tensor
    dims: tuple[str, ...] = ()

    @property
    def ndim(self) -> int:
        """Number of dims of one draw."""
        return self.tensor.dim() - len(self.dims)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one draw."""
        return tuple(self.tensor.shape[len(self.dims) :])


Value = Any
"""A `Batched`, or a tuple of them for an operation with several outputs."""


def stop_gradient(value: Batched) -> Batched:
    """The value without its gradient."""
    return Batched(value.tensor.detach(), value.dims) if value.tensor.requires_grad else value


@dataclass(frozen=True)
class SampleDim:
    """One named sample dim: how many rows, what they are, and whose."""

    name: str
    size: int
    kind: str
    """``iid``, ``enumerated``, ``weighted`` or ``counterfactual``."""
    site: str | None = None
    order: int = 0


class SampleDims:
    """The sample dims of one program, in their layout order."""

    def __init__(self, dims: Iterable[SampleDim] = ()) -> None:
        self.table = {dim.name: dim for dim in sorted(dims, key=lambda dim: dim.order)}
        self._place = {name: place for place, name in enumerate(self.table)}

    def __getitem__(self, name: str) -> SampleDim:
        return self.table[name]

    def size(self, name: str) -> int:
        return self.table[name].size

    def sizes(self, names: Sequence[str]) -> list[int]:
        return [self.table[name].size for name in names]

    def union(self, *groups: Sequence[str]) -> tuple[str, ...]:
        """The dims of all groups, in layout order."""
        wanted = set(itertools.chain.from_iterable(groups))
        return tuple(sorted(wanted & self._place.keys(), key=self._place.__getitem__))

    def align(self, value: Batched, dims: Sequence[str], ndim: int | None = None, *, full: bool = False) -> Tensor:
        """``value`` as ``[*dims | 1… | *S]``: size 1 for dims it lacks (expanded if ``full``), rank padded to ``ndim``.

        A value without sample dims is returned as it is unless ``full``: broadcasting from the right places it.
        """
        ndim = value.ndim if ndim is None else ndim
        if value.dims == tuple(dims) and value.ndim == ndim:
            return value.tensor
        if not value.dims and not full:
            return value.tensor
        lead = [self.size(name) if name in value.dims else 1 for name in dims]
        pad = [1] * (ndim - value.ndim)
        tensor = value.tensor.reshape([*lead, *pad, *value.shape])
        return tensor.expand([*self.sizes(dims), *pad, *value.shape]) if full else tensor

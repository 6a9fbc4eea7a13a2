"""Rows of a sequence after a later site was drawn: values computed before are read in the rows that survived.

    z_0 = [a b c]   x_0 = f(z_0)     the next site keeps children of rows 0, 0, 2
    z_1 = [d e f]   x_0 is read as [f(a) f(a) f(c)]

Values are rearranged when they are read, once, whatever number of sites was drawn since.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from scg.analysis.influence import Influence
from scg.backends.recorder import compile_time, record_constant
from scg.backends.sample_dims import Batched, SampleDims
from scg.estimators.frames import Frame


class Layout:
    """Where the elements of a node lie in the frame of a sequence."""

    def __init__(self, found: Influence, frames: Mapping[str, Frame]) -> None:
        self.found, self.frames = found, frames
        self._points: dict[Any, list[Tensor]] = {}

    def place(self, name: str, value: Batched, of: str, ndim: int) -> Batched:
        """``value``, ``[*dims | *frame]`` of sequence ``name``, as the elements of the node ``of`` meet it.

        Returns:
            ``[*dims | …]`` with ``ndim`` dims that broadcast to the first ones of the node.
        """
        frame = self.frames[name]
        lead = len(value.dims)
        if not frame.sizes:
            return Batched(value.tensor.reshape([*value.tensor.shape[:lead], *[1] * ndim]), value.dims)
        points = self.points(name, of, ndim)
        with compile_time():
            axes = [_tied(point, size) for point, size in zip(points, frame.sizes, strict=True)]
        tied = [axis for axis in axes if axis is not None]
        if len(set(tied)) == len(axes):
            order = sorted(range(len(tied)), key=tied.__getitem__)
            sizes = [1] * ndim
            for axis, size in zip(tied, frame.sizes, strict=True):
                sizes[axis] = size
            tensor = value.tensor.permute([*range(lead), *(lead + i for i in order)])
            return Batched(tensor.reshape([*tensor.shape[:lead], *sizes]), value.dims)
        index: list[Any] = [*[slice(None)] * lead, *(record_constant(_given(point)) for point in points)]
        return Batched(value.tensor[tuple(index)], value.dims)

    def points(self, name: str, of: str, ndim: int) -> list[Tensor]:
        """For each dim of the frame, the index each element of ``of`` sees; event dims, behind, share theirs."""
        key = (name, ndim, *self.key(name, of))
        if key not in self._points:
            with compile_time():
                found = self.frames[name].points(self.found, of)
                self._points[key] = [
                    (point.flatten(ndim)[..., 0] if point.dim() > ndim else point).contiguous() for point in found
                ]
        return self._points[key]

    def key(self, name: str, of: str) -> tuple[Any, ...]:
        """What `place` depends on: equal keys, equal places."""
        frame = self.frames[name]
        return tuple(frame.relations(self.found, of).items()) if frame.sizes else ()


def _given(tensor: Tensor) -> Callable[[], Tensor]:
    return lambda: tensor


def _tied(point: Tensor, size: int) -> int | None:
    """The dim along which element ``a`` sees index ``a``, if it is so."""
    wide = [dim for dim, n in enumerate(point.shape) if n > 1]
    if len(wide) != 1 or point.numel() != size:
        return None
    return wide[0] if torch.equal(point.flatten(), torch.arange(size)) else None


class Lineage:
    """For each sequence, which rows the rows of every later site go on from."""

    def __init__(self, dims: SampleDims, layout: Layout) -> None:
        self.dims, self.layout = dims, layout
        self._parents: dict[str, list[Batched]] = {name: [] for name in layout.frames}
        self._ancestors: dict[tuple[str, int, int], Batched] = {}
        self.age: dict[str, int] = dict.fromkeys(layout.frames, 0)
        """How many times the rows of each sequence have been rearranged."""

    def descend(self, name: str, parents: Batched) -> None:
        """Rearranges the rows of ``name``: ``parents``, ``[*dims | *frame]``, says which row each goes on from."""
        self._parents[name].append(parents)
        self.age = {**self.age, name: len(self._parents[name])}

    def follow(self, value: Any, of: str, born: Mapping[str, int], rank: int | None = None) -> Any:
        """``value`` in the rows of now.

        Args:
            value: ``[*dims | *S, …]``, or several of them.
            of: the node of shape ``[*S]``.
            born: the age of its rows.
            rank: how many dims ``S`` are; None for all.
        """
        if isinstance(value, Batched):
            for name in value.dims:
                if name in born and born[name] != self.age[name]:
                    value = self._gather(name, value, of, born[name], value.ndim if rank is None else rank)
            return value
        if isinstance(value, tuple):
            return tuple(self.follow(item, of, born, rank) for item in value)
        return value

    def _gather(self, name: str, value: Batched, of: str, born: int, ndim: int) -> Batched:
        ancestors = self._since(name, born)
        placed = self.layout.place(name, ancestors, of, ndim)
        dims = self.dims.union(value.dims, placed.dims)
        index = self.dims.align(placed, dims, ndim)
        index = index.reshape([*index.shape, *[1] * (value.ndim - ndim)])
        return Batched(_take(self.dims.align(value, dims), index, dims.index(name)), dims)

    def _since(self, name: str, born: int) -> Batched:
        """The row at age ``born`` that each row of now descends from."""
        now = self.age[name]
        found = self._parents[name][now - 1]
        for age in range(now - 2, born - 1, -1):
            key = (name, age, now)
            if key not in self._ancestors:
                parents = self._parents[name][age]
                dims = self.dims.union(parents.dims, found.dims)
                taken = _take(self.dims.align(parents, dims), self.dims.align(found, dims), dims.index(name))
                self._ancestors[key] = Batched(taken, dims)
            found = self._ancestors[key]
        return found


def _take(value: Tensor, index: Tensor, axis: int) -> Tensor:
    """``value`` at ``index`` along ``axis``, all other dims broadcast."""
    if index.numel() == index.shape[axis]:
        return value.index_select(axis, index.flatten())
    return torch.take_along_dim(value, index, axis)


class Rows(MutableMapping[str, Any]):
    """A table of values by node, each read in the rows of now.

    Args:
        lineage: of all sequences.
        rank: of a node, how many dims of it lead in its entry; all those of the entry unless given.
        nodes: where an entry is a list, the node of each item; else its key is the node.
    """

    def __init__(
        self,
        lineage: Lineage,
        rank: Callable[[str], int] | None = None,
        nodes: Callable[[str], Sequence[str]] | None = None,
    ) -> None:
        self._lineage, self._rank, self._nodes = lineage, rank, nodes
        self._values: dict[str, Any] = {}
        self._born: dict[str, Mapping[str, int]] = {}

    def __getitem__(self, key: str) -> Any:
        value, born = self._values[key], self._born[key]
        if born is not self._lineage.age:
            if self._nodes is None:
                value = self._lineage.follow(value, key, born, None if self._rank is None else self._rank(key))
            else:
                pairs = zip(value, self._nodes(key), strict=True)
                value = [self._lineage.follow(item, node, born) for item, node in pairs]
            self[key] = value
        return value

    def as_made(self, key: str) -> Any:
        """The entry in the rows that it was made in; None for none."""
        return self._values.get(key)

    def __setitem__(self, key: str, value: Any) -> None:
        self._values[key], self._born[key] = value, self._lineage.age

    def __delitem__(self, key: str) -> None:
        del self._values[key], self._born[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __contains__(self, key: object) -> bool:
        return key in self._values

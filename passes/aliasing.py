"""Who shares memory, found by running the graph on fake tensors.

Some operations alias their input without saying so: ``dropout`` in evaluation, ``broadcast_tensors``, a ``reshape``
that need not copy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from scg.ir import Bound, Cost, Depends, Graph, Input, Marginal, Node, Op, Param, Sample, TensorType, Type, map_refs

_LARGEST_MEMORY = 2**20
"""Elements up to which two regions of one memory are compared one by one."""


@dataclass(frozen=True)
class Region:
    """The elements of its memory that a tensor shows."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype

    @classmethod
    def of(cls, fake: Tensor) -> Region:
        return cls(tuple(fake.shape), tuple(fake.stride()), int(fake.storage_offset()), fake.dtype)

    @property
    def end(self) -> int:
        return self.offset + 1 + sum((n - 1) * s for n, s in zip(self.size, self.stride, strict=True))

    def overlaps(self, other: Region) -> bool:
        """Whether the two show a common element; yes where it would take long to tell."""
        if self.dtype != other.dtype:
            return True
        if 0 in self.size or 0 in other.size or self.end <= other.offset or other.end <= self.offset:
            return False
        if max(self.end, other.end) > _LARGEST_MEMORY:
            return True
        shown = torch.zeros(max(self.end, other.end), dtype=torch.bool)
        shown.as_strided(self.size, self.stride, self.offset).fill_(True)
        return bool(shown.as_strided(other.size, other.stride, other.offset).any())


@dataclass(eq=False)
class Memory:
    """One allocation."""

    owner: Node | None
    """The node that stands for a tensor from outside the graph."""
    obscure: Node | None = None
    """A node of which nobody knows whether it shares this memory."""


class Fakes:
    """The values of nodes without their data: shapes, strides and memory as they will be.

    Args:
        graph: its nodes are to be added in order.
        runs: whether operations are run; else every result is taken for new memory.
    """

    def __init__(self, graph: Graph, *, runs: bool) -> None:
        self.graph, self.runs = graph, runs
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        self._values: dict[str, Any] = {}
        self._memories: dict[int, Memory] = {}

    def __getitem__(self, name: str) -> Any:
        return self._values[name]

    def add(self, node: Node) -> Any:
        """The value of a node."""
        fake = self._values[node.name] = self._value(node)
        if isinstance(fake, Tensor) and isinstance(node, (Input, Param)):
            self._memories.setdefault(_storage(fake), Memory(node))
        return fake

    def run(self, node: Op) -> Any:
        """The value of an operation, as PyTorch computes it; raises what it raises."""
        args, kwargs = map_refs(self._values.__getitem__, (node.args, dict(node.kwargs)))
        with self._mode, torch.no_grad():
            fake = self._values[node.name] = node.target(*args, **kwargs)
        return fake

    def memory(self, fake: Tensor) -> Memory:
        """What the tensor is a view of."""
        return self._memories.setdefault(_storage(fake), Memory(None))

    def share(self, fake: Tensor, memory: Memory) -> None:
        """Takes ``fake`` for a view of a memory that its storage does not show."""
        self._memories[_storage(fake)] = memory

    def _value(self, node: Node) -> Any:
        if isinstance(node, Param):
            return self._mode.from_tensor(self.graph.tensors[node.path])
        if isinstance(node, (Bound, Cost, Depends, Marginal, Sample)) and node.value is not None:
            return self._values[node.value]
        if isinstance(node, Op) and self.runs:
            try:
                return self.run(node)
            except Exception:  # no rule for fakes: the operation may be fine, but its memory is unknown
                return self._obscure(node)
        return self._empty(node.type)

    def _obscure(self, node: Op) -> Any:
        fake = self._empty(node.type)
        inputs = (self._values.get(ref) for ref in node.inputs)
        for tensor in (*(fake if isinstance(fake, tuple) else (fake,)), *inputs):
            if isinstance(tensor, Tensor):
                self.memory(tensor).obscure = node
        return fake

    def _empty(self, type: Type) -> Any:
        if isinstance(type, tuple):
            return tuple(map(self._empty, type))
        if not isinstance(type, TensorType):
            return None
        with self._mode:
            return torch.empty(type.shape, dtype=type.dtype, device=type.device)


def _storage(fake: Tensor) -> int:
    return int(fake.untyped_storage()._cdata)

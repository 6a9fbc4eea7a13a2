"""A call into a Python function that the compiler does not look into, as one leaf of the generated program."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from scg.backends.runtime import call_opaque
from scg.errors import LoweringError
from scg.ir import Opaque, TensorType


class OpaqueCall:
    """Calls ``node.fn`` once a sample row, or once with the rows folded into the first dim.

    Args:
        node: the opaque node.
        sizes: sizes of the leading sample dims of the batched arguments.
        batched: per argument, whether it carries those dims.
    """

    def __init__(self, node: Opaque, sizes: tuple[int, ...], batched: tuple[bool, ...]) -> None:
        self.node, self.sizes, self.batched = node, sizes, batched
        self.effect = not node.pure
        self.types = node.type if isinstance(node.type, tuple) else (node.type,)
        self.__name__ = self.__qualname__ = node.fn.__name__
        self.__module__ = __name__

    def fake(self, *args: Any) -> Any:
        """What the call will return, without making it."""
        return self._pack([torch.empty([*self.sizes, *t.shape], dtype=t.dtype, device=t.device) for t in self._types()])

    def _types(self) -> list[TensorType]:
        return [t for t in self.types if isinstance(t, TensorType)]

    def _pack(self, outs: list[Tensor]) -> Any:
        return tuple(outs) if isinstance(self.node.type, tuple) else outs[0]

    @property
    def folded(self) -> bool:
        """Whether one call takes all rows."""
        return self.node.batch_dims >= 1

    def __call__(self, *args: Any) -> Any:
        rows = math.prod(self.sizes) if self.folded and any(self.batched) else 1
        return self._pack(call_opaque(lambda *a: self._call(a, rows), args, self.batched, self.sizes, self.folded))

    def _call(self, args: tuple[Any, ...], rows: int) -> list[Tensor]:
        found = self.node.fn(*args)
        outs = list(found) if isinstance(found, (tuple, list)) else [found]
        for out, type_ in zip(outs, self._types(), strict=True):
            want = list(type_.shape)
            if rows > 1:
                want[0] *= rows
            if list(out.shape) != want:
                raise LoweringError(
                    f"{self.node.fn.__qualname__} ({self.node.loc}) returned shape {list(out.shape)} where {want} was "
                    f"declared; give @scg.opaque(shape=…) the shape it returns"
                )
        return [
            torch.as_tensor(out).to(device=type_.device, dtype=type_.dtype)
            for out, type_ in zip(outs, self._types(), strict=True)
        ]

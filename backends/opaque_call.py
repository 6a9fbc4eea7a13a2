"""A call into a Python function that the compiler does not look into, as one leaf of the generated program."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

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

    def __call__(self, *args: Any) -> Any:
        with torch.no_grad():
            plain = [arg.detach() if isinstance(arg, Tensor) else arg for arg in args]
            rows = math.prod(self.sizes)
            if not any(self.batched):
                return self._pack(self._call(plain))
            if self.node.batch_dims >= 1:
                return self._pack(self._folded(plain, rows))
            flat = [
                arg.reshape([rows, *arg.shape[len(self.sizes) :]]) if carried else arg
                for arg, carried in zip(plain, self.batched, strict=True)
            ]
            each = [
                self._call([arg[k] if carried else arg for arg, carried in zip(flat, self.batched, strict=True)])
                for k in range(rows)
            ]
            return self._pack([self._unflatten(torch.stack(outs)) for outs in zip(*each, strict=True)])

    def _folded(self, plain: list[Any], rows: int) -> list[Tensor]:
        lead = len(self.sizes)
        folded = []
        for arg, carried in zip(plain, self.batched, strict=True):
            if carried:
                folded.append(arg.reshape([rows * arg.shape[lead], *arg.shape[lead + 1 :]]))
            elif isinstance(arg, Tensor) and arg.dim() >= 1:
                folded.append(arg.expand([rows, *arg.shape]).reshape([rows * arg.shape[0], *arg.shape[1:]]))
            else:
                folded.append(arg)
        outs = self._call(folded, rows)
        return [self._unflatten(out.reshape([rows, out.shape[0] // rows, *out.shape[1:]])) for out in outs]

    def _unflatten(self, stacked: Tensor) -> Tensor:
        return stacked.reshape([*self.sizes, *stacked.shape[1:]])

    def _call(self, args: list[Any], rows: int = 1) -> list[Tensor]:
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

"""Values that do not vary along a dim are computed once along it.

    z    [K] expanded to [K, B]          every example of a batch has the same rows
    t[z] [K, B, K]                       is t[[K, 1]] expanded: one table of transitions, not one an example

A tensor made by ``expand`` is remembered with what it was made from, and so is what follows from it by operations that
leave its dims apart; whatever else reads it gets the expanded tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

_POINTWISE = {
    "add", "sub", "rsub", "mul", "div", "true_divide", "neg", "pow", "exp", "log", "log1p", "expm1", "sqrt", "square",
    "abs", "sigmoid", "tanh", "softplus", "clamp", "where", "detach", "reciprocal", "gt", "lt", "ge", "le", "eq", "ne",
    "__radd__", "__rmul__", "__rsub__", "__truediv__", "__pow__", "__rpow__", "float", "double", "long", "relu",
}  # fmt: skip
_REDUCTIONS = {"sum", "logsumexp", "amax", "amin", "mean"}

Call = Callable[..., Any]
"""Records one call and returns its result."""


class Narrowing:
    """Which tensors are expanded, and from what."""

    def __init__(self, call: Call) -> None:
        self._call = call
        self._narrow: dict[int, Tensor] = {}

    def __call__(self, tensor: Tensor) -> Tensor:
        """What ``tensor`` is an expansion of: of its rank, size 1 along dims where it does not vary."""
        return self._narrow.get(id(tensor), tensor)

    def expanded(self, out: Tensor, source: Tensor) -> None:
        """Takes note that ``out`` is ``source`` expanded."""
        narrow = self(source)
        if out.dim() > narrow.dim():
            narrow = self._call(Tensor.reshape, narrow, (*[1] * (out.dim() - narrow.dim()), *narrow.shape))
        if narrow.shape != out.shape:
            self._narrow[id(out)] = narrow

    def attempt(
        self, func: Callable[..., Any], name: str, args: Sequence[Any], kwargs: dict[str, Any]
    ) -> Tensor | None:
        """The result of a call, computed on narrow tensors; None where that cannot be done or gains nothing."""
        if not any(isinstance(arg, Tensor) and id(arg) in self._narrow for arg in self._flat(args)):
            return None
        if name in _POINTWISE:
            return self._pointwise(func, args, kwargs)
        if name in _REDUCTIONS:
            return self._reduction(func, args, kwargs)
        rules = {"__getitem__": self._index, "gather": self._gather, "reshape": self._reshape, "movedim": self._movedim}
        rule = rules.get(name)
        if rule is not None and not kwargs:
            return rule(func, args)
        if name in ("unsqueeze", "squeeze") and len(args) == 2 and not kwargs:
            return self._one_dim(func, args)
        return None

    @staticmethod
    def _flat(args: Sequence[Any]) -> list[Any]:
        return [item for arg in args for item in (arg if isinstance(arg, (tuple, list)) else [arg])]

    def _widened(self, narrow: Tensor, shape: Sequence[int]) -> Tensor:
        if tuple(narrow.shape) == tuple(shape):
            return narrow
        wide: Tensor = self._call(Tensor.expand, narrow, tuple(shape))
        self.expanded(wide, narrow)
        return wide

    def _pointwise(self, func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor:
        shape = torch.broadcast_shapes(*(arg.shape for arg in args if isinstance(arg, Tensor)))
        narrow: Tensor = self._call(func, *tree_map_only(Tensor, self, tuple(args)), **kwargs)
        return self._widened(narrow, shape)

    def _reduction(self, func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor | None:
        x, narrow = args[0], self(args[0])
        dims = args[1] if len(args) > 1 else kwargs.get("dim")
        keep = args[2] if len(args) > 2 else kwargs.get("keepdim", False)
        if dims is None:
            return None
        gone = {dim % x.dim() for dim in (dims if isinstance(dims, (tuple, list)) else [dims])}
        if any(narrow.shape[dim] != x.shape[dim] for dim in gone):
            return None
        shape = [1 if dim in gone else size for dim, size in enumerate(x.shape) if keep or dim not in gone]
        return self._widened(self._call(func, narrow, *args[1:], **kwargs), shape)

    def _one_dim(self, func: Callable[..., Any], args: Sequence[Any]) -> Tensor | None:
        x, dim = args
        squeezes = getattr(func, "__name__", "") == "squeeze"
        if not isinstance(dim, int):
            return None
        at = dim % (x.dim() if squeezes else x.dim() + 1)
        if squeezes and x.shape[at] != 1:
            return x  # type: ignore[no-any-return]
        shape = [*x.shape[:at], *x.shape[at + 1 :]] if squeezes else [*x.shape[:at], 1, *x.shape[at:]]
        return self._widened(self._call(func, self(x), dim), shape)

    def _movedim(self, func: Callable[..., Any], args: Sequence[Any]) -> Tensor | None:
        x, source, target = args
        if not isinstance(source, int) or not isinstance(target, int):
            return None
        order = [dim for dim in range(x.dim()) if dim != source % x.dim()]
        order.insert(target % x.dim(), source % x.dim())
        return self._widened(self._call(func, self(x), source, target), [x.shape[dim] for dim in order])

    def _reshape(self, func: Callable[..., Any], args: Sequence[Any]) -> Tensor | None:
        """Where nothing but dims of size 1 come or go."""
        x, shape = args[0], list(args[1] if isinstance(args[1], (tuple, list)) else args[1:])
        wide = [dim for dim, size in enumerate(x.shape) if size != 1]
        if -1 in shape or [size for size in shape if size != 1] != [x.shape[dim] for dim in wide]:
            return None
        sizes = iter([self(x).shape[dim] for dim in wide])
        narrow = self._call(func, self(x), tuple(next(sizes) if size != 1 else 1 for size in shape))
        return self._widened(narrow, shape)

    def _index(self, func: Callable[..., Any], args: Sequence[Any]) -> Tensor | None:
        """``table[rows]``, and a slice of the last dim."""
        x, index = args
        parts = index if isinstance(index, tuple) else (index,)
        if len(parts) == 1 and isinstance(parts[0], Tensor) and id(x) not in self._narrow:
            rows = parts[0]
            if rows.dtype == torch.bool:
                return None
            return self._widened(self._call(func, x, (self(rows),)), [*rows.shape, *x.shape[1:]])
        if len(parts) == 2 and parts[0] is Ellipsis and isinstance(parts[1], slice):
            narrow, left = self(x), len(range(*parts[1].indices(x.shape[-1])))
            sliced = self._call(func, narrow, index) if narrow.shape[-1] == x.shape[-1] else narrow
            return self._widened(sliced, [*x.shape[:-1], left]) if left else None
        return None

    def _gather(self, func: Callable[..., Any], args: Sequence[Any]) -> Tensor | None:
        x, dim, index = args
        at = dim % x.dim()
        rest = [d for d in range(x.dim()) if d != at]
        if any(x.shape[d] != index.shape[d] for d in rest):
            return None
        narrow, rows = self(x), self(index)
        if narrow.shape[at] != x.shape[at] or rows.shape[at] != index.shape[at]:
            return None
        common = [max(narrow.shape[d], rows.shape[d]) if d != at else 0 for d in range(x.dim())]
        sizes = [[size if d != at else tensor.shape[at] for d, size in enumerate(common)] for tensor in (narrow, rows)]
        found = self._call(func, self._widened(narrow, sizes[0]), dim, self._widened(rows, sizes[1]))
        return self._widened(found, index.shape)

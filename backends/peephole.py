"""Calls that are recorded as simpler ones of the same value.

sum(-x)              ->  -sum(x)        the sum has fewer elements to negate, backward too
-(-x)                ->  x
x.permute(0, 1, 2)   ->  x              likewise movedim that moves nothing
torch.tensor([…])    ->  a constant     made once, not at every step
ones_like(scalar)    ->  a constant     likewise, and what its argument needed goes
t[[0, 1, …, n - 1]]  ->  t              every row in order, a view: the rows of an enumerated index
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from scg.backends.recorder import Recorder

_NEGATIONS = {"neg", "__neg__", "negative"}
_SUMS = {"sum", "mean"}
_TABLES = {torch.tensor, torch.arange, torch.eye}
_FILLED = {"ones_like": 1, "zeros_like": 0}
_LARGEST_TABLE = 1024
"""Elements of a constant; more of them are quicker made than read."""


class Peephole:
    """Remembers what the recorded calls so far have negated."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._negated: dict[int, Tensor] = {}

    def simpler(self, func: Callable[..., Any], name: str, args: Any, kwargs: dict[str, Any]) -> Any:
        """The result of an equal, simpler call; None where there is none."""
        if func in _TABLES:
            return self._table(func, args, kwargs)
        first = args[0] if args else None
        if not isinstance(first, Tensor):
            return None
        if name in _FILLED and first.dim() == 0 and not kwargs.get("requires_grad"):
            made = {key: kwargs.get(key) or getattr(first, key) for key in ("dtype", "device")}
            return self._table(torch.tensor, (_FILLED[name],), made)
        if name == "__getitem__":
            return self._all_rows(first, args[1])
        inner = self._negated.get(id(first))
        if inner is not None and name in _NEGATIONS:
            return inner
        if inner is not None and name in _SUMS:
            return self._recorder.call(torch.neg, self._recorder.call(func, inner, *args[1:], **kwargs))
        return first if _moves_nothing(name, first, args[1:]) and not kwargs else None

    def recorded(self, name: str, args: Any, out: Any) -> None:
        """Takes note of a call."""
        if name in _NEGATIONS and isinstance(args[0], Tensor) and args[0].is_floating_point():
            self._negated[id(out)] = args[0]

    def _all_rows(self, tensor: Tensor, index: Any) -> Tensor | None:
        """A view of ``tensor`` where ``index`` counts through all of its rows."""
        rows = index[0] if isinstance(index, tuple) and len(index) == 1 else index
        if not isinstance(rows, Tensor) or rows.dim() == 0 or tensor.dim() == 0 or rows.numel() != len(tensor):
            return None
        known = self._recorder.value_of(rows)
        if known is None or known.dtype != torch.int64:
            return None
        from scg.backends.recorder import compile_time

        with compile_time():
            if known.flatten().tolist() != [*range(len(tensor))]:
                return None
        view: Tensor = self._recorder.call(torch.Tensor.reshape, tensor, (*rows.shape, *tensor.shape[1:]))
        return view

    def _table(self, func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Tensor | None:
        plain = all(isinstance(item, (int, float, bool, list, tuple)) for item in args)
        if not plain or kwargs.get("requires_grad"):
            return None
        from scg.backends.recorder import compile_time

        with compile_time():
            made: Tensor = func(*args, **kwargs)
        return self._recorder.constant(made) if made.numel() <= _LARGEST_TABLE else None


def _moves_nothing(name: str, tensor: Tensor, where: Any) -> bool:
    if name == "permute":
        order = where[0] if len(where) == 1 and not isinstance(where[0], int) else where
        return list(order) == [*range(tensor.dim())]
    if name == "movedim" and len(where) == 2:
        source, target = ([item] if isinstance(item, int) else list(item) for item in where)
        return [dim % tensor.dim() for dim in source] == [dim % tensor.dim() for dim in target]
    return False

"""A gather of an elementwise result is recorded as the elementwise call on what is gathered.

f(x, y).gather(dim, i)  ->  f(x.gather(dim, i), y.gather(dim, i))     where a few of many elements are taken

The whole result goes where nothing else reads it, and so does its derivative.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

ELEMENTWISE = {
    "add", "sub", "mul", "div", "__truediv__", "neg", "__neg__", "exp", "log", "sigmoid", "clamp_min", "clamp_max",
    "binary_cross_entropy_with_logits",
}  # fmt: skip
_FEW = 4
"""At most one element of so many."""


def gathered(call: Callable[..., Any], of: Tensor, made: tuple[Any, ...], dim: int, index: Tensor) -> Tensor | None:
    """The gather of ``of``, which the call ``made`` of a function and its arguments gave; None where it gains nothing.

    Args:
        call: records a call.
    """
    dim %= of.dim()
    others = [axis for axis in range(of.dim()) if axis != dim]
    if index.shape[dim] * _FEW > of.shape[dim] or any(index.shape[axis] != of.shape[axis] for axis in others):
        return None

    def taken(arg: Any) -> Any:
        if not isinstance(arg, Tensor):
            return arg
        axis = dim - of.dim() + arg.dim()
        if axis < 0 or arg.shape[axis] == 1:
            return arg
        return call(Tensor.gather, arg if arg.shape == of.shape else call(Tensor.expand, arg, of.shape), dim, index)

    func, *args = made
    found: Tensor = call(func, *map(taken, args))
    return found

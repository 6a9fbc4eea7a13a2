"""What a generated program calls besides torch. Nothing here needs scg: the text of these functions is written into
ejected code as it stands.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def variable(value: Tensor) -> Tensor:
    """The value as an independent variable to differentiate by."""
    return value.detach().requires_grad_()


def input_gradient(scalar: Tensor, wrt: Tensor, differentiable: bool) -> Tensor:
    """The gradient of a scalar in one tensor, as a value of the program."""
    if not scalar.requires_grad:
        return torch.zeros_like(wrt)
    (found,) = torch.autograd.grad(scalar, wrt, create_graph=differentiable, retain_graph=True, allow_unused=True)
    return torch.zeros_like(wrt) if found is None else found


def input_gradients(scalar: Tensor, wrt: Sequence[Tensor], differentiable: bool) -> list[Tensor]:
    """The gradients of a scalar in several tensors, as values of the program."""
    if not scalar.requires_grad:
        return [torch.zeros_like(item) for item in wrt]
    found = torch.autograd.grad(scalar, wrt, create_graph=differentiable, retain_graph=True, allow_unused=True)
    return [torch.zeros_like(item) if g is None else g for item, g in zip(wrt, found, strict=True)]


def weigh_path(value: Tensor, draw: Tensor, factor: Tensor) -> Tensor:
    """``value``; from now on the gradient that reaches ``draw``, by whatever way, is multiplied by ``factor``."""
    if draw.requires_grad:
        draw.register_hook(lambda gradient: gradient * factor)
    return value.view_as(value)


def refuse_gradient(value: Tensor, text: str) -> Tensor:
    """``value``, whose derivative is an error."""

    def refuse(gradient: Tensor) -> None:
        raise RuntimeError(text)

    found = value.view_as(value)
    if found.requires_grad:
        found.register_hook(refuse)
    return found


def loop_rows(single: Callable[..., Any], tensors: Sequence[Tensor], axes: Sequence[int | None], rows: int) -> Any:
    """Calls ``single`` once a row of the tensors that have an axis, and stacks what it returns."""
    found = [single(*(t if axis is None else t[k] for t, axis in zip(tensors, axes, strict=True))) for k in range(rows)]
    if isinstance(found[0], Tensor):
        return torch.stack(found)
    return tuple(torch.stack(items) for items in zip(*found, strict=True))


def call_opaque(
    fn: Callable[..., Any], args: Sequence[Any], batched: Sequence[bool], sizes: Sequence[int], fold: bool
) -> list[Any]:
    """Calls ``fn`` once a sample row, or once with the rows folded into the first dim; without gradient.

    Args:
        fn: returns one value or several.
        args: of which some carry the leading sample dims ``sizes``.
        batched: per argument, whether it does.
        sizes: sizes of the sample dims.
        fold: one call for all rows.
    """

    def listed(out: Any) -> list[Any]:
        return list(out) if isinstance(out, (tuple, list)) else [out]

    with torch.no_grad():
        plain = [arg.detach() if isinstance(arg, Tensor) else arg for arg in args]
        if not any(batched):
            return listed(fn(*plain))
        lead, rows = len(sizes), math.prod(sizes)
        flat = [
            arg.reshape([rows, *arg.shape[lead:]]) if carried else arg
            for arg, carried in zip(plain, batched, strict=True)
        ]
        if fold:
            for i, arg in enumerate(flat):
                if isinstance(arg, Tensor) and (batched[i] or arg.dim() >= 1):
                    wide = arg if batched[i] else arg.expand([rows, *arg.shape])
                    flat[i] = wide.reshape([rows * wide.shape[1], *wide.shape[2:]])
            outs = listed(fn(*flat))
            return [out.reshape([*sizes, out.shape[0] // rows, *out.shape[1:]]) for out in outs]
        each = [
            listed(fn(*(arg[k] if carried else arg for arg, carried in zip(flat, batched, strict=True))))
            for k in range(rows)
        ]
        stacked = [torch.stack([torch.as_tensor(out) for out in outs]) for outs in zip(*each, strict=True)]
        return [out.reshape([*sizes, *out.shape[1:]]) for out in stacked]

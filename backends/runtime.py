"""What a generated program calls besides torch. Nothing here needs scg: the text of these functions is written into
ejected code as it stands.
"""

from __future__ import annotations

import functools
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


def log_prob_of_bits(logits: Tensor, bits: Tensor) -> Tensor:
    """Minus the binary cross entropy of logits, summed over the last dim, where no gradient is wanted.

    One exponential an element and one logarithm for many, `sum log sigmoid(|x|) = log prod sigmoid(|x|)`: factors of at
    least a half, 112 of which underflow in no dtype of 32 bits.

    Args:
        logits: ``[*N, D]``.
        bits: zeros and ones, or anything between; broadcast to ``logits``.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    size = logits.abs()
    total = torch.addcmul(size, logits, 0.5 - bits, value=2).sum(-1) * -0.5  # relu(x) - x b, which is exact for bits
    many = size.shape[-1] // 112 * 112
    factors, rest = size.sigmoid_().split([many, size.shape[-1] - many], -1)
    if many:
        total = total + factors.unflatten(-1, (-1, 112)).prod(-1).log().sum(-1)
    return total + rest.prod(-1).log() if rest.shape[-1] else total


def log_ratio_of_bits(
    logits: Tensor, change: Tensor, weight: Tensor, bits: Tensor, size: float | None = None
) -> Tensor:
    r"""By how much `log_prob_of_bits` grows where ``change * weight`` is added to the logits, without gradient.

    .. math:: a \sum_j b_j w_j - \log \prod_j \big(q_j + p_j e^{a w_j}\big)

    Where all changes ``a`` are of one size, as those of bits are, ``exp(a w)`` is one of two tables of the weights, and
    there is one logarithm for as many factors as cannot overflow.

    Args:
        logits: ``[*N, J]``.
        change: ``[*N, D]`` with any dims in front, of each on its own.
        weight: ``[D, J]``.
        bits: ``[*N, J]``.
        size: the absolute value of all changes, where it is known.

    Returns:
        The shape of ``change``.
    """
    if torch.is_autocast_enabled(weight.device.type) or weight.dtype.itemsize < 4:
        dtype = torch.promote_types(weight.dtype, torch.float32)
        with torch.autocast(weight.device.type, enabled=False):
            return log_ratio_of_bits(logits.to(dtype), change.to(dtype), weight.to(dtype), bits.to(dtype), size)
    scale, many = table_size(change, weight, size)
    if not many:
        x, parts = logits.unsqueeze(-2), changes_in_parts(logits, change, weight)
        moved = [log_prob_of_bits(torch.addcmul(x, a.unsqueeze(-1), w), bits.unsqueeze(-2)) for a, w in parts]
        return torch.cat(moved, -1) - log_prob_of_bits(logits, bits).unsqueeze(-1)

    raised = change.contiguous().view(-1, change.shape[-1]).relu()  # [N, D], 0 or 1
    raised, growth = (raised, weight) if scale in (0.0, 1.0) else (raised / scale, scale * weight)
    growth = growth.t().contiguous().unsqueeze(1).exp()  # [J, 1, D]
    x = logits if change.dim() == logits.dim() else logits.expand(*change.shape[:-1], logits.shape[-1])
    x = x.reshape(len(raised), logits.shape[-1]).t().unsqueeze(-1)  # [J, N, 1]
    tables = growth.reciprocal(), growth, x.sigmoid(), x.neg().sigmoid_()

    def log_product(low: Tensor, high: Tensor, p: Tensor, q: Tensor) -> Tensor:
        return torch.lerp(low, high, raised).mul_(p).add_(q).prod(0).log_()

    many = min(many, max((1 << 20) // max(raised.numel(), 1), 1))  # in a cache
    if many >= len(x):
        log_sum = log_product(*tables)
    else:
        low, high, p, q = (table.split(many) for table in tables)
        log_sum = functools.reduce(torch.add, map(log_product, low, high, p, q))
    return torch.sub(change * torch.nn.functional.linear(bits, weight), log_sum.view_as(change))


def log_ratio_of_class(
    logits: Tensor, change: Tensor, weight: Tensor, index: Tensor, size: float | None = None
) -> Tensor:
    r"""By how much the log probability of a class grows where ``change * weight`` is added to the logits of all.

    .. math:: a w_k - \log \sum_j p_j e^{a w_j}

    Without gradient, and a product of matrices where all changes ``a`` are of one size, as those of bits are.

    Args:
        logits: ``[*N, C]``.
        change: ``[*N, D]``, of each on its own.
        weight: ``[D, C]``.
        index: which class ``k``.  ``[*N]``
        size: the absolute value of all changes, where it is known.

    Returns:
        ``[*N, D]``.
    """
    if torch.is_autocast_enabled(weight.device.type) or weight.dtype.itemsize < 4:
        dtype = torch.promote_types(weight.dtype, torch.float32)
        with torch.autocast(weight.device.type, enabled=False):
            return log_ratio_of_class(logits.to(dtype), change.to(dtype), weight.to(dtype), index, size)
    scale, factors = table_size(change, weight, size)
    total = change * torch.embedding(weight.t(), index)
    if not factors:
        x, parts = logits.unsqueeze(-2), changes_in_parts(logits, change, weight)
        moved = [torch.addcmul(x, a.unsqueeze(-1), w).logsumexp(-1) for a, w in parts]
        return total - (torch.cat(moved, -1) - logits.logsumexp(-1, keepdim=True))
    p, high = logits.softmax(-1), (weight if scale == 1.0 else scale * weight).exp()
    low, high = (torch.nn.functional.linear(p, growth) for growth in (high.reciprocal(), high))
    return total - torch.lerp(low, high, change.relu() / (scale or 1.0)).log_()


def changes_in_parts(logits: Tensor, change: Tensor, weight: Tensor) -> list[tuple[Tensor, Tensor]]:
    """So many of the ``D`` changes and their weights at once that the logits after them do not take too much memory."""
    large = weight.device.type != "cpu" or torch.compiler.is_compiling()  # memory, or kernels that write none of it
    some = max((1 << (26 if large else 19)) // max(logits.numel(), 1), 1)
    return list(zip(change.split(some, -1), weight.contiguous().split(some), strict=True))


def table_size(change: Tensor, weight: Tensor, size: float | None) -> tuple[float, int]:
    """The absolute value of all changes, and how many factors ``exp(change * weight)`` can be multiplied.

    No factors where the changes are of several sizes, or too few; nor where to look at them would be to wait.
    """
    if weight.device.type != "cpu" or torch.compiler.is_compiling():
        return 0.0, 0
    if size is None:
        low, size = (float(bound) for bound in change.abs().aminmax())
        if low != size:
            return 0.0, 0
    bound, many = 0.9 * math.log(torch.finfo(weight.dtype).max), weight.shape[-1]
    reach = size * max(abs(float(end)) for end in weight.aminmax())
    if not reach < bound / 4:  # or not a number
        return size, 0
    if reach * many > bound and size * float(weight.abs().sum(-1).max()) <= bound:
        return size, many  # most of them are smaller
    return size, int(bound / max(reach, 1e-9))


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

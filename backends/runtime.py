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


@functools.cache
def outcomes_of_four(dtype: torch.dtype) -> Tensor:
    """All outcomes of four bits, halved and centred.  ``[4, 16]``"""
    bit = torch.tensor([-0.5, 0.5], dtype=dtype, device="cpu")
    return torch.cartesian_prod(bit, bit, bit, bit).t().contiguous()


def shares_of_four(logits: Tensor) -> Tensor:
    """How likely each outcome of four bits is, of four at a time; the last ones with bits of no weight.

    Args:
        logits: ``[*N, J]``.

    Returns:
        ``[prod N, ceil(J / 4), 16]``.
    """
    if torch.is_autocast_enabled(logits.device.type) or logits.dtype.itemsize < 4:
        with torch.autocast(logits.device.type, enabled=False):
            return shares_of_four(logits.to(torch.promote_types(logits.dtype, torch.float32)))
    flat = logits.reshape(-1, logits.shape[-1])
    if odd := -flat.shape[-1] % 4:
        flat = torch.nn.functional.pad(flat, (0, odd))
    sums = torch.mm(flat.reshape(-1, 4), outcomes_of_four(flat.dtype))
    return sums.view(len(flat), flat.shape[-1] // 4, 16).softmax(-1)


def log_products_of_four(shares: Tensor, moves: Tensor, at_once: int) -> Tensor:
    """``sum_j log(q_j exp(-m_j / 2) + p_j exp(m_j / 2))``, by products of matrices.

    Args:
        shares: `shares_of_four` of the logits.  ``[N, J / 4, 16]``
        moves: ``m``.  ``[M, J]``
        at_once: how many fours of factors are multiplied before the logarithm, which must not overflow.

    Returns:
        ``[N, M]``.
    """
    outcomes = outcomes_of_four(moves.dtype)

    def log_product(likely: Tensor, moves: Tensor) -> Tensor:
        growth = torch.mm(moves.reshape(-1, 4), outcomes).view(len(moves), likely.shape[1], 16).exp_()
        return torch.bmm(likely.transpose(0, 1), growth.permute(1, 2, 0)).prod(0).log_()

    if at_once >= shares.shape[1]:
        return log_product(shares, moves)
    parts = zip(shares.split(at_once, 1), moves.split(4 * at_once, 1), strict=True)
    return functools.reduce(torch.add, [log_product(*part) for part in parts])


def log_ratio_of_bits(
    logits: Tensor,
    change: Tensor,
    weight: Tensor,
    bits: Tensor,
    size: float | None = None,
    shares: Tensor | None = None,
) -> Tensor:
    r"""By how much `log_prob_of_bits` grows where ``change * weight`` is added to the logits, without gradient.

    .. math:: a \sum_j \big(b_j - \tfrac12\big) w_j - \log \prod_j \big(q_j e^{-a w_j / 2} + p_j e^{a w_j / 2}\big)

    Where all changes ``a`` are of one size, as those of bits are, four factors at a time are a product of matrices: of
    the sixteen outcomes of four bits, how likely each is, a table of the logits, times how the change weighs it, a
    table of the weights. So many are multiplied as cannot overflow.

    Args:
        logits: ``[*N, J]``.
        change: ``[*N, D]`` with any dims in front, of each on its own.
        weight: ``[D, J]``.
        bits: ``[*N, J]``.
        size: the absolute value of all changes, where it is known.
        shares: ``shares_of_four(logits)``, where several calls share it.

    Returns:
        The shape of ``change``.
    """
    if torch.is_autocast_enabled(weight.device.type) or weight.dtype.itemsize < 4:
        dtype = torch.promote_types(weight.dtype, torch.float32)
        with torch.autocast(weight.device.type, enabled=False):
            logits, change, weight, bits = (item.to(dtype) for item in (logits, change, weight, bits))
            return log_ratio_of_bits(logits, change, weight, bits, size, shares)
    scale, factors = table_size(change, weight, size)
    if not factors:
        large = weight.device.type != "cpu" or torch.compiler.is_compiling()  # memory, or kernels that write none of it
        some = max((1 << (26 if large else 19)) // max(logits.numel(), 1), 1)  # of D at once
        x, rows = logits.unsqueeze(-2), zip(change.split(some, -1), weight.contiguous().split(some), strict=True)
        moved = [log_prob_of_bits(torch.addcmul(x, a.unsqueeze(-1), w), bits.unsqueeze(-2)) for a, w in rows]
        return torch.cat(moved, -1) - log_prob_of_bits(logits, bits).unsqueeze(-1)

    sides = torch.tensor([scale, -scale], dtype=weight.dtype).view(2, 1, 1)
    moves = (sides * weight).flatten(0, 1)  # [2D, J]
    if odd := -moves.shape[-1] % 4:
        moves = torch.nn.functional.pad(moves, (0, odd))
    shares = shares_of_four(logits) if shares is None else shares  # [N, J / 4, 16]
    fits = (1 << (21 if weight.dtype.itemsize == 4 else 20)) // max(len(shares) * len(moves), 1)  # in a cache
    # each factor is half as far from 1 as one of `table_size`
    log_sum = log_products_of_four(shares, moves, min(factors // 2, max(fits, 1)))
    up, down = log_sum.view(*logits.shape[:-1], len(moves)).chunk(2, -1)
    slope = torch.sub(torch.nn.functional.linear(bits - 0.5, weight), up - down, alpha=0.5 / (scale or 1.0))
    return torch.addcmul((up + down) * -0.5, change, slope)


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
    total = change * torch.nn.functional.embedding(index, weight.t())
    if not factors:
        moved = torch.addcmul(logits.unsqueeze(-2), change.unsqueeze(-1), weight)  # [*N, D, C]
        return total - (moved.logsumexp(-1) - logits.logsumexp(-1, keepdim=True))
    p, growth = logits.softmax(-1), (weight if scale == 1.0 else scale * weight).exp()
    up, down = torch.nn.functional.linear(p, growth), torch.nn.functional.linear(p, growth.reciprocal())
    return total - torch.where(change > 0, up, down).log()


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
    reach = size * float(torch.linalg.vector_norm(weight, math.inf))
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

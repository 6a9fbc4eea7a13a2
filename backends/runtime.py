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

    .. math:: a \sum_j (b_j - \tfrac12) w_j - \sum_j \log \cosh \tfrac{w_j}2
              - \log \Big|\prod_j \big(a + \tanh \tfrac{l_j}2 \tanh \tfrac{w_j}2\big)\Big|

    for changes ``a`` of one size, as those of bits are, made 1 by the weights; else bit by bit.

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
    scale, reach = reach_of(change, weight, size)
    dtype, many = factors_at_once(weight.dtype, reach)
    if not many:
        x, parts = logits.unsqueeze(-2), changes_in_parts(logits, change, weight)
        moved = [log_prob_of_bits(torch.addcmul(x, a.unsqueeze(-1), w), bits.unsqueeze(-2)) for a, w in parts]
        return torch.cat(moved, -1) - log_prob_of_bits(logits, bits).unsqueeze(-1)

    sign = (change if scale == 1.0 else change / scale).reshape(-1, change.shape[-1]).to(dtype)  # [N, D]
    x = logits if change.dim() == logits.dim() else logits.expand(*change.shape[:-1], logits.shape[-1])
    t = (x.reshape(len(sign), x.shape[-1]).t().to(dtype) * 0.5).tanh_().unsqueeze(-1)  # [J, N, 1]
    w = (weight.t().to(dtype) * (0.5 * scale)).tanh_().unsqueeze(1)  # [J, 1, D]
    one = sign.new_ones(())
    rows = max((1 << 12) // max(sign.shape[-1], 1), 1)  # in a core's first cache
    many = min(many, max((1 << 20) // max(sign[:rows].nbytes, 1), 1))  # and their factors in its own

    def log_product(t: Tensor, w: Tensor) -> Tensor:
        if len(sign) <= rows:
            found = torch.addcmul(sign, t, w).prod(0)
        else:
            blocks = zip(sign.split(rows), t.split(rows, 1), strict=True)
            found = torch.cat([torch.addcmul(a, of, w).prod(0) for a, of in blocks])
        return found.abs_().mul_(torch.addcmul(one, w, w, value=-1).prod(0).rsqrt_()).log_()

    log_sum = (
        log_product(t, w)
        if many >= len(t)
        else functools.reduce(torch.add, map(log_product, t.split(many), w.split(many)))
    )
    return change * torch.nn.functional.linear(bits - 0.5, weight) - log_sum.to(weight.dtype).view_as(change)


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
    scale, reach = reach_of(change, weight, size)
    total = change * torch.embedding(weight.t(), index)
    if math.isinf(reach):
        x, parts = logits.unsqueeze(-2), changes_in_parts(logits, change, weight)
        moved = [torch.addcmul(x, a.unsqueeze(-1), w).logsumexp(-1) for a, w in parts]
        return total - (torch.cat(moved, -1) - logits.logsumexp(-1, keepdim=True))
    p, high = logits.softmax(-1), (weight if scale == 1.0 else scale * weight).exp()
    low, high = (torch.nn.functional.linear(p, growth) for growth in (high.reciprocal(), high))
    return total - torch.lerp(low, high, change.relu() if scale == 1.0 else change.relu() / scale).log_()


def changes_in_parts(logits: Tensor, change: Tensor, weight: Tensor) -> list[tuple[Tensor, Tensor]]:
    """So many of the ``D`` changes and their weights at once that the logits after them do not take too much memory."""
    large = weight.device.type != "cpu" or torch.compiler.is_compiling()  # memory, or kernels that write none of it
    some = max((1 << (26 if large else 19)) // max(logits.numel(), 1), 1)
    return list(zip(change.split(some, -1), weight.contiguous().split(some), strict=True))


def reach_of(change: Tensor, weight: Tensor, size: float | None) -> tuple[float, float]:
    """The absolute value of all changes, and the largest of ``change * weight``.

    Infinite where the changes are of several sizes or none, or exponentials of their products might be; also where to
    look at them would be to wait.
    """
    if weight.device.type != "cpu" or torch.compiler.is_compiling():
        return 0.0, math.inf
    if size is None:
        low, size = (float(bound) for bound in change.abs().aminmax())
        if low != size:
            return 0.0, math.inf
    reach = size * max(abs(float(end)) for end in weight.aminmax())
    return size, reach if size and reach <= 20 else math.inf  # it may be no number


def factors_at_once(dtype: torch.dtype, reach: float) -> tuple[torch.dtype, int]:
    """How many factors ``1 - tanh(x) tanh(reach / 2)`` can be multiplied, and in which precision; or none."""
    if math.isinf(reach):
        return dtype, 0
    lost = (1 + math.exp(reach)) / 2  # of the precision, where the factor is smallest
    if lost * torch.finfo(torch.float64).eps > max(torch.finfo(dtype).eps, 2e-12):
        return dtype, 0
    dtype = dtype if lost <= 256 else torch.float64
    return dtype, int(0.9 * math.log(torch.finfo(dtype).max) / max(math.log(lost), 1e-9))


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

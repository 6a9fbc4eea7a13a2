"""Batching rules of what is done element by element, and of what reads no elements at all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from scg.backends.batching_call import Call, NoRule, Rule, Rules
from scg.backends.sample_dims import Batched
from scg.operations import lookup


def is_pointwise(target: Callable[..., Any]) -> bool:
    """Does torch say that it is elementwise, and the table of operations nothing else?"""
    known = lookup(target)
    if known is not None and known.kind not in ("pointwise", "choice"):
        return False
    return isinstance(target, torch._ops.OpOverload) and torch.Tag.pointwise in target.tags


def _loss(position: int) -> Rule:
    """Losses by element want equal shapes of both operands, or warn; their reduction is at this position."""

    def rule(call: Call) -> Any:
        if call.arg(position, "reduction", 1) != 0:
            raise NoRule
        pair = call.args[:2]
        shape = torch.broadcast_shapes(*(operand.shape for operand in pair))
        ndim = len(shape)
        wide = [call.tensor(operand, ndim).expand([*call.sizes, *shape]) for operand in pair]
        return call.with_first(*wide).on(lambda value: call.tensor(value, ndim))

    return rule


def _clamp(call: Call) -> Any:
    """Torch cannot take the gradient of a clamp between two tensors if just one of them is larger than the value."""
    ndim = call.ndim
    return call.on(lambda value: call.full(value, ndim))


def _masked_fill(call: Call) -> Any:
    x, mask, value = call.args
    if not isinstance(value, Batched):
        return call.broadcast()
    ndim = call.ndim  # `masked_fill` itself takes no value with sample dims
    return torch.where(call.tensor(mask, ndim), call.tensor(value, ndim), call.tensor(x, ndim))


def _copy(call: Call) -> Any:
    """Copies and casts; a memory format is one for the rank of one draw, and changes no value."""
    args = tuple(None if isinstance(arg, torch.memory_format) else arg for arg in call.args)
    kwargs = {name: arg for name, arg in call.kwargs.items() if not isinstance(arg, torch.memory_format)}
    return replace(call, args=args, kwargs=kwargs).broadcast()


def _type_as(call: Call) -> Any:
    x: Batched = call.args[0]
    return Batched(x.tensor.to(call.args[1].tensor.dtype), x.dims)


def _factory(call: Call) -> Any:
    """``zeros_like`` and its kin read no values: one copy serves every sample."""
    row = call.args[0].tensor
    for _ in range(call.lead):
        row = row.select(0, 0)
    return Batched(call.with_first(row).as_is())


ELEMENTWISE: Rules = (
    # beyond those that torch tags as pointwise, which need no rule
    ("__and__ __or__ __xor__ rsub isclose where hardswish log_sigmoid", Call.broadcast),
    ("detach alias lift_fresh_copy", Call.broadcast),
    ("to _to_copy clone contiguous", _copy),
    ("bernoulli binomial poisson normal dropout alpha_dropout", Call.broadcast),
    ("mse_loss l1_loss huber_loss smooth_l1_loss soft_margin_loss kl_div", _loss(2)),
    ("binary_cross_entropy", _loss(3)),
    ("binary_cross_entropy_with_logits", _loss(4)),
    ("poisson_nll_loss", _loss(5)),
    ("clamp clip", _clamp),
    ("masked_fill", _masked_fill),
    ("type_as", _type_as),
    ("zeros_like ones_like full_like empty_like new_zeros new_ones new_full new_empty", _factory),
    ("rand_like randn_like randint_like", _factory),
)

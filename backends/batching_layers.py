"""Batching rules of the layers of neural networks: samples go into the batch dim, while the weights carry none."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from scg.backends.batching_call import Call, NoRule, Rule, Rules
from scg.backends.sample_dims import Batched


def _refuse_sampled(call: Call, first: int = 1) -> None:
    """Refuses a call of which an operand from argument ``first`` on has sample dims."""
    if any(item.dims for item in call.with_first(*[None] * first).operands):
        raise NoRule


def _images(unbatched: int | None = None) -> Rule:
    """Convolutions, pools and their like.

    Args:
        unbatched: rank of an operand without a batch dim; None: one less than that of the weights.
    """

    def rule(call: Call) -> Any:
        _refuse_sampled(call)
        x: Batched = call.args[0]
        least = call.args[1].ndim - 1 if unbatched is None else unbatched
        if x.ndim < least:
            raise NoRule
        return call.fold(0 if x.ndim == least else 1)

    return rule


def _normalize_last(call: Call) -> Any:
    _refuse_sampled(call)
    return call.as_is()


def _normalize_channels(call: Call) -> Any:
    _refuse_sampled(call)
    return call.fold(1)


def _batch_norm(call: Call) -> Any:
    """Training: samples go into the channels, so that each keeps its own statistics; the running ones move once."""
    _refuse_sampled(call)
    x, weight, bias, mean, var, training, momentum, eps, cudnn = call.args
    if not training:
        return call.fold(1)
    full = call.full(x)  # [*dims, B, C, *rest]
    rows = full.reshape([-1, *x.shape]).transpose(0, 1)  # [B, R, C, *rest]
    count, channels = rows.shape[1], rows.shape[2]
    merged = rows.reshape([x.shape[0], count * channels, *x.shape[2:]])

    def tiled(item: Batched | None) -> Tensor | None:
        return None if item is None else item.tensor.expand([count, channels]).reshape([-1])

    out = torch.batch_norm(merged, tiled(weight), tiled(bias), None, None, True, momentum, eps, cudnn)
    if mean is not None and var is not None:
        # every row updates from the same old value; the mean of the updates is the update with the mean statistics
        keep = [0, *range(3, rows.dim())]
        batch_mean = rows.detach().mean(keep).mean(0)
        batch_var = rows.detach().var(keep, unbiased=True).mean(0)
        mean.tensor.lerp_(batch_mean.to(mean.tensor.dtype), momentum)
        var.tensor.lerp_(batch_var.to(var.tensor.dtype), momentum)
    out = out.reshape([x.shape[0], count, channels, *x.shape[2:]]).transpose(0, 1)
    return out.reshape([*call.sizes, *x.shape])


def _embedding(call: Call) -> Any:
    """Rows of a sampled table are those of one long table; vmap would give its row for padding a gradient."""
    table, index = call.args[:2]
    if not table.dims:
        return call.as_is()
    (size, width), pad = table.shape, call.arg(2, "padding_idx", -1)
    values = call.full(table)
    if pad >= 0:
        at = torch.arange(size, device=values.device)[:, None]
        values = torch.where(at == pad, values.detach(), values)
    places = call.full(index)
    count = math.prod(call.sizes)
    offsets = torch.arange(0, count * size, size, device=places.device)
    places = places + offsets.reshape([*call.sizes, *[1] * index.ndim])
    return call.with_arg(2, "padding_idx", -1).with_first(values.reshape([count * size, width]), places).as_is()


def _attention(call: Call) -> Any:
    heads, mask = call.args[:3], call.arg(3, "attn_mask")
    ndim = max(item.ndim for item in heads)
    call = call.with_first(*(call.full(item, ndim) for item in heads))
    return call.as_is() if mask is None else call.with_arg(3, "attn_mask", call.tensor(mask, ndim)).as_is()


def _recurrent(call: Call) -> Any:
    """``gru``, ``lstm``… of whole sequences."""
    _refuse_sampled(call, 2)
    x, state = call.args[:2]
    if x.ndim != 3:
        raise NoRule
    axis = 0 if call.args[8] else 1  # batch_first
    batch = x.shape[axis]

    def fold(value: Batched, at: int) -> Tensor:
        full = call.full(value).movedim(call.lead + at, call.lead)  # [*dims, B, *rest]
        return full.reshape([-1, *full.shape[call.lead + 1 :]]).movedim(0, at)

    def unfold(out: Tensor, at: int) -> Tensor:
        rows = out.movedim(at, 0)
        return rows.reshape([*call.sizes, batch, *rows.shape[1:]]).movedim(call.lead, call.lead + at)

    states = fold(state, 1) if isinstance(state, Batched) else [fold(item, 1) for item in state]
    out, *last = call.with_first(fold(x, axis), states).as_is()
    return (unfold(out, axis), *(unfold(item, 1) for item in last))


def _cell(call: Call) -> Any:
    """``gru_cell``, ``lstm_cell`` and their like."""
    _refuse_sampled(call, 2)
    x, state = call.args[:2]

    def rows(value: Batched) -> Tensor:
        return call.full(value).reshape([-1, value.shape[-1]])

    states = rows(state) if isinstance(state, Batched) else [rows(item) for item in state]
    out = call.with_first(rows(x), states).as_is()

    def unfold(t: Tensor) -> Tensor:
        return t.reshape([*call.sizes, *x.shape[:-1], t.shape[-1]])

    return unfold(out) if isinstance(out, Tensor) else [unfold(item) for item in out]


def _class_loss(call: Call) -> Any:
    """``cross_entropy_loss``, ``nll_loss``… by element: the classes stay second."""
    _refuse_sampled(call, 2)
    if call.arg(3, "reduction", 1) != 0:
        raise NoRule
    x, target = call.args[:2]
    own = min(x.ndim - 1, 1)  # of one row alone there is no batch dim
    rows = (call.full(item).reshape([-1, *item.shape[own:]]) for item in (x, target))
    out: Tensor = call.with_first(*rows).as_is()
    return out.reshape([*call.sizes, *call.out_shape])


LAYERS: Rules = (
    ("convolution", _images()),
    ("conv1d max_pool1d avg_pool1d adaptive_avg_pool1d conv_transpose1d", _images(2)),
    ("conv2d max_pool2d avg_pool2d adaptive_avg_pool2d adaptive_max_pool2d conv_transpose2d", _images(3)),
    ("upsample_nearest2d upsample_bilinear2d pixel_shuffle max_pool2d_with_indices", _images(3)),
    ("conv3d max_pool3d avg_pool3d conv_transpose3d", _images(4)),
    ("batch_norm", _batch_norm),
    ("layer_norm rms_norm", _normalize_last),
    ("group_norm instance_norm", _normalize_channels),
    ("embedding", _embedding),
    ("scaled_dot_product_attention", _attention),
    ("gru lstm rnn_tanh rnn_relu", _recurrent),
    ("gru_cell lstm_cell rnn_tanh_cell rnn_relu_cell", _cell),
    ("cross_entropy_loss nll_loss nll_loss_nd nll_loss2d", _class_loss),
)

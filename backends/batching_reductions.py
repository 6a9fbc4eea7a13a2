"""Batching rules of reductions and of what runs along one dim: a dim of one draw, behind the sample dims."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from scg.backends.batching_call import Call, NoRule, Rules, all_from_right, along_dim
from scg.backends.sample_dims import Batched

_OF_ONE = {
    "sum", "mean", "nanmean", "amax", "amin", "max", "min", "median", "prod", "all", "any", "logsumexp",
}  # fmt: skip
"""Reductions that leave one element as it is, but for its dtype."""


def _reduce(call: Call) -> Any:
    """Reductions over listed dims: ``sum``, ``mean``, ``amax``, ``logsumexp``, ``var``…"""
    x: Batched = call.args[0]
    dims = call.arg(1, "dim")
    if isinstance(dims, bool):  # a variance over everything, which is `unbiased` or not
        return _over_all(replace(call, args=(x,), kwargs={"unbiased": dims}))
    if x.ndim == 0 or (len(call.args) == 1 and "dim" not in call.kwargs):
        return _over_all(call)
    return call.with_arg(1, "dim", all_from_right(dims, x.ndim)).as_is()


def _over_all(call: Call) -> Any:
    """Reductions over every dim of one draw."""
    x, name, kwargs = call.args[0], call.name, call.kwargs
    if x.ndim == 0 and name in _OF_ONE:
        dtype = call.out_type.dtype
        return x.tensor if x.tensor.dtype == dtype else x.tensor.to(dtype)
    if x.ndim == 0:
        raise NoRule
    if name in ("sum", "mean", "amax", "amin", "var", "std", "logsumexp"):
        return getattr(torch, name)(x.tensor, all_from_right(None, x.ndim), **kwargs)
    flat = x.tensor.flatten(len(x.dims)) if x.ndim > 1 else x.tensor
    if name in ("max", "min"):
        return (torch.amax if name == "max" else torch.amin)(flat, -1)
    if name == "median":
        return torch.median(flat, -1)[0]
    if name in ("prod", "all", "any"):
        return getattr(torch, name)(flat, -1, **kwargs)
    raise NoRule


def _max_min(call: Call) -> Any:
    """``max``/``min``/``median``/``mode`` in full, per dim and by element; ``all``/``any``/``prod`` per dim."""
    if len(call.args) > 1 and isinstance(call.args[1], Batched):
        return call.broadcast()
    if len(call.args) == 1 and "dim" not in call.kwargs:
        return _over_all(call)
    if isinstance(call.arg(1, "dim"), (list, tuple)):
        return _reduce(call)
    return along_dim(1)(call)


def _norm(call: Call) -> Any:
    x: Batched = call.args[0]
    dims = call.arg(2, "dim")
    if dims is None or x.ndim == 0:
        raise NoRule
    return call.with_arg(2, "dim", all_from_right(dims, x.ndim)).as_is()


REDUCTIONS: Rules = (
    ("sum mean amax amin logsumexp var std nansum nanmean count_nonzero", _reduce),
    ("norm linalg_vector_norm", _norm),
    ("max min median mode prod all any nanmedian aminmax", _max_min),
    ("argmax argmin softmax log_softmax _softmax _log_softmax", along_dim(1)),
    ("cumsum cumprod logcumsumexp cummax cummin", along_dim(1)),
    ("sort argsort glu", along_dim(1, default=-1)),
    ("topk kthvalue", along_dim(2, default=-1)),
)

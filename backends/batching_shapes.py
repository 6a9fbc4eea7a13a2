"""Batching rules of what moves elements: shapes, the order of dims, joining and taking apart, indexing.

The shape of one draw is the recorded one, so a view is a reshape to it behind the sample dims.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from scg.backends.batching_call import Call, NoRule, Rules, all_from_right, along_dim, from_right
from scg.backends.sample_dims import Batched


# -- shapes -----------------------------------------------------------------------------------------------------------
def _view(call: Call) -> Any:
    x: Batched = call.args[0]
    if isinstance(call.arg(1, "dtype"), torch.dtype):
        return call.as_is()
    return Batched(x.tensor.reshape([*call.dims.sizes(x.dims), *call.out_shape]), x.dims)


def _expand(call: Call) -> Any:
    x: Batched = call.args[0]  # ``expand_as`` reads the shape of the other one alone
    aligned = call.dims.align(x, x.dims, len(call.out_shape))
    return Batched(aligned.expand([*call.dims.sizes(x.dims), *call.out_shape]), x.dims)


def _unsqueeze(call: Call) -> Any:
    x: Batched = call.args[0]
    return x.tensor.unsqueeze(from_right(call.arg(1, "dim"), x.ndim + 1))


def _repeat(call: Call) -> Any:
    x, sizes = call.args
    return call.tensor(x, len(sizes)).repeat([*[1] * call.lead, *sizes])


# -- the order of dims and of elements --------------------------------------------------------------------------------
def _permute(call: Call) -> Any:
    x, order = call.args
    return x.tensor.permute([*range(call.lead), *(call.lead + d % max(x.ndim, 1) for d in order)])


def _transpose(call: Call) -> Any:
    x: Batched = call.args[0]
    if x.ndim == 0:
        return x.tensor
    if len(call.args) > 1:
        return x.tensor.transpose(from_right(call.args[1], x.ndim), from_right(call.args[2], x.ndim))
    if call.name == "numpy_T":
        return x.tensor.permute([*range(call.lead), *reversed(range(call.lead, call.lead + x.ndim))])
    return x.tensor.transpose(-1, -2) if x.ndim > 1 else x.tensor


def _movedim(call: Call) -> Any:
    x, source, target = call.args
    return torch.movedim(x.tensor, all_from_right(source, x.ndim), all_from_right(target, x.ndim))


def _flip(call: Call) -> Any:
    x, dims = call.args
    return torch.flip(x.tensor, all_from_right(dims, x.ndim)) if dims and x.ndim else x.tensor


def _roll(call: Call) -> Any:
    x, shifts = call.args[:2]
    dims = call.arg(2, "dims", ())
    if x.ndim == 0:
        return x.tensor
    if not dims:
        flat = x.tensor.reshape([*call.sizes, -1])
        return torch.roll(flat, shifts, -1).reshape(x.tensor.shape)
    return torch.roll(x.tensor, shifts, all_from_right(dims, x.ndim))


# -- joining and taking apart -----------------------------------------------------------------------------------------
def _cat(call: Call) -> Any:
    tensors: Sequence[Batched] = call.args[0]
    kept = [t for t in tensors if t.shape != (0,)] or tensors  # an empty vector joins whatever the rank of the others
    return torch.cat([call.full(t) for t in kept], from_right(call.arg(1, "dim", 0), kept[0].ndim))


def _stack(call: Call) -> Any:
    tensors: Sequence[Batched] = call.args[0]
    return torch.stack([call.full(t) for t in tensors], from_right(call.arg(1, "dim", 0), tensors[0].ndim + 1))


def _slice(call: Call) -> Any:
    x: Batched = call.args[0]
    dim = from_right(call.arg(1, "dim", 0), x.ndim)
    start, end, step = call.arg(2, "start"), call.arg(3, "end"), call.arg(4, "step", 1)
    cut = slice(start, None if end is not None and end > 2**62 else end, step)
    index: tuple[Any, ...] = (..., cut, *[slice(None)] * (-dim - 1))
    return x.tensor[index]


def _narrow(call: Call) -> Any:
    if isinstance(call.arg(2, "start"), Batched):
        raise NoRule
    return along_dim(1)(call)


def _slice_scatter(call: Call) -> Any:
    """``slice_scatter`` and ``select_scatter``: base and source both get every sample dim."""
    dim = from_right(call.arg(2, "dim", 0), call.args[0].ndim)
    return call.with_arg(2, "dim", dim).on(call.full)


def _diagonal(call: Call) -> Any:
    x: Batched = call.args[0]
    first, second = call.arg(2, "dim1", 0), call.arg(3, "dim2", 1)
    return torch.diagonal(x.tensor, call.arg(1, "offset", 0), from_right(first, x.ndim), from_right(second, x.ndim))


def _pad(call: Call) -> Any:
    constant = call.name == "constant_pad_nd" or call.arg(2, "mode", "constant") == "constant"
    return call.as_is() if constant else call.fold(1)


# -- indexing ---------------------------------------------------------------------------------------------------------
def _gather(call: Call) -> Any:
    """``gather``, ``scatter``, ``scatter_add``…: every tensor operand gets every sample dim."""
    x, dim = call.args[:2]
    if x.ndim == 0:
        raise NoRule
    return call.with_arg(1, "dim", from_right(dim, x.ndim)).on(call.full)


def _index_select(call: Call) -> Any:
    x, dim, index = call.args
    if index.dims and not x.dims and x.ndim:
        place = dim % x.ndim
        found = x.tensor[(*[slice(None)] * place, call.tensor(index, 1))]  # [*S before dim, *dims, n, *S behind it]
        lead = range(len(index.dims))
        return Batched(found.movedim([place + i for i in lead], [*lead]) if place else found, index.dims)
    if index.dims:
        raise NoRule
    if x.ndim == 0:  # by the index 0 alone
        return x.tensor
    return torch.index_select(x.tensor, from_right(dim, x.ndim), index.tensor)


def _index(call: Call) -> Any:
    """``x[..., i, j]`` by tensors: advanced indices stand behind the sample dims, sampled ones with their rows."""
    x, indices = call.args
    given = [i for i, item in enumerate(indices) if item is not None]
    start = given[0]
    if given != list(range(start, given[-1] + 1)):  # torch moves the dims of split indices to the front
        raise NoRule
    used: list[Batched] = [indices[i] for i in given]
    if any(item.tensor.dtype == torch.bool for item in used):
        raise NoRule
    if not any(item.dims for item in used):
        front: list[Any] = [slice(None)] * (call.lead + start)
        return call.full(x)[(*front, *(item.tensor for item in used))]
    if start != 0:
        raise NoRule
    ndim = max(item.ndim for item in used)
    index = [call.tensor(item, ndim) for item in used]
    if not x.dims:
        return x.tensor[tuple(index)]
    rows = [
        torch.arange(size, device=x.tensor.device).reshape([-1 if j == i else 1 for j in range(call.lead)] + [1] * ndim)
        for i, size in enumerate(call.sizes)
    ]
    return call.full(x)[(*rows, *index)]


SHAPES: Rules = (
    ("view reshape _unsafe_view flatten unflatten view_as reshape_as _reshape_alias ravel squeeze", _view),
    ("expand expand_as broadcast_to", _expand),
    ("unsqueeze", _unsqueeze),
    ("repeat", _repeat),
    ("permute", _permute),
    ("transpose t numpy_T mT swapaxes swapdims", _transpose),
    ("movedim moveaxis", _movedim),
    ("flip", _flip),
    ("roll", _roll),
    ("cat concat concatenate", _cat),
    ("stack", _stack),
    ("slice", _slice),
    ("narrow", _narrow),
    ("select", along_dim(1)),
    ("unbind", along_dim(1, default=0)),
    ("split split_with_sizes chunk tensor_split", along_dim(2, default=0)),
    ("unfold", along_dim(1, "dimension")),
    ("slice_scatter select_scatter", _slice_scatter),
    ("diagonal", _diagonal),
    ("pad constant_pad_nd", _pad),
    ("gather scatter scatter_add scatter_reduce", _gather),
    ("index_select", _index_select),
    ("index", _index),
)

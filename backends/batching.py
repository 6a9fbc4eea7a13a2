"""Runs one operation on values that carry named leading sample dims.

Every rule keeps the operation whole (one fused kernel for all samples); an operation without a rule goes through
``torch.vmap`` of that single operation, and where that has no rule either, through a loop over the samples.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from scg.backends.batching_call import Call, NoRule, Rule, Rules
from scg.backends.batching_elementwise import ELEMENTWISE, is_pointwise
from scg.backends.batching_layers import LAYERS
from scg.backends.batching_products import PRODUCTS
from scg.backends.batching_reductions import REDUCTIONS
from scg.backends.batching_shapes import SHAPES
from scg.backends.binding import is_aten
from scg.backends.recorder import record_call
from scg.backends.runtime import loop_rows
from scg.backends.sample_dims import Batched, SampleDims, Value
from scg.errors import LoweringError
from scg.ir import Op, TensorType
from scg.operations import packet_name

GROUPS: tuple[Rules, ...] = (ELEMENTWISE, REDUCTIONS, SHAPES, PRODUCTS, LAYERS)
RULES: dict[str, Rule] = {name: rule for group in GROUPS for names, rule in group for name in names.split()}
"""How to run an ATen operator with sample dims, by its name."""

_WRONG_UNDER_VMAP = {"index_fill", "linspace", "logspace"}
"""Operations of which torch.vmap gives other values than a loop."""

_FROM_STORAGE = {"as_strided_scatter"}
"""Operations without a vmap rule that count from where the storage starts: a row of theirs must have its own."""


class Batcher:
    """Executes IR operations on `Batched` values."""

    def __init__(self, dims: SampleDims) -> None:
        self.dims = dims

    def run(self, op: Op, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Value:
        """``op`` on arguments in which a `Batched` stands for every tensor."""
        if op.target is operator.getitem:
            return args[0][args[1]]
        call = Call(op, self.dims, (), tuple(args), dict(kwargs))
        union = self.dims.union(*(operand.dims for operand in call.operands))
        if not union:
            return _values(call.as_is(), ())
        call = replace(call, union=union)
        rule = _rule(op.target)
        if rule is not None:
            try:
                return _values(rule(call), union)
            except NoRule:
                pass
        out = _mapped(call)
        if isinstance(out, Tensor) and isinstance(op.type, TensorType):
            out = out.to(op.type.dtype)  # a mapped operation may keep another precision
        return _values(out, union)


def _rule(target: Callable[..., Any]) -> Rule | None:
    rule = RULES.get(packet_name(target) or "") if is_aten(target) else None
    return rule or (Call.broadcast if is_pointwise(target) else None)


def _values(out: Any, dims: tuple[str, ...]) -> Value:
    """What an operation returned, as values with ``dims``."""
    if isinstance(out, Tensor):
        return Batched(out, dims)
    if isinstance(out, (tuple, list)):
        return tuple(_values(item, dims) for item in out)
    return out


def _mapped(call: Call) -> Any:
    """``vmap`` of the single operation over the flattened sample dims."""
    flat, spec = tree_flatten((call.args, call.kwargs))
    rows = math.prod(call.sizes)
    tensors = [
        call.full(item).reshape([rows, *item.shape]) if item.dims else item.tensor
        for item in flat
        if isinstance(item, Batched)
    ]
    axes = tuple(0 if item.dims else None for item in flat if isinstance(item, Batched))
    out = record_call(Mapped(call.op.target, flat, spec, axes, rows), *tensors)
    return tree_map_only(Tensor, lambda t: t.reshape([*call.sizes, *t.shape[1:]]), out)


class Mapped:
    """One operation mapped over the first dim of some operands; a leaf of the generated code.

    Args:
        target: the operation.
        flat: its arguments, flattened: a `Batched` stands for each tensor that a call will give.
        spec: how to unflatten them.
        axes: for each of these tensors, the dim to map over, if any.
        rows: the size of that dim.
    """

    def __init__(
        self, target: Callable[..., Any], flat: Sequence[Any], spec: Any, axes: tuple[int | None, ...], rows: int
    ) -> None:
        self.target, self.spec, self.axes, self.rows = target, spec, axes, rows
        self.where = tuple(i for i, item in enumerate(flat) if isinstance(item, Batched))
        self.constants = tuple(None if isinstance(item, Batched) else item for item in flat)
        self.__name__ = f"mapped_{getattr(target, '__name__', 'op').split('.')[0]}"
        self.__qualname__ = self.__name__
        self.__module__ = __name__
        self.looped: bool | None = True if packet_name(target) in _WRONG_UNDER_VMAP else None
        """Whether the rows are looped over; None: not known before the first call."""

    def _single(self, *tensors: Tensor) -> Any:
        flat = list(self.constants)
        for i, tensor in zip(self.where, tensors, strict=True):
            flat[i] = tensor
        args, kwargs = tree_unflatten(flat, self.spec)
        return self.target(*args, **kwargs)

    def _on_copies(self, *tensors: Tensor) -> Any:
        return self._single(*(t.clone() for t in tensors))

    def __call__(self, *tensors: Tensor) -> Any:
        if not self.looped:
            try:
                out = torch.vmap(self._single, in_dims=self.axes, randomness="different")(*tensors)
            except RuntimeError:  # vmap has no rule for it
                if self.looped is not None:
                    raise
                self.looped = True
            else:
                self.looped = False
                return out
        single = self._on_copies if packet_name(self.target) in _FROM_STORAGE else self._single
        return loop_rows(single, tensors, self.axes, self.rows)


def check_shape(op: Op, value: Value, dims: SampleDims) -> None:
    """A rule that got the shape wrong is our fault: say which operation."""
    if isinstance(op.type, TensorType) and isinstance(value, Batched) and value.shape != op.type.shape:
        raise LoweringError(
            f"%{op.name} ({op.op_name}, {op.loc}): batching over {list(value.dims)} gave {list(value.shape)} "
            f"where one draw has {list(op.type.shape)}"
        )

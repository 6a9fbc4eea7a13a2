"""What is known at compile time is computed then, and operations that change nothing disappear.

    before   %r = op i64[5]        arange(5)                  after   %r = param i64[5]  constant r
             %i = op i64[5]        flip(%r, [0])                      %i = param i64[5]  constant i
             %b = op (f32[5, 3], f32[5, 3]) broadcast_tensors([%x, %m])
             %c = op f32[5, 3]     getitem(%b, 0)                     %c = op f32[5, 3]  expand(%x, [5, 3])
             %v = op f32[15]       view(%c, [15])                     %v = op f32[15]    reshape(%c, [15])
             %w = op f32[15]       clone(%v)                          (users read %v)
             %t = op f32[15]       add(%w, 0)                         (users read %v)

Every node keeps its value, so the expectation is unchanged. Index tensors become known, which keeps influence exact.
"""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch import Tensor

from scg.ir import Graph, Input, Op, Param, Ref, TensorType, map_refs, refs_in
from scg.operations import bind, is_impure, is_random, packet_name
from scg.passes.rewriter import Rewriter, is_op

aten = torch.ops.aten

LARGEST = 4096
"""Elements up to which a constant is kept rather than computed in each step."""


def fold_constants(graph: Graph) -> Graph:
    """Folds constants, and removes what is the identity in a functional graph (copies, casts to the same type)."""
    new = Rewriter(graph)
    returned = {str(ref) for ref in refs_in(graph.outputs)}
    for node in graph:
        if not isinstance(node, Op):
            new.keep(node)
        elif (same := _identity_of(node, new)) is not None and not (node.name in returned and _is_outside(same, new)):
            new.substitute(node.name, same)
        elif node.name not in returned and (value := _value(node, new)) is not None:
            new.constant(value, at=node, name=node.name)
        else:
            _keep_canonical(node, new)
    return new.finish()


# -- constants -------------------------------------------------------------------------------------------------------


def _value(node: Op, new: Rewriter) -> Tensor | None:
    """The value of an operation on small constants alone."""
    if not isinstance(node.type, TensorType) or math.prod(node.type.shape) > LARGEST:
        return None
    if packet_name(node.target) is None or is_random(node) or is_impure(node):
        return None
    inputs = [new.nodes[new.read(ref)] for ref in node.inputs]
    if not all(isinstance(input, Param) and _is_constant(input) for input in inputs):
        return None

    def read(ref: Ref) -> Tensor:
        param = new.nodes[new.read(ref)]
        assert isinstance(param, Param)
        return new.tensors[param.path]

    with torch.no_grad():
        value = node.target(*map_refs(read, node.args), **map_refs(read, node.kwargs))
    assert isinstance(value, Tensor)
    # own memory and a plain layout: a view would keep its base alive, and later share its fate
    return value.detach().clone(memory_format=torch.contiguous_format)


def _is_constant(param: Param) -> bool:
    return param.role == "constant" and not param.requires_grad


# -- identities ------------------------------------------------------------------------------------------------------

_COPIES = (aten.clone, aten.lift_fresh_copy, aten.contiguous)
_ALIASES = (aten.alias, aten.lift_fresh, aten.positive, aten.detach_copy)
_CASTS = (aten.to, aten._to_copy, aten.type_as)
_SHAPES = (
    aten.expand, aten.expand_as, aten.broadcast_to, aten.reshape, aten.view, aten._unsafe_view, aten.view_as,
    aten.reshape_as, aten.flatten, aten.unflatten, aten.squeeze, aten.ravel, aten.sum_to_size,
)  # fmt: skip
"""Rearrangements of elements in row-major order: the identity where the shape stays."""
_DROPOUTS = (aten.dropout, aten.feature_dropout, aten.alpha_dropout, aten.feature_alpha_dropout)


def _identity_of(node: Op, new: Rewriter) -> Ref | None:
    """The new node that holds the same value as ``node``, if it is one of its inputs."""
    if node.target is operator.getitem:
        return _broadcast_of(node, new, changing=False)
    if is_op(node, aten.add):
        return _without_zero(node, new)
    source = new.read(node.args[0]) if node.args and isinstance(node.args[0], Ref) else None
    if source is None:
        return None
    if is_op(node, *_COPIES):
        # a copy of what lives outside the graph is a snapshot: its source may be written later
        return None if _is_outside(source, new) else source
    if is_op(node, *_ALIASES):
        return source
    if is_op(node, *_DROPOUTS):
        named = bind(node)
        return None if named["train"] and named["p"] > 0 else source
    if is_op(node, *_CASTS, *_SHAPES) and node.target is not aten.view.dtype:
        return source if new.type_of(source) == node.type else None
    return None


def _without_zero(node: Op, new: Rewriter) -> Ref | None:
    """The other operand where one is zero, as in the first round of ``total = 0.0; for …: total = total + cost``."""
    named = bind(node)
    operands = [new.read(x) if isinstance(x, Ref) else x for x in (named["self"], named["other"])]
    for zero, other in (operands, operands[::-1]):
        if isinstance(other, Ref) and _is_zero(zero, new) and named["alpha"] == 1:
            return other if new.type_of(other) == node.type and not _is_outside(other, new) else None
    return None


def _is_zero(operand: Any, new: Rewriter) -> bool:
    if not isinstance(operand, Ref):
        return bool(operand == 0)
    param = new.nodes[operand]
    if not isinstance(param, Param) or not _is_constant(param) or param.tensor.shape:
        return False
    return not new.tensors[param.path]


def _is_outside(ref: Ref, new: Rewriter) -> bool:
    """Whether the node stands for a tensor that the user can reach and write."""
    node = new.nodes[ref]
    return isinstance(node, Input) or (isinstance(node, Param) and not _is_constant(node))


# -- canonical forms -------------------------------------------------------------------------------------------------


def _keep_canonical(node: Op, new: Rewriter) -> None:
    """Keeps ``node``, as ``reshape`` if it is a ``view`` and as ``expand`` if it is an output of a broadcast."""
    if node.target in (aten.view.default, aten._unsafe_view.default):
        # a copy that made its input contiguous may be gone
        new.op(aten.reshape.default, *map_refs(new.read, node.args), at=node, name=node.name, type=node.type)
    elif (source := _broadcast_of(node, new, changing=True)) is not None:
        shape = list(node.tensor.shape)
        new.op(aten.expand.default, source, shape, at=node, name=node.name, type=node.type)
    else:
        new.keep(node)


def _broadcast_of(node: Op, new: Rewriter, changing: bool) -> Ref | None:
    """What output ``node`` of a ``broadcast_tensors`` expands, if the shape changes (or stays)."""
    if node.target is not operator.getitem:
        return None
    broadcast = new.graph[node.args[0]]
    if not is_op(broadcast, aten.broadcast_tensors):
        return None
    source = new.read(broadcast.args[0][node.args[1]])
    return source if (new.type_of(source) != node.type) is changing else None

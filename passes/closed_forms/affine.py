"""Affine maps of a draw, and squares of them: quadratic forms.

    W z + b                       expectation W m + b
    ((W z + b - x)**2).sum()      expectation ((W m + b - x)**2 + W^2 Var z).sum(), where the elements are independent

The variance of each output is the same map with squared weights of the variances of its inputs: as long as these are
independent, so through one map that mixes elements, not through two.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from scg.ir import Op, Ref, TensorType, map_refs
from scg.operations import bind, is_linear, lookup
from scg.passes.closed_forms.expansion import Expansion, Spread
from scg.passes.rewriter import is_op

if TYPE_CHECKING:
    from scg.passes.closed_forms.expander import Expander

aten = torch.ops.aten

_SUMS = (aten.sum, aten.mean)
_PRODUCTS = (aten.mm, aten.bmm, aten.mv, aten.dot, aten.matmul)
_WEIGHTED = (aten.linear, aten.conv1d, aten.conv2d, aten.conv3d, aten.convolution)
_SHIFTED = (aten.addmm, aten.addmv, aten.baddbmm)


def expand(of: Expander, node: Op) -> Expansion | None:
    """The mean of ``node``, and its variance where that is known; of a map that is no affine one, of its square."""
    if not isinstance(node.type, TensorType):
        return None
    if node.target is operator.getitem:
        return _part(of, node)
    if (square := _square(of, node)) is not None:
        return square
    moving = of.moving(node)
    if not is_linear(node, moving):
        return None
    means: dict[Ref, Ref] = {}
    for ref in moving:
        mean = of.moments.mean(of.found(ref), of.graph[ref])
        if mean is None:
            return None
        means[ref] = mean
    mean = _again(of, node, means)
    return Spread(mean, _variance(of, node, moving[0]) if len(moving) == 1 else None)


def _again(of: Expander, node: Op, instead: dict[Ref, Ref]) -> Ref:
    """``node`` of other operands."""
    args, kwargs = map_refs(lambda ref: instead.get(ref, ref), (tuple(node.args), dict(node.kwargs)))
    return of.draft.op(node.target, *args, at=node, **kwargs)


def _part(of: Expander, node: Op) -> Spread | None:
    """One output of an affine map with several."""
    whole = of.graph[node.args[0]]
    if not isinstance(whole, Op) or not is_linear(whole, moving := of.moving(whole)) or len(moving) != 1:
        return None
    mean = of.moments.mean(of.found(moving[0]), of.graph[moving[0]])
    if mean is None:
        return None
    return Spread(of.draft.op(operator.getitem, _again(of, whole, {moving[0]: mean}), node.args[1], at=node))


# -- variances ---------------------------------------------------------------------------------------------------------
def _variance(of: Expander, node: Op, ref: Ref) -> Callable[[], Ref | None] | None:
    """How to make the variance of each element of an affine map of ``ref``; None where it is not known."""
    found = of.found(ref)
    assert found is not None
    squares = _squared_map(of, node, ref) if node.inputs.count(ref) == 1 else None
    if squares is None:
        return None
    mixes = is_op(node, *_SUMS, *_PRODUCTS, *_WEIGHTED, *_SHIFTED)
    if isinstance(found, Spread):
        if mixes or found.variance is None:
            return None  # its elements share elements of the draw
    elif mixes and not (found.independent and of.site.tensor.event_ndim == 0):
        return None

    def make() -> Ref | None:
        variance = of.moments.variance(found, of.graph[ref])
        return None if variance is None else of.draft.tensor(squares(variance), node.tensor, at=node)

    return make


def _squared_map(of: Expander, node: Op, ref: Ref) -> Callable[[Ref], Ref] | None:
    """The linear part of ``node`` with its weights squared, as a map of variances."""
    draft, named = of.draft, bind(node)

    def squared(value: Any) -> Any:
        if not isinstance(value, Ref):
            return value * value
        weights = draft.tensor(value, replace(draft.nodes[value].tensor, dtype=node.tensor.dtype), at=node)
        return draft.once(aten.square.default, weights, at=node)

    def product(one: str, other: str, target: Any = None) -> Callable[[Ref], Ref]:
        def apply(v: Ref) -> Ref:
            args = (v, squared(named[other])) if named[one] == ref else (squared(named[one]), v)
            return draft.op(target or node.target, *args, at=node)

        return apply

    if is_op(node, aten.add, aten.sub):
        return (lambda v: v) if named["self"] == ref else lambda v: _times(of, v, named["alpha"] ** 2, node)
    if is_op(node, aten.rsub):
        return (lambda v: v) if named["other"] == ref else lambda v: _times(of, v, named["alpha"] ** 2, node)
    if is_op(node, aten.neg, aten.alias, aten.clone, aten.contiguous, aten.to, aten._to_copy):
        return lambda v: v
    if is_op(node, aten.mul):
        other = named["other"] if named["self"] == ref else named["self"]
        return lambda v: _times(of, v, squared(other), node)
    if is_op(node, aten.div) and named["self"] == ref:
        return lambda v: draft.op(node.target, v, squared(named["other"]), at=node)
    if is_op(node, aten.mean):
        share = math.prod(node.tensor.shape) / max(math.prod(of.graph[ref].tensor.shape), 1)
        return lambda v: _times(of, _again(of, node, {ref: v}), share, node)
    entry = lookup(node.target)
    if is_op(node, aten.sum) or entry is not None and entry.kind == "movement" and _plain(node, ref):
        return lambda v: _again(of, node, {ref: v})
    if is_op(node, *_PRODUCTS):
        one, other = [key for key, value in named.items() if isinstance(value, Ref)][:2]
        return product(one, other)
    if is_op(node, *_SHIFTED):
        if named["self"] == ref:
            return None
        plain = {"addmm": aten.mm.default, "addmv": aten.mv.default, "baddbmm": aten.bmm.default}
        one, other = [key for key in named if key not in ("self", "beta", "alpha")]
        multiply = product(one, other, plain[node.op_name])
        return lambda v: _times(of, multiply(v), named["alpha"] ** 2, node)
    if is_op(node, *_WEIGHTED) and node.args[0] == ref:
        weight = node.args[1]
        rest = [None, *node.args[3:]] if len(node.args) > 3 else []
        return lambda v: draft.op(node.target, v, squared(weight), *rest, at=node, **_but_bias(node))
    return None


def _but_bias(node: Op) -> dict[str, Any]:
    return {key: value for key, value in node.kwargs.items() if key != "bias"}


def _plain(node: Op, ref: Ref) -> bool:
    """Whether ``node`` moves the elements of ``ref`` alone, and writes nothing of its own (as a padding does)."""
    return node.inputs == (ref,) and bool(node.args) and node.args[0] == ref and "pad" not in node.op_name


def _times(of: Expander, value: Ref, factor: Ref | float, at: Op) -> Ref:
    target = aten.mul.Tensor if isinstance(factor, Ref) else aten.mul.Scalar
    return of.draft.once(target, value, factor, at=at)


# -- squares -----------------------------------------------------------------------------------------------------------
def _square(of: Expander, node: Op) -> Spread | None:
    """The mean of the square of an affine value: its mean squared and its variance."""
    named = bind(node)
    if is_op(node, aten.square) or is_op(node, aten.pow) and named["exponent"] == 2:
        base, shift = named["self"], None
    elif is_op(node, aten.mul) and named["self"] == named["other"]:
        base, shift = named["self"], None
    elif is_op(node, aten.mse_loss) and named["reduction"] == 0:
        base, shift = named["self"], named["target"]
        if base not in of.below:
            base, shift = shift, base
        if shift in of.below:
            return None
    else:
        return None
    found = of.found(base)
    if found is None:
        return None
    mean, variance = of.moments.mean(found, of.graph[base]), of.moments.variance(found, of.graph[base])
    if mean is None or variance is None:
        return None
    if shift is not None:
        mean = of.draft.once(aten.sub.Tensor, mean, shift, at=node)
    square = of.draft.once(aten.square.default, mean, at=node)
    return Spread(of.draft.tensor(of.draft.plus(square, variance, node), node.tensor, at=node))

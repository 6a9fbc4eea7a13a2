"""Elementwise arithmetic on polynomials in a draw, and data movement.

(z - x)**2 * w      z ~ Normal, Gamma, Beta, Uniform, Poisson, Bernoulli, …
expectation         w (m - x)^2 + w Var z
"""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

import torch

from scg.ir import Op, Ref, TensorType
from scg.operations import bind
from scg.passes.closed_forms.draft import Draft
from scg.passes.closed_forms.expansion import Move, Polynomial
from scg.passes.closed_forms.forms import ORDERS
from scg.passes.rewriter import is_op

if TYPE_CHECKING:
    from scg.passes.closed_forms.expander import Expander

aten = torch.ops.aten

_MOVES = (
    aten.view, aten.reshape, aten.flatten, aten.unflatten, aten.squeeze, aten.unsqueeze, aten.permute, aten.transpose,
    aten.t, aten.swapaxes, aten.swapdims, aten.movedim, aten.moveaxis, aten.select, aten.slice, aten.narrow, aten.flip,
    aten.roll, aten.diagonal,
)  # fmt: skip
"""Operations after which each element stands in one place at most."""
_PARTS = (aten.split, aten.split_with_sizes, aten.chunk, aten.unbind, aten.tensor_split)
_REPEATS = (aten.expand, aten.broadcast_to, aten.repeat)
_SAME = (aten.clone, aten.contiguous, aten.alias)
_CASTS = (aten.to, aten._to_copy)


def expand(of: Expander, node: Op) -> Polynomial | None:
    """The polynomial that ``node`` is, if its operands are polynomials in the same elements."""
    if node.target is operator.getitem:
        return _part(of, node)
    if not isinstance(node.type, TensorType):
        return None
    moving = [of.found(ref) for ref in of.moving(node)]
    if not all(isinstance(found, Polynomial) for found in moving):
        return None
    if is_op(node, *_MOVES):
        return _moved(of, node, Move.of(node, node.args[0]))
    if is_op(node, *_REPEATS):
        return _moved(of, node, Move.of(node, node.args[0], repeats=True))
    if is_op(node, *_SAME, *_CASTS):
        found = of.found(node.args[0])
        return found if isinstance(found, Polynomial) else None
    return _arithmetic(of, node)


# -- movement ----------------------------------------------------------------------------------------------------------
def _moved(of: Expander, node: Op, move: Move, source: Ref | None = None) -> Polynomial | None:
    source = node.args[0] if source is None else source
    found = of.found(source)
    if not isinstance(found, Polynomial):
        return None
    terms: list[Ref | float] = []
    for term in found.terms:
        if isinstance(term, Ref):
            term = move(of.draft, of.draft.expand(term, found.shape, at=node), node)
        terms.append(term)
    return Polynomial(tuple(terms), (*found.moves, move), node.tensor.shape)


def _part(of: Expander, node: Op) -> Polynomial | None:
    parts = of.graph[node.args[0]]
    if not is_op(parts, *_PARTS):
        return None
    source = parts.args[0]
    return _moved(of, node, Move.of(parts, source, item=node.args[1]), source)


# -- arithmetic --------------------------------------------------------------------------------------------------------
def _arithmetic(of: Expander, node: Op) -> Polynomial | None:
    named = bind(node)
    if is_op(node, aten.neg):
        return scaled(of.draft, _operand(of, node, named["self"]), -1.0, node)
    if is_op(node, aten.square):
        return _power(of, node, named["self"], 2)
    if is_op(node, aten.pow):
        return _power(of, node, named["self"], named["exponent"])
    if is_op(node, aten.mse_loss) and named["reduction"] == 0:
        gap = _sum(of.draft, _operand(of, node, named["self"]), _operand(of, node, named["target"]), -1.0, node)
        return times(of.draft, gap, gap, node)
    if is_op(node, aten.add, aten.sub, aten.rsub):
        one, other = (_operand(of, node, named[key]) for key in ("self", "other"))
        if is_op(node, aten.rsub):
            one, other = other, one
        alpha = named["alpha"]
        return _sum(of.draft, one, other, alpha if is_op(node, aten.add) else -alpha, node)
    if is_op(node, aten.mul):
        return times(of.draft, _operand(of, node, named["self"]), _operand(of, node, named["other"]), node)
    if is_op(node, aten.div) and named.get("rounding_mode") is None and named["other"] not in of.below:
        return scaled(of.draft, _operand(of, node, named["self"]), _reciprocal(of, node, named["other"]), node)
    return None


def _reciprocal(of: Expander, node: Op, value: Ref | float) -> Ref | float:
    if not isinstance(value, Ref):
        return 1.0 / value
    return of.draft.once(aten.reciprocal.default, of.draft.tensor(value, _like(of, value, node), at=node), at=node)


def _like(of: Expander, ref: Ref, node: Op) -> TensorType:
    """The type of ``ref`` with the dtype of ``node``."""
    given = of.draft.nodes[ref].tensor
    return TensorType(node.tensor.dtype, given.shape, device=given.device)


def _operand(of: Expander, node: Op, value: Any) -> Polynomial:
    """An operand as a polynomial of the shape of ``node``; a constant one if it does not follow from the draw."""
    shape = node.tensor.shape
    if isinstance(value, Ref) and value in of.below:
        found = of.found(value)
        assert isinstance(found, Polynomial)
        if found.shape == shape:
            return found
        move = Move(aten.expand.default, (Ref("·"), list(shape)), {}, repeats=True)
        return Polynomial(found.terms, (*found.moves, move), shape)  # the terms broadcast by themselves
    if isinstance(value, Ref):
        value = of.draft.tensor(value, _like(of, value, node), at=node)
    return Polynomial((value if isinstance(value, Ref) else float(value),), (), shape)


def scaled(draft: Draft, p: Polynomial, factor: Ref | float, at: Op) -> Polynomial:
    return Polynomial(tuple(draft.times(c, factor, at) for c in p.terms), p.moves, p.shape)


def _sum(draft: Draft, p: Polynomial, q: Polynomial, sign: float, at: Op) -> Polynomial | None:
    """``p + sign q``."""
    if p.degree and q.degree and p.place != q.place:
        return None
    terms: list[Ref | float] = []
    for k in range(max(p.degree, q.degree) + 1):
        other = draft.times(q.terms[k], sign, at) if k <= q.degree else 0.0
        terms.append(draft.plus(p.terms[k], other, at) if k <= p.degree else other)
    return Polynomial(tuple(terms), p.moves if p.degree else q.moves, p.shape)


def times(draft: Draft, p: Polynomial | None, q: Polynomial | None, at: Op) -> Polynomial | None:
    """The product of two polynomials in the same elements."""
    if p is None or q is None or p.degree and q.degree and p.place != q.place or p.degree + q.degree > ORDERS:
        return None
    terms: list[Ref | float] = [0.0] * (p.degree + q.degree + 1)
    for i, a in enumerate(p.terms):
        for j, b in enumerate(q.terms):
            terms[i + j] = draft.plus(terms[i + j], draft.times(a, b, at), at)
    return Polynomial(tuple(terms), p.moves if p.degree else q.moves, p.shape)


def _power(of: Expander, node: Op, base: Any, exponent: Any) -> Polynomial | None:
    if isinstance(exponent, Ref) or base not in of.below or exponent != int(exponent) or not 1 <= exponent <= ORDERS:
        return None
    factor = _operand(of, node, base)
    found: Polynomial | None = factor
    for _ in range(int(exponent) - 1):
        found = times(of.draft, found, factor, node)
    return found

"""Expected log densities of a draw, or of values affine in it.

q.log_prob(z)                        minus the entropy of q
p.log_prob(z)                        minus the entropy of q and its divergence from p
Normal(W z + b, s).log_prob(x)       -E[(x - W z - b)^2] / (2 s^2) - log s - log(2 pi) / 2
Bernoulli(logits=l).log_prob(z)      the log density is affine in z: its value at the mean
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

import torch
from torch.distributions import Bernoulli, Exponential, Geometric, Normal

from scg.ir import LogProb, Op, Ref, TensorType
from scg.passes.closed_forms import affine, polynomials
from scg.passes.closed_forms.expansion import Expansion, Polynomial, Spread
from scg.passes.closed_forms.forms import expected_log_prob, has_divergence, has_entropy, negative_entropy

if TYPE_CHECKING:
    from scg.passes.closed_forms.expander import Expander

aten = torch.ops.aten

_AFFINE = (Bernoulli, Exponential, Geometric)
"""Families whose log density is affine in the outcome."""


def expand(of: Expander, node: LogProb) -> Spread | None:
    """The expectation of a log density."""
    law, own = of.draft.dist(node.dist), of.draft.dist(of.site.dist)
    learned = of.moving(of.graph[node.dist])  # parameters that follow from the draw
    family, q = law.template.cls, own.template.cls
    if of.is_draw(node.value) and not learned:
        found: Ref | None = None
        if node.dist == of.site.dist:
            if has_entropy(q):
                found = of.draft.expected(negative_entropy, node.dist, at=node)
        elif has_divergence(q, family) and has_entropy(q) and not _is_affine(family):
            found = of.draft.expected(expected_log_prob, of.site.dist, node.dist, at=node)
        if found is not None:
            return Spread(of.draft.tensor(found, node.tensor, at=node))
    if family is Normal:
        return _normal(of, node)
    if _is_affine(family) and not learned:
        mean = of.mean(node.value)
        if mean is not None:
            name = of.draft.fresh(f"{node.name}_expected")
            return Spread(of.draft.add(dataclasses.replace(node, name=name, value=mean, variable="")))
    return None


def _is_affine(family: type) -> bool:
    return family in _AFFINE


def _normal(of: Expander, node: LogProb) -> Spread | None:
    """Of a Normal whose outcome or mean is affine in the draw: a quadratic form."""
    draft = of.draft
    loc, scale = (draft.parameter(node.dist, name) for name in ("loc", "scale"))
    if scale in of.below:
        return None
    for ref in (loc, node.value):
        if ref in of.below and of(ref) is None:
            return None
    gap = Op(name=node.name, type=node.type, loc=node.loc, scope=node.scope, target=aten.sub.Tensor,
             args=(node.value, loc))  # fmt: skip
    found: Expansion | None = polynomials.expand(of, gap) or affine.expand(of, gap)
    if found is None:
        return None
    square: Ref | None
    if isinstance(found, Polynomial):
        product = polynomials.times(draft, found, found, gap)
        square = of.moments.mean(product, gap)
    else:
        variance = of.moments.variance(found, gap)
        if variance is None:
            return None
        squared = draft.once(aten.square.default, draft.tensor(found.mean, node.tensor, at=node), at=node)
        square = draft.once(aten.add.Tensor, squared, variance, at=node)
    if square is None:
        return None
    return Spread(_log_normal(of, node, square, scale))


def _log_normal(of: Expander, node: LogProb, square: Ref, scale: Ref) -> Ref:
    """``-square / (2 scale^2) - log scale - log(2 pi) / 2``"""
    draft = of.draft
    precision = draft.once(aten.reciprocal.default, draft.once(aten.square.default, scale, at=node), at=node)
    energy = draft.times(draft.times(square, precision, node), -0.5, node)
    norm = draft.plus(draft.once(aten.log.default, scale, at=node), 0.5 * math.log(2 * math.pi), node)
    type_ = node.tensor
    assert isinstance(type_, TensorType)
    return draft.tensor(draft.plus(energy, draft.times(norm, -1.0, node), node), type_, at=node)

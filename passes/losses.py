"""Losses with a fused reduction are written as their elements and a reduction of them.

    before   %l = op f32[]      mse_loss(%x, %y, 1)
    after    %l_elements = op f32[5]  mse_loss(%x, %y, 0)
             %l          = op f32[]   mean(%l_elements)

The same number, so the same expectation; but now each element can be credited to the sites it depends on.
"""

from __future__ import annotations

import torch

from scg.ir import Dist, Graph, Op, Ref, Sample
from scg.operations import bind, packet_name
from scg.passes.rewriter import Rewriter, is_op, with_argument

aten = torch.ops.aten

NONE, MEAN, SUM = 0, 1, 2
"""The values of ATen's ``reduction`` argument."""


def unfuse_losses(graph: Graph) -> Graph:
    """Every operation with a ``reduction`` argument becomes ``reduction='none'`` and a sum or mean."""
    new = Rewriter(graph)
    for node in graph:
        if isinstance(node, Op) and _reduction(node) != NONE:
            _unfuse(node, new)
        else:
            new.keep(node)
    return new.finish()


def _reduction(node: Op) -> int:
    if packet_name(node.target) is None or is_op(node, aten.ctc_loss):  # its mean divides by lengths inside
        return NONE
    return int(bind(node).get("reduction", NONE))


def _unfuse(fused: Op, new: Rewriter) -> None:
    node = fused.rewire(new.read)
    assert isinstance(node, Op)
    args, kwargs = with_argument(node, "reduction", NONE)
    elements = new.op(node.target, *args, at=node, name=new.fresh(f"{node.name}_elements"), **kwargs)
    if _reduction(node) == SUM:
        new.op(aten.sum.default, elements, at=node, name=node.name)
    elif (weight := _total_weight(node, new)) is None:
        new.op(aten.mean.default, elements, at=node, name=node.name)
    else:
        total = new.op(aten.sum.default, elements, at=node)
        new.op(aten.div.Tensor, total, weight, at=node, name=node.name)


def _total_weight(node: Op, new: Rewriter) -> Ref | None:
    """What a mean divides by where that is not the number of elements: the weights of the targets, summed.

    Ignored targets do not count, and without weights every other one counts as 1.
    """
    if not is_op(node, aten.nll_loss, aten.nll_loss2d, aten.nll_loss_nd, aten.cross_entropy_loss):
        return None
    named = bind(node)
    target, weight, ignored = named["target"], named["weight"], named["ignore_index"]
    if is_op(node, aten.cross_entropy_loss) and new.shape(named["self"]) == new.shape(target):
        return None  # the target holds class probabilities: told by its shape alone
    if weight is None and ignored < 0 and _is_drawn_class(new.graph, target):
        return None
    valid = new.op(aten.ne.Scalar, target, ignored, at=node)
    if weight is None:
        return new.op(aten.sum.default, valid, at=node)
    # an ignored target may be no class at all: look up class 0 for it, then drop it
    classes = new.op(aten.mul.Tensor, target, valid, at=node)
    weights = new.op(aten.index.Tensor, weight, [classes], at=node)
    return new.op(aten.sum.default, new.op(aten.mul.Tensor, weights, valid, at=node), at=node)


def _is_drawn_class(graph: Graph, ref: Ref) -> bool:
    """Whether ``ref`` is a draw of a class, cast or reshaped at most: never negative, so never ignored by default.

    Else the number of targets would seem to depend on the site, and its costs could not be told apart.
    """
    node = graph[ref]
    while is_op(node, aten.to, aten._to_copy, aten.view, aten.reshape, aten.squeeze, aten.flatten, aten.detach):
        node = graph[node.args[0]]
    if not isinstance(node, Sample):
        return False
    dist = graph[node.dist]
    return isinstance(dist, Dist) and dist.template.family in ("Categorical", "Bernoulli")

"""Normalization: one way to write each thing, before any analysis looks at the graph.

trace → functionalize → split_independent → unfuse_losses → choose_masked → fold_constants → share →
eliminate_dead_code
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from scg.ir import Dist, Graph, LogProb, Op, Ref, Sample
from scg.passes.clean import eliminate_dead_code, share
from scg.passes.fold import fold_constants
from scg.passes.functionalize import functionalize
from scg.passes.losses import unfuse_losses
from scg.passes.rewriter import Rewriter

if TYPE_CHECKING:
    from scg.template import Template

aten = torch.ops.aten


def split_independent(graph: Graph) -> Graph:
    """Replaces ``Independent`` by its base, whose reinterpreted dims are then elements of the site like any other.

        before   %d = dist          Independent(base_dist.logits=%l)      # 1 reinterpreted dim
                 %z = sample f32[128 | 10]  %d
                 %p = logprob f32[128]      %d.log_prob(%z)
        after    %d = dist          Bernoulli(logits=%l)
                 %z = sample f32[128, 10]   %d
                 %p_elements = logprob f32[128, 10]  %d.log_prob(%z)
                 %p = op f32[128]   sum(%p_elements, [-1])

    ``Independent.log_prob`` is that sum by definition and draws from its base: nothing changes but the credit that
    the elements can now get one by one.
    """
    new = Rewriter(graph)
    for node in graph:
        match node:
            case Dist():
                new.keep(dataclasses.replace(node, template=_base(node.template)))
            case Sample():
                event_ndim = len(_base(_template(graph, node.dist)).event_shape)
                new.keep(dataclasses.replace(node, type=dataclasses.replace(node.tensor, event_ndim=event_ndim)))
            case LogProb() if reinterpreted := _reinterpreted(template := _template(graph, node.dist)):
                _split_log_prob(node, reinterpreted, _base(template), new)
            case _:
                new.keep(node)
    return new.finish()


def choose_masked(graph: Graph) -> Graph:
    """Replaces a number written under a mask by a choice, element by element.

        before   %y = op f32[128, 10]  index_put(%x, [%mask], %number)
        after    %y = op f32[128, 10]  where(%mask, %number, %x)

    So torch writes the edges of its divergences; rows of samples go through a choice as one.
    """
    new = Rewriter(graph)
    for node in graph:
        if isinstance(node, Op) and (operands := _masked_number(graph, node)) is not None:
            x, mask, number = map(new.read, operands)
            new.op(aten.where.self, mask, number, x, at=node, name=node.name, type=node.type)
        else:
            new.keep(node)
    return new.finish()


def _masked_number(graph: Graph, node: Op) -> tuple[Ref, Ref, Ref] | None:
    if node.target is not aten.index_put.default:
        return None
    x, indices, number, *accumulate = node.args
    if len(indices) != 1 or any(accumulate) or node.kwargs or not all(isinstance(r, Ref) for r in (*indices, number)):
        return None
    kept, mask, value = (graph[ref].tensor for ref in (x, *indices, number))
    if mask.dtype != torch.bool or mask.shape != kept.shape or value.shape or value.dtype != kept.dtype:
        return None
    return x, indices[0], number


def _reinterpreted(template: Template) -> int:
    """How many batch dims of the innermost base are event dims."""
    return len(_base(template).batch_shape) - len(template.batch_shape)


def _template(graph: Graph, ref: Ref) -> Template:
    dist = graph[ref]
    assert isinstance(dist, Dist)
    return dist.template


def _base(template: Template) -> Template:
    while template.base is not None:
        template = template.base
    return template


def _split_log_prob(node: LogProb, reinterpreted: int, base: Template, new: Rewriter) -> None:
    value = new.shape(new.read(node.value))
    shape = torch.broadcast_shapes(value[: len(value) - len(base.event_shape)], base.batch_shape)
    elements = dataclasses.replace(
        node,
        name=new.fresh(f"{node.name}_elements"),
        type=dataclasses.replace(node.tensor, shape=tuple(shape)),
        value=new.read(node.value),
    )  # [*batch, *reinterpreted]
    dims = list(range(-reinterpreted, 0))
    new.op(aten.sum.dim_IntList, new.add(elements), dims, at=node, name=node.name, type=node.type)


NORMALIZE: tuple[Callable[[Graph], Graph], ...] = (
    functionalize,
    split_independent,
    unfuse_losses,
    choose_masked,
    fold_constants,
    share,
    eliminate_dead_code,
)


def normalize(graph: Graph) -> Graph:
    """The passes of `NORMALIZE` in order; each leaves the expectation as it is, and so does their composition."""
    for rewrite in NORMALIZE:
        graph = rewrite(graph)
    return graph

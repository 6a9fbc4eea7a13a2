"""Runs a graph node by node on real tensors: the plain meaning of the IR, and the oracle for everything built on it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution
from torch.utils import _pytree as pytree

from scg import ir
from scg.ir import Graph, Ref, map_refs

Draw = Callable[[ir.Sample, Distribution], Tensor]


def draw_like_user(node: ir.Sample, dist: Distribution) -> Tensor:
    """The draw the user's program makes."""
    return getattr(dist, node.method)(torch.Size(node.sample_shape))


def evaluate(
    graph: Graph, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None, sample: Draw = draw_like_user
) -> Any:
    """The graph's outputs; draws happen in program order, so that a seed gives those of the original."""
    values = environment(graph, args, kwargs, sample)
    return pytree.tree_map_only(Ref, lambda ref: values[ref], graph.outputs)


def environment(
    graph: Graph, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None, sample: Draw = draw_like_user
) -> dict[str, Any]:
    """The value of every node, by name."""
    leaves = [leaf for leaf in pytree.tree_leaves((tuple(args), dict(kwargs or {}))) if isinstance(leaf, Tensor)]
    values: dict[str, Any] = {}
    for node in graph:
        values[node.name] = _run(node, values, leaves, graph, sample)
    return values


def _run(node: ir.Node, values: dict[str, Any], leaves: list[Tensor], graph: Graph, sample: Draw) -> Any:
    def get(tree: Any) -> Any:
        return map_refs(values.__getitem__, tree)

    match node:
        case ir.Input():
            return leaves[node.position]
        case ir.Param():
            return graph.tensors[node.path]
        case ir.Op():
            return node.target(*get(node.args), **get(dict(node.kwargs)))
        case ir.Dist():
            return node.template.rebuild(get(node.params))
        case ir.Sample():
            if node.value is not None:
                return get(node.value).detach()
            value = sample(node, get(node.dist))
            return value.detach() if node.data else value
        case ir.LogProb():
            return get(node.dist).log_prob(get(node.value))
        case ir.Cost() | ir.Depends() | ir.Bound():
            return get(node.value)
        case ir.Opaque():
            with torch.no_grad():
                return node.fn(*get(node.args))
    raise AssertionError(f"no meaning for {node}")

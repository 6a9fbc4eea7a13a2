"""Common sub-expressions are computed once, and what nobody reads is not computed.

    before   %a = op exp(%x)            after share   %a = op exp(%x)          and eliminate_dead_code drops
             %b = op exp(%x)                          %y = op mul(%a, %a)      what no result needs
             %y = op mul(%a, %b)

The expectation is unchanged: an operation without noise and without effects gives the same value each time. Samples
are never merged: two draws of one distribution are two random variables.
"""

from __future__ import annotations

import operator
from typing import Any

import torch

from scg.ir import Cost, Dist, Expected, Graph, Input, LogProb, Node, Op, Opaque, Param, Ref, Sample, refs_in
from scg.operations import is_impure, is_random, packet_name
from scg.passes.rewriter import Rewriter

_SMALL = 256
"""Elements of the largest constant that is compared by its values."""


def share(graph: Graph) -> Graph:
    """Merges operations, log-probabilities and distributions that are computed twice; needs a functional graph.

    `Param` nodes count as one when they stand for one tensor object. Noise, effects, opaque calls and custom
    autograd functions are left alone, and so is what reads a buffer that some node writes.
    """
    new = Rewriter(graph)
    first: dict[Any, Ref] = {}
    volatile = _written(graph)
    for node in graph:
        key = None if volatile.intersection(node.inputs) else _identity(node, new)
        if key is not None and key in first:
            new.substitute(node.name, first[key])
        else:
            ref = new.keep(node)
            if key is not None:
                first[key] = ref
    return new.finish()


def eliminate_dead_code(graph: Graph) -> Graph:
    """Drops what neither a result nor an effect needs.

    Inputs, sites and declared costs stay, since they are listed: a site without a cost below it costs nothing at
    run time. Noise that nobody reads is dropped, which moves the random number stream but no expectation.
    """
    roots = {str(ref) for ref in (graph.objective, *refs_in(graph.outputs))}
    roots |= {node.name for node in graph if _is_listed(node) or has_effect(node)}
    needed = graph.ancestors(roots)
    if len(needed) == len(graph):
        return graph
    return graph.with_nodes((node for node in graph if node.name in needed), tail=graph.tail & needed)


def has_effect(node: Node) -> bool:
    """Whether running ``node`` changes something outside the graph: a buffer, running statistics, an environment."""
    if isinstance(node, Opaque):
        return not node.pure
    return isinstance(node, Op) and is_impure(node)


def _is_listed(node: Node) -> bool:
    return isinstance(node, (Input, Sample)) or (isinstance(node, Cost) and node.declared)


def _written(graph: Graph) -> set[str]:
    """Buffers that an impure node may write: what reads them depends on when it runs."""
    read = {ref for node in graph if has_effect(node) for ref in node.inputs}
    return {ref for ref in read if isinstance(graph[ref], Param)}


def _identity(node: Node, new: Rewriter) -> Any:
    """Equal for nodes that must hold equal values; None for one that stands for itself alone."""
    match node:
        case Param():
            tensor = new.graph.tensors[node.path]
            plain = tensor.dtype in (torch.float32, torch.float64, torch.int64) and tensor.device.type == "cpu"
            if node.role == "constant" and not node.requires_grad and plain and tensor.numel() <= _SMALL:
                return Param, tensor.dtype, tensor.shape, tensor.detach().numpy().tobytes()
            return Param, id(tensor)
        case Dist():
            return Dist, node.template, tuple(map(new.read, node.params))
        case LogProb():
            return LogProb, new.read(node.dist), new.read(node.value)
        case Expected():
            return Expected, node.form, tuple(map(new.read, node.dists))
        case Op() if _is_repeatable(node):
            return node.target, _frozen(node.args, new), _frozen(dict(node.kwargs), new)
        case _:
            return None


def _is_repeatable(node: Op) -> bool:
    known = packet_name(node.target) is not None or node.target is operator.getitem
    return known and not is_random(node) and not is_impure(node)


def _frozen(tree: Any, new: Rewriter) -> Any:
    """A hashable form of arguments that tells ``1``, ``1.0`` and ``True`` apart."""
    if isinstance(tree, Ref):
        return Ref, new.read(tree)
    if isinstance(tree, (tuple, list)):
        return tuple, *(_frozen(item, new) for item in tree)
    if isinstance(tree, dict):
        return dict, *((key, _frozen(tree[key], new)) for key in sorted(tree))
    return type(tree), repr(tree)

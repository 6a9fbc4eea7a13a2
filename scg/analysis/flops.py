"""How much arithmetic a node does, and how many bytes its value has, for one draw: rough, from shapes alone."""

from __future__ import annotations

import math
from collections.abc import Iterator

from scg.ir import Graph, Input, LogProb, Node, Op, Param, Sample, TensorType
from scg.operations import lookup, packet_name

_PRODUCTS = {"mm": 0, "bmm": 0, "matmul": 0, "mv": 0, "dot": 0, "linear": 0, "addmm": 1, "addmv": 1, "baddbmm": 1}
"""Contractions of the last dim of the operand at this place."""


def flops(graph: Graph, node: Node) -> int:
    """An operation an element of the result or of the largest operand, and two a product that is summed."""
    if not isinstance(node, (Op, LogProb, Sample)):
        return 0
    sizes = [math.prod(type_.shape) for type_ in _types(node)]
    if not isinstance(node, Op):
        return sum(sizes)
    name, entry = packet_name(node.target), lookup(node.target)
    if entry is not None and entry.kind in ("movement", "nothing"):
        return 0
    if name in _PRODUCTS:
        return 2 * sum(sizes) * graph[node.args[_PRODUCTS[name]]].tensor.shape[-1]
    if name == "convolution" or name is not None and name.startswith("conv"):
        return 2 * sum(sizes) * math.prod(graph[node.args[1]].tensor.shape[1:])
    read = [math.prod(type_.shape) for ref in node.inputs for type_ in _types(graph[ref])]
    return max([*sizes, *read], default=0)


def value_bytes(node: Node) -> int:
    """Of all outputs; nothing of what is there before the program runs."""
    if isinstance(node, (Input, Param)):
        return 0
    return sum(math.prod(type_.shape) * type_.dtype.itemsize for type_ in _types(node))


def _types(node: Node) -> Iterator[TensorType]:
    types = node.type if isinstance(node.type, tuple) else (node.type,)
    return (type_ for type_ in types if isinstance(type_, TensorType))


def bytes_text(count: int) -> str:
    """``1.5 MB``"""
    size, units = float(count), ["bytes", "kB", "MB", "GB", "TB"]
    while size >= 1000 and len(units) > 1:
        size, units = size / 1000, units[1:]
    return f"{size:.3g} {units[0]}"

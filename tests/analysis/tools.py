"""A plain tensor function as a graph, and the brute-force oracle: change one element, see what changes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node as FxNode
from torch.fx.experimental.proxy_tensor import make_fx

from scg.analysis import Influence
from scg.ir import Graph, Input, Node, Op, Param, Ref, TensorType, Type

Values = dict[str, Any]


def type_of(value: Any) -> Type:
    if isinstance(value, Tensor):
        return TensorType(value.dtype, tuple(value.shape))
    if isinstance(value, tuple | list):
        return tuple(type_of(item) for item in value)
    return None


def capture(fn: Callable[..., Any], *tensors: Tensor) -> Graph:
    """``fn`` as a graph of ATen operations on inputs ``x0``, ``x1``…; tensors it closes over are constants."""
    traced = make_fx(fn, tracing_mode="real", pre_dispatch=True, _allow_non_fake_inputs=True)(*tensors)
    nodes: dict[str, Node] = {}
    renamed: dict[FxNode, Ref] = {}
    constants: dict[str, Tensor] = {}
    values: Values = {}
    outputs: Any = ()
    inputs = iter(tensors)
    for i, fx_node in enumerate(traced.graph.nodes):
        name = Ref(f"x{i}" if fx_node.op == "placeholder" else fx_node.name)
        renamed[fx_node] = name
        if fx_node.op == "placeholder":
            values[name] = next(inputs)
            nodes[name] = Input(name=name, type=type_of(values[name]), path=name, position=i)
        elif fx_node.op == "get_attr":
            values[name] = constants[name] = getattr(traced, fx_node.target)
            nodes[name] = Param(name=name, type=type_of(values[name]), path=name, role="constant")
        elif fx_node.op == "output":
            outputs = torch.fx.node.map_arg(fx_node.args[0], renamed.__getitem__)
        else:
            args, kwargs = torch.fx.node.map_arg((fx_node.args, dict(fx_node.kwargs)), renamed.__getitem__)
            op = Op(name=name, target=fx_node.target, args=_plain(args), kwargs=_plain(kwargs))
            values[name] = run(op, values)
            nodes[name] = Op(name=name, target=op.target, args=op.args, kwargs=op.kwargs, type=type_of(values[name]))
    last = next(reversed(nodes))
    return Graph(name="captured", nodes=nodes, objective=Ref(last), outputs=outputs, tensors=constants)


def _plain(tree: Any) -> Any:
    """fx's immutable lists and dicts as plain ones."""
    if isinstance(tree, tuple):
        return tuple(map(_plain, tree))
    if isinstance(tree, list):
        return [_plain(item) for item in tree]
    if isinstance(tree, dict):
        return {key: _plain(item) for key, item in tree.items()}
    return tree


def run(op: Op, values: Mapping[str, Any]) -> Any:
    """The value of one operation; noise is the same at every call."""

    def fill(tree: Any) -> Any:
        if isinstance(tree, Ref):
            return values[tree]
        if isinstance(tree, tuple | list):
            return type(tree)(map(fill, tree))
        return tree

    torch.manual_seed(7)
    return op.target(*fill(op.args), **{key: fill(value) for key, value in op.kwargs.items()})


def evaluate(graph: Graph, inputs: Mapping[str, Tensor]) -> Values:
    """The value of every node."""
    values: Values = dict(inputs)
    for node in graph:
        if isinstance(node, Param):
            values[node.name] = graph.tensors[node.path]
        elif isinstance(node, Op):
            values[node.name] = run(node, values)
    return values


def nudge(x: Tensor, at: int, amount: float) -> Tensor:
    """``x`` with one element changed."""
    changed = x.clone().reshape(-1)
    if x.dtype == torch.bool:
        changed[at] = ~changed[at]
    elif x.dtype.is_floating_point:
        changed[at] += amount
    else:
        changed[at] = (changed[at] + 1) % (int(x.max()) + 1)
    return changed.reshape(x.shape)


def changes(
    graph: Graph, inputs: Mapping[str, Tensor], amounts: Iterable[float] = (0.7, -1.3, 6.0)
) -> dict[tuple[str, str], Tensor]:
    """For each (node, input): a mask ``[*node, *input]`` of the pairs where changing the one changed the other."""
    base = evaluate(graph, inputs)
    found: dict[tuple[str, str], Tensor] = {}
    for source, x in inputs.items():
        for at in range(x.numel()):
            for amount in amounts:
                moved = evaluate(graph, {**inputs, source: nudge(x, at, amount)})
                for node in graph:
                    before, after = base[node.name], moved[node.name]
                    if not isinstance(before, Tensor) or isinstance(node, Param):
                        continue
                    same = (before == after) | ((before != before) & (after != after))
                    mask = found.setdefault(
                        (node.name, source), torch.zeros((*before.shape, x.numel()), dtype=torch.bool)
                    )
                    mask[..., at] |= ~same
    return {
        (node, source): mask.reshape(mask.shape[:-1] + inputs[source].shape) for (node, source), mask in found.items()
    }


def allowed(found: Influence, node: str, source: str, shape: tuple[int, ...], extent: tuple[int, ...]) -> Tensor:
    """The mask ``[*node, *source]`` of pairs that the analysis says may depend on each other."""
    relation = found.relation(node, source)
    mask = torch.zeros((*shape, *extent), dtype=torch.bool)
    if relation is None:
        return mask
    mask[...] = True
    for dim, (lo, hi) in enumerate(zip(relation.lo, relation.hi, strict=True)):
        size = relation.extent[dim]
        index = torch.arange(size)
        inside = (lo[..., None] <= index) & (index <= hi[..., None])  # [*node, size]
        spread = [1] * max(len(extent), 1)
        spread[dim] = size
        mask &= inside.reshape(*shape, *spread[: len(extent)]) if extent else inside.reshape(shape)
    return mask


def compare(
    graph: Graph, inputs: Mapping[str, Tensor], found: Influence, amounts: Iterable[float] = (0.7, -1.3, 6.0)
) -> tuple[list[str], int, int]:
    """Violations of soundness as text, and how many pairs the analysis allows and the oracle saw."""
    violations = []
    claimed = seen = 0
    for (node, source), mask in changes(graph, inputs, tuple(amounts)).items():
        shape, extent = tuple(mask.shape[: mask.ndim - inputs[source].ndim]), tuple(inputs[source].shape)
        may = allowed(found, node, source, shape, extent)
        if bool((mask & ~may).any()):
            violations.append(f"{graph.nodes[node]} depends on more of {source} than the analysis says")
        claimed += int(may.sum())
        seen += int((mask & may).sum())
    return violations, claimed, seen

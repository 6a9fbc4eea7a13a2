"""Small graphs from plain tensor functions, and their execution node by node: no tracer, no distributions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from scg.ir import Graph, Input, Node, Op, Param, Ref, TensorType, Type, map_refs


def capture(fn: Callable[..., Any], *inputs: Tensor, params: Mapping[str, Tensor] | None = None) -> Graph:
    """The operations of ``fn(*inputs, **params)`` as a graph: in-place writes stay in program order."""
    params = dict(params or {})
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    leaves = [*inputs, *params.values()]

    def flat(*tensors: Tensor) -> Any:
        return fn(*tensors[: len(inputs)], **dict(zip(params, tensors[len(inputs) :], strict=True)))

    fakes = [mode.from_tensor(leaf.detach()) for leaf in leaves]
    with mode:
        captured = make_fx(flat, pre_dispatch=True)(*fakes)
    nodes: list[Node] = []
    tensors = dict(params)
    outputs: Any = None
    placeholders = 0
    for node in captured.graph.nodes:
        type = type_of(node.meta.get("val"))
        if node.op == "placeholder" and placeholders < len(inputs):
            requires_grad = inputs[placeholders].requires_grad
            nodes.append(
                Input(name=node.name, type=type, path=node.name, position=placeholders, requires_grad=requires_grad)
            )
            placeholders += 1
        elif node.op == "placeholder":
            path = list(params)[placeholders - len(inputs)]
            is_buffer = not params[path].requires_grad
            placeholders += 1
            role: Any = "buffer" if is_buffer else "parameter"
            nodes.append(Param(name=node.name, type=type, path=path, role=role, requires_grad=not is_buffer))
        elif node.op == "get_attr":
            tensors[node.target] = getattr(captured, node.target)
            type = type_of(tensors[node.target])
            nodes.append(Param(name=node.name, type=type, path=node.target, role="constant"))
        elif node.op == "output":
            outputs = _refs(node.args[0])
        else:
            args, kwargs = _refs(node.args), _refs(node.kwargs)
            target = torch.ops.aten.detach.default if node.target is torch.ops.aten.detach_.default else node.target
            nodes.append(Op(name=node.name, type=type, loc="t.py:1", target=target, args=args, kwargs=kwargs))
    objective = outputs[0] if isinstance(outputs, tuple) else outputs
    table = {node.name: node for node in nodes}
    return Graph(name="test", nodes=table, objective=objective, outputs=outputs, tensors=tensors)


def run(graph: Graph, *inputs: Tensor) -> Any:
    """Executes the operations one by one."""
    values: dict[str, Any] = {}
    for node in graph:
        if isinstance(node, Input):
            values[node.name] = inputs[node.position]
        elif isinstance(node, Param):
            values[node.name] = graph.tensors[node.path]
        else:
            assert isinstance(node, Op)
            args, kwargs = map_refs(values.__getitem__, node.args), map_refs(values.__getitem__, node.kwargs)
            values[node.name] = node.target(*args, **kwargs)
            check_type(node, values[node.name])
    return map_refs(values.__getitem__, graph.outputs)


def check_type(node: Node, value: Any) -> None:
    """The value has the type that the node announces."""
    if isinstance(value, Tensor):
        assert type_of(value) == node.type, f"%{node.name}: {type_of(value)}, not {node.type}"


def type_of(value: Any) -> Type:
    if isinstance(value, Tensor):
        return TensorType(dtype=value.dtype, shape=tuple(value.shape), device=value.device)
    if isinstance(value, (tuple, list)):
        return tuple(type_of(item) for item in value)
    return None


def _refs(tree: Any) -> Any:
    if isinstance(tree, fx.Node):
        return Ref(tree.name)
    if isinstance(tree, (tuple, list)):
        return tuple(map(_refs, tree)) if isinstance(tree, tuple) else [_refs(item) for item in tree]
    if isinstance(tree, dict):
        return {key: _refs(item) for key, item in tree.items()}
    return tree


def names(graph: Graph) -> list[str]:
    """What each operation of the graph is called."""
    return [node.op_name for node in graph.of(Op)]


def check_rewrite(
    rewrite: Callable[[Graph], Graph],
    fn: Callable[..., Any],
    *inputs: Tensor,
    params: Mapping[str, Tensor] | None = None,
) -> Graph:
    """The rewritten graph computes what eager PyTorch does, in values and gradients, and is left alone by a second run.

    Inputs that require grad are differentiated; each call gets copies, so that writes into inputs are seen too.
    """
    graph = capture(fn, *inputs, params=params)
    before = str(graph)
    rewritten = rewrite(graph)
    assert str(graph) == before, "the input graph changed"
    assert rewrite(rewritten) == rewritten, "a second run changes something"
    expected = differentiate(lambda *xs: fn(*xs, **(params or {})), *inputs)
    actual = differentiate(lambda *xs: run(rewritten, *xs), *inputs)
    torch.testing.assert_close(actual, expected)
    return rewritten


def differentiate(fn: Callable[..., Any], *inputs: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Outputs of ``fn`` and the gradient of a fixed random function of them, under one seed."""
    torch.manual_seed(0)
    copies = [x.detach().clone().requires_grad_(x.requires_grad) for x in inputs]
    result = fn(*copies)
    outputs = tuple(result) if isinstance(result, (tuple, list)) else (result,)
    leaves = [x for x in copies if x.requires_grad]
    total = sum((x.sum() for x in leaves), torch.zeros(())) * 0  # so that each leaf has a gradient
    for y in outputs:
        if y.requires_grad:
            total = total + (y * torch.linspace(1, 2, y.numel(), dtype=y.dtype).reshape(y.shape)).sum()
    gradients = torch.autograd.grad(total, leaves) if leaves else ()
    return tuple(y.detach() for y in outputs), gradients

"""A program as eager execution runs it quickest: other calls for the values of those that it is shown as.

x * 0.5         ->  x * c             a number is made into a tensor at every call, and once more on the way back
x.mean(0)       ->  x.sum(0) / c
f(x).detach()   ->  f(x.detach())     f is not recorded for a derivative that nobody takes
self.const_0    ->  an argument       to look up a buffer takes as long as a small call
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from scg.backends.recorder import BUILT_IN
from scg.backends.torch_module import Program

_OF_NUMBERS = {
    operator.add, operator.sub, operator.mul, operator.truediv, operator.gt, operator.ge, operator.lt, operator.le,
    torch.add, torch.sub, torch.mul, torch.div, torch.where, "where", "clamp_min", "clamp_max",
}  # fmt: skip
_SUM_OF: dict[Any, Any] = {"mean": "sum", torch.mean: torch.sum}
_PRECISE = {torch.float32, torch.float64}


def call_by_call(program: Program, *, any_batch: bool = False) -> Callable[..., Any]:
    """What runs a program of one batch size, or of every."""
    module, values = rewritten(program, any_batch=any_batch)
    forward = module.forward
    return (lambda *args: forward(*args, *values)) if values else forward


def rewritten(program: Program, *, any_batch: bool) -> tuple[fx.GraphModule, list[Tensor]]:
    """The calls that are made instead, and the values of the arguments that they take in addition."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(program.module.graph, {}))
    if not any_batch:
        _sum_means(graph)
    _stop_gradients_first(graph)
    values = _take_constants(graph, program.module)
    return fx.GraphModule(nn.Module(), graph, "Step"), values


def _calls(graph: fx.Graph) -> list[fx.Node]:
    return [node for node in graph.nodes if node.op in ("call_function", "call_method")]


def _sum_means(graph: fx.Graph) -> None:
    for node in _calls(graph):
        if node.target not in _SUM_OF or "dtype" in node.kwargs or not _is_precise(node):
            continue
        (of,) = node.all_input_nodes
        before, after = of.meta["traits"], node.meta["traits"]
        if before.dtype != after.dtype or not after.numel:
            continue
        with graph.inserting_before(node):
            total = graph.create_node(node.op, _SUM_OF[node.target], node.args, node.kwargs)
            made = graph.call_function(operator.truediv, (total, before.numel // after.numel))
        total.meta, made.meta = dict(node.meta), dict(node.meta)
        node.replace_all_uses_with(made)
        graph.erase_node(node)


def _stop_gradients_first(graph: fx.Graph) -> None:
    arguments = graph.find_nodes(op="placeholder")
    stopped: dict[Any, fx.Node] = {
        node.args[0]: node for node in _calls(graph) if node.target in ("detach", torch.detach)
    }
    for call, node in list(stopped.items()):
        while [*call.users] == [node] and (source := _only_source(call)) is not None:
            first = stopped.get(source)
            place = arguments[-1] if source.op == "placeholder" else source
            if first is None:
                with graph.inserting_after(place):
                    first = stopped[source] = graph.call_method("detach", (source,))
                first.meta["traits"] = source.meta["traits"]._replace(learns=False)
            else:
                place.append(first)
            call.replace_input_with(source, first)
            call.meta["traits"] = node.meta["traits"]
            node.replace_all_uses_with(call)
            graph.erase_node(node)
            call, node = source, first


def _only_source(call: fx.Node) -> fx.Node | None:
    """The one argument with a gradient, of a call whose value is the same without; None of any other."""
    name = str(getattr(call.target, "__name__", call.target))
    plain = call.op == "call_method" or (call.op == "call_function" and isinstance(call.target, BUILT_IN))
    known = all("traits" in node.meta for node in (call, *call.all_input_nodes))
    if not plain or not known or call.meta.get("effect") or (name.endswith("_") and not name.endswith("__")):
        return None
    sources = [node for node in call.all_input_nodes if node.meta["traits"].learns]
    return sources[0] if len(sources) == 1 else None


def _take_constants(graph: fx.Graph, module: fx.GraphModule) -> list[Tensor]:
    """The module's constants and tensors of all numbers, which become the last arguments."""
    values: list[Tensor] = []
    numbers: dict[Any, fx.Node] = {}
    arguments = graph.find_nodes(op="placeholder")

    def argument(value: Tensor) -> fx.Node:
        with graph.inserting_after(arguments[-1] if arguments else graph._root):
            made = graph.placeholder("c")
        arguments.append(made)
        values.append(value)
        return made

    def tensor_of(number: Any, dtype: torch.dtype) -> fx.Node:
        key = (repr(number), dtype)
        if key not in numbers:
            numbers[key] = argument(torch.tensor(number, dtype=dtype))
        return numbers[key]

    for node in list(graph.nodes):
        if node.op == "get_attr":
            node.replace_all_uses_with(argument(getattr(module, str(node.target))))
            graph.erase_node(node)
        elif (dtype := _type_of_numbers(node)) is not None:
            node.args = tuple(arg if isinstance(arg, fx.Node) else tensor_of(arg, dtype) for arg in node.args)
    for node in arguments:
        node.target = node.name  # which no other one has
    return values


def _type_of_numbers(call: fx.Node) -> torch.dtype | None:
    """What the numbers are turned into that a call has among its arguments; None where they stay."""
    if call.target not in _OF_NUMBERS or call.kwargs or "traits" not in call.meta:
        return None
    if call.op == "call_method" and call.meta["traits"].learns and call.target != "where":
        return None  # the derivative where both are equal is another
    if any(type(arg) not in (fx.Node, int, float) for arg in call.args):
        return None
    like = [arg for arg in call.all_input_nodes if _is_precise(arg)]
    others = [arg for arg in call.all_input_nodes if arg not in like]
    if len(like) != 1 or any("traits" not in arg.meta or arg.meta["traits"].dtype != torch.bool for arg in others):
        return None
    found: torch.dtype = like[0].meta["traits"].dtype
    return found


def _is_precise(node: fx.Node) -> bool:
    """Of a type that calculates with numbers as they are, where a tensor of one number is read at once."""
    traits = node.meta.get("traits")
    return traits is not None and traits.on_cpu and traits.dtype in _PRECISE

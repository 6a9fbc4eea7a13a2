"""Builds a new graph node by node from an old one: what every rewriting pass shares."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, TypeGuard

import torch
from torch import Tensor

from scg.ir import Graph, Node, Op, Param, Ref, TensorType, Type, map_refs
from scg.operations import bind

aten = torch.ops.aten


class Rewriter:
    """The nodes of the new graph so far, and what stands for each old name.

    A rewritten node keeps its name whenever one new node holds its value, so that users of it need no change;
    helper nodes get fresh names derived from it.
    """

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.nodes: dict[str, Node] = {}
        self.tensors: dict[str, Tensor] = dict(graph.tensors)
        self._instead: dict[str, Ref] = {}

    def read(self, ref: Ref) -> Ref:
        """What stands for ``ref`` now."""
        return self._instead.get(ref, ref)

    def keep(self, node: Node) -> Ref:
        """Appends ``node``, reading what stands for its inputs now; the node itself if nothing changed."""
        if any(ref in self._instead for ref in node.inputs):
            node = node.rewire(self.read)
        return self.add(node)

    def add(self, node: Node) -> Ref:
        """Appends a node that already speaks of new names."""
        assert node.name not in self.nodes, f"%{node.name} is there already"
        self.nodes[node.name] = node
        return Ref(node.name)

    def substitute(self, name: str, ref: Ref) -> None:
        """``ref`` stands for the old node ``name`` from here on."""
        if name != ref:
            self._instead[name] = ref

    def op(
        self, target: Callable[..., Any], *args: Any, at: Node, name: str = "", type: Type = None, **kwargs: Any
    ) -> Ref:
        """Appends an operation at the place of ``at``; its type is found by running it on meta tensors.

        Without a ``name`` it gets a fresh one: that of ``at`` and the operation's.
        """
        variable = at.variable if name == at.name else ""
        name = name or self.fresh(f"{at.name}_{_base_name(target)}")
        type = type or infer_type(target, args, kwargs, self.type_of)
        return self.add(
            Op(name=name, type=type, loc=at.loc, scope=at.scope, variable=variable,
               target=target, args=args, kwargs=kwargs)
        )  # fmt: skip

    def constant(self, value: Tensor, *, at: Node, name: str) -> Ref:
        """Appends a `Param` of role constant that holds ``value``."""
        path = name
        while path in self.tensors:
            path += "_"
        self.tensors[path] = value
        return self.add(Param(name=name, type=type_of(value), loc=at.loc, scope=at.scope, path=path, role="constant"))

    def fresh(self, base: str) -> str:
        """A name in neither the old graph nor the new one."""
        return self.graph.fresh(base, self.nodes)

    def type_of(self, ref: Ref) -> Type:
        """Type of a new node."""
        return self.nodes[ref].type

    def shape(self, ref: Ref) -> tuple[int, ...]:
        """Shape of a new node that holds one tensor."""
        return self.nodes[ref].tensor.shape

    def finish(self) -> Graph:
        """The new graph; the old one itself if nothing changed."""
        graph = self.graph
        unchanged = len(self.nodes) == len(graph.nodes) and all(
            graph.nodes.get(name) is node for name, node in self.nodes.items()
        )
        if unchanged and not self._instead:
            return graph
        return graph.with_nodes(
            self.nodes.values(),
            objective=self.read(graph.objective),
            outputs=map_refs(self.read, graph.outputs),
            tail=frozenset(self.read(Ref(name)) for name in graph.tail) & self.nodes.keys(),
            tensors=self.tensors,
        )


def infer_type(
    target: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], type_of: Callable[[Ref], Type]
) -> Type:
    """The type of ``target(*args, **kwargs)``, found on meta tensors: no kernel runs."""
    devices: list[torch.device] = []

    def stand_in(ref: Ref) -> Any:
        return _stand_in(type_of(ref), devices)

    with torch.no_grad():
        result = target(*map_refs(stand_in, tuple(args)), **map_refs(stand_in, dict(kwargs)))
    return _type(result, devices[0] if devices else torch.device("cpu"))


def _stand_in(type: Type, devices: list[torch.device]) -> Any:
    if isinstance(type, tuple):
        return tuple(_stand_in(item, devices) for item in type)
    assert isinstance(type, TensorType), f"no stand-in for a value of type {type}"
    # scalars on the host may meet tensors of any device: the others decide
    devices.insert(len(devices) if type.ndim == 0 else 0, type.device)
    return torch.empty(type.shape, dtype=type.dtype, device="meta")


def _type(value: Any, device: torch.device) -> Type:
    if isinstance(value, Tensor):
        return dataclasses.replace(type_of(value), device=device)
    return tuple(_type(item, device) for item in value)


def type_of(tensor: Tensor) -> TensorType:
    """The type of a tensor at hand."""
    return TensorType(dtype=tensor.dtype, shape=tuple(tensor.shape), device=tensor.device)


def _base_name(target: Callable[..., Any]) -> str:
    return getattr(target, "__name__", "op").split(".")[0].strip("_")


def is_op(node: Node, *packets: Any) -> TypeGuard[Op]:
    """Whether ``node`` is an `Op` that calls an overload of one of ``packets`` (``aten.view``, …)."""
    return isinstance(node, Op) and getattr(node.target, "overloadpacket", None) in packets


def with_argument(node: Op, name: str, value: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """``args`` and ``kwargs`` of ``node`` with the ATen argument ``name`` set to ``value``."""
    position = list(bind(node)).index(name)
    if position < len(node.args):
        return (*node.args[:position], value, *node.args[position + 1 :]), dict(node.kwargs)
    return node.args, {**node.kwargs, name: value}

"""From the recorded fx graph to the IR: names, types, and none of the glue that recording leaves behind."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverload

from scg import ir
from scg.errors import TraceError
from scg.ir import Ref
from scg.tracer_operations import Fact
from scg.tracer_recorder import Recorder

aten = torch.ops.aten

_PRIORITY: dict[type[ir.Node], int] = {ir.Sample: 0, ir.Cost: 1, ir.Input: 2, ir.Param: 3, ir.Dist: 4}
"""Who gets a name that two kinds of node want."""


class Converter:
    """One conversion; `nodes` fills up in program order."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder
        self.facts = recorder.tracer.facts
        self.source = list(recorder.tracer.graph.nodes)
        self.fresh = _Names()
        self.names = _names(self.source, self.facts, self.fresh)
        self.nodes: dict[str, ir.Node] = {}
        self._refs: dict[fx.Node, Ref] = {}
        """What stands for an fx node in the IR."""
        self._live: set[str] = set()
        """Names of the nodes that a gradient may flow back from."""
        self._detached: dict[Ref, Ref] = {}
        self._written = _written(self.source)

    def convert(self) -> dict[str, ir.Node]:
        for node in self.source:
            ref = self._refs[node] = self._convert(node)
            if self.facts[node].live and ref in self.nodes and _differentiable(self.nodes[ref].type):
                self._live.add(ref)
        return self.nodes

    def ref(self, node: fx.Node) -> Ref:
        return self._refs[node]

    # -- one node --------------------------------------------------------------------------------------------------
    def _convert(self, node: fx.Node) -> Ref:
        fact = self.facts[node]
        if fact.made is not None:
            return self._made(node, fact, *fact.made)
        if not isinstance(node.target, OpOverload) and node.target is not operator.getitem:
            raise TraceError(f"{fact.loc}: {node.target} cannot be captured.")
        if node.target is aten.lift_fresh_copy.default and node not in self._written:
            return self._refs[node.args[0]]  # type: ignore[index]
        if node.target is aten.detach_.default and not self._is_live(node.args[0]):
            return self._refs[node.args[0]]  # type: ignore[index]
        target: Any = aten.detach.default if node.target is aten.detach_.default else node.target
        if target is aten.broadcast_tensors.default:
            return Ref("")  # only its outputs are wanted, see `_broadcast`
        if target is operator.getitem and node.args[0].target is aten.broadcast_tensors.default:  # type: ignore[union-attr]
            return self._broadcast(node, fact)
        if target in _DRAWS and any(ref in self._live for ref in ir.refs_in(self._resolve(node.args))):
            raise TraceError(
                f"{fact.loc}: {target._schema.name.removeprefix('aten::')} draws with parameters that are learned or "
                "depend on a site, and has no gradient for them. Draw from a torch.distributions object instead."
            )
        args, kwargs = self._resolve(node.args), self._resolve(node.kwargs)
        if fact.no_grad:
            self._check_write(target, args, kwargs, fact)
            args, kwargs = self._detach((args, kwargs), fact)
        return self._add(
            ir.Op(name=self.names[node], type=_type(node.meta.get("val")), loc=fact.loc, scope=fact.scope,
                  variable=fact.variable, target=target, args=args, kwargs=kwargs,
                  picks=fact.picks)
        )  # fmt: skip

    def _made(self, node: fx.Node, fact: Fact, kind: type[ir.Node], fields: dict[str, Any]) -> Ref:
        type_ = _type(node.meta.get("val"))
        fields = {key: self._resolve(value) for key, value in fields.items()}
        if kind is ir.Sample:
            assert isinstance(type_, ir.TensorType)
            type_ = ir.TensorType(type_.dtype, type_.shape, node.meta["event_ndim"], device=type_.device)
        if kind is ir.Cost:
            fields["label"] = self.names[node]
        place = {"loc": fact.loc, "scope": fact.scope, "variable": fact.variable}
        ref = self._add(kind(name=self.names[node], type=type_, **place, **fields))
        if fact.no_grad and kind in (ir.LogProb, ir.Op, ir.Cost, ir.Depends, ir.Bound, ir.Marginal):
            return self._detached_ref(ref, fact)
        return ref

    def _broadcast(self, node: fx.Node, fact: Fact) -> Ref:
        """``broadcast_tensors([a, b])[i]`` as ``a.expand(shape)``, or as ``a`` where nothing changes."""
        sources, index = node.args[0].args[0], node.args[1]  # type: ignore[union-attr]
        source = self._resolve(sources[index])  # type: ignore[index]
        type_ = _type(node.meta["val"])
        assert isinstance(type_, ir.TensorType)
        if self.nodes[source].tensor.shape == type_.shape:
            return source  # type: ignore[no-any-return]
        name = self.fresh("expand")
        args = (source, list(type_.shape))
        return self._add(
            ir.Op(name=name, type=type_, loc=fact.loc, scope=fact.scope, target=aten.expand.default, args=args)
        )

    def _add(self, node: ir.Node) -> Ref:
        self.nodes[node.name] = node
        return Ref(node.name)

    def _check_write(self, target: Any, args: Any, kwargs: Any, fact: Fact) -> None:
        """Refuses to write unseen by autograd where a gradient flows: its later readers would not know of both."""
        if any(ref in self._live for ref in _writes(target, args, kwargs) if isinstance(ref, Ref)):
            raise TraceError(
                f"{fact.loc}: an in-place write under no_grad to a tensor that a gradient flows through. "
                "Write x = x + (new - x).detach(), or do it outside of the model."
            )

    # -- helpers ---------------------------------------------------------------------------------------------------
    def _resolve(self, tree: Any) -> Any:
        if isinstance(tree, fx.Node):
            return self._refs[tree]
        if isinstance(tree, torch.Size):
            return tuple(tree)
        if isinstance(tree, tuple):
            return tuple(self._resolve(item) for item in tree)
        if isinstance(tree, list):
            return [self._resolve(item) for item in tree]
        if isinstance(tree, dict):
            return {key: self._resolve(item) for key, item in tree.items()}
        if isinstance(tree, slice):
            return slice(self._resolve(tree.start), self._resolve(tree.stop), self._resolve(tree.step))
        return tree

    def _is_live(self, node: Any) -> bool:
        return isinstance(node, fx.Node) and self._refs[node] in self._live

    def _detach(self, tree: Any, fact: Fact) -> Any:
        """``tree`` with a detach behind every reference a gradient may flow back from.

        Inputs are detached rather than outputs: an in-place write under ``no_grad`` has to reach the same memory.
        """

        return ir.map_refs(lambda ref: self._detached_ref(ref, fact) if ref in self._live else ref, tree)

    def _detached_ref(self, ref: Ref, fact: Fact) -> Ref:
        if ref not in self._detached:
            name = self.fresh("detach")
            type_ = self.nodes[ref].type
            self._detached[ref] = self._add(
                ir.Op(name=name, type=type_, loc=fact.loc, scope=fact.scope, target=aten.detach.default, args=(ref,))
            )
        return self._detached[ref]


def without_glue(nodes: dict[str, ir.Node], keep: Iterable[str]) -> dict[str, ir.Node]:
    """The nodes without captured tensors, views and literals that nothing reads."""
    used = set(keep)
    kept: list[ir.Node] = []
    for node in reversed(nodes.values()):
        glue = isinstance(node, ir.Param) or (isinstance(node, ir.Op) and _is_glue(node.target))
        if node.name in used or not glue:
            kept.append(node)
            used.update(node.inputs)
    return {node.name: node for node in reversed(kept)}


_DRAWS = frozenset({
    aten.bernoulli.default, aten.bernoulli_.Tensor, aten.multinomial.default, aten.normal.Tensor_float,
    aten.normal.float_Tensor, aten.normal.Tensor_Tensor, aten.poisson.default, aten.binomial.default,
    aten._standard_gamma.default, aten._sample_dirichlet.default,
})  # fmt: skip
"""Random operations with tensor parameters: noise as long as nothing is learned from them."""

_GLUE = frozenset({aten.detach.default, aten.expand.default, aten.lift_fresh_copy.default})


def _is_glue(target: Any) -> bool:
    return target in _GLUE or target is operator.getitem


class _Names:
    """Hands out each name once: ``z``, then ``z_1``, ``z_2``…"""

    def __init__(self) -> None:
        self.taken: set[str] = set()
        self._last: dict[str, int] = {}

    def __call__(self, wanted: str) -> str:
        name = wanted
        if name in self.taken:
            stem, _, number = wanted.rpartition("_")
            stem, first = (stem, int(number)) if stem and number.isdecimal() else (wanted, 0)
            n = max(first, self._last.get(stem, 0))
            while name in self.taken:
                n += 1
                name = f"{stem}_{n}"
            self._last[stem] = n
        self.taken.add(name)
        return name


def _names(nodes: list[fx.Node], facts: dict[fx.Node, Fact], fresh: _Names) -> dict[fx.Node, str]:
    """A unique name for each node: sites and costs first, then arguments and parameters, then the rest."""

    def priority(node: fx.Node) -> int:
        fact = facts[node]
        kind = fact.made[0] if fact.made is not None else ir.Op
        return 2 * _PRIORITY.get(kind, 5) + (not fact.explicit)

    names: dict[fx.Node, str] = {}
    explicit: dict[str, fx.Node] = {}
    for node in sorted(nodes, key=priority):  # stable: program order within a kind
        fact = facts[node]
        wanted = node.meta.get("hint", node.name)
        is_site = fact.made is not None and fact.made[0] is ir.Sample
        if is_site and fact.explicit:
            first = explicit.setdefault(wanted, node)
            if first is not node:
                raise TraceError(
                    f"{fact.loc}: two sites are named {wanted!r}, the first at {facts[first].loc}. "
                    f'Give each its own name, in a loop such as f"{wanted}_{{t}}".'
                )
        names[node] = fresh(wanted)
    return names


def _written(nodes: list[fx.Node]) -> set[fx.Node]:
    """The nodes whose memory a later operation writes to."""
    return {
        memory
        for node in nodes
        if node.target is not aten.detach_.default
        for value in _writes(node.target, node.args, node.kwargs)
        for memory in _memory(value)
    }


def _writes(target: Any, args: Any, kwargs: Any) -> list[Any]:
    """The arguments that an operation writes to."""
    if not isinstance(target, OpOverload) or not target._schema.is_mutable:
        return []
    given = dict(zip((argument.name for argument in target._schema.arguments), args, strict=False)) | dict(kwargs)
    return [
        given[argument.name]
        for argument in target._schema.arguments
        if argument.alias_info is not None and argument.alias_info.is_write and argument.name in given
    ]


def _memory(value: Any) -> Iterable[fx.Node]:
    """``value`` and the nodes it may be a view of."""
    while isinstance(value, fx.Node):
        yield value
        value = value.args[0] if value.args else None
        if isinstance(value, (list, tuple)):
            value = value[0] if value else None


def _type(value: Any) -> ir.Type:
    if isinstance(value, Tensor):
        return ir.TensorType(value.dtype, tuple(value.shape), device=value.device)
    if isinstance(value, (tuple, list)):
        return tuple(_type(item) for item in value)
    if isinstance(value, (torch.SymInt, int)):
        return int
    return None


def _differentiable(type_: ir.Type) -> bool:
    if isinstance(type_, tuple):
        return any(_differentiable(item) for item in type_)
    if isinstance(type_, ir.TensorType):
        return type_.dtype.is_floating_point or type_.dtype.is_complex
    return type_ is None  # a distribution

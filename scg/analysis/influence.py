"""Influence: which elements of which sites each element of each value depends on.

For a value ``v`` and a site ``s``, a `Relation` holds two integer tensors of ``v``'s shape for each element dim of
``s``: element ``a`` of ``v`` depends on ``s`` only through the box of elements from ``lo(a)`` to ``hi(a)``::

    z            lo = hi = 0 1 2 3        tied
    z.flip(0)    lo = hi = 3 2 1 0
    z.cumsum(0)  lo = 0 0 0 0, hi = 0 1 2 3
    z.mean(0)    lo = 0, hi = 3           mixed
    z.detach()   lo = hi = 0 1 2 3        influence is no gradient

The boxes are moved through the graph by the rules of `scg.analysis.rules`. They are interned by content, and sites with
the same relations to all inputs of a node are handled as one, so that a chain of T sites costs about T steps.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, Literal

import torch
from torch import Tensor

from scg.analysis import rules
from scg.analysis.decompose import decompose
from scg.analysis.rules import Call, Depths, Shape, Unknown
from scg.ir import (
    Bound,
    Cost,
    Depends,
    Dist,
    Expected,
    Graph,
    LogProb,
    Marginal,
    Node,
    Op,
    Opaque,
    Param,
    Ref,
    Sample,
    TensorType,
    map_refs,
    refs_in,
)
from scg.operations import bind, is_impure, is_random, lookup

FAR = float(2**40)
"""Beyond every index; a float64 still counts there exactly."""

Link = Literal["tied", "mixed", "point", "banded", "box"]

EdgeParts = tuple[tuple[int | None, ...], tuple[bool, ...], tuple[str, ...], bool]
"""Of a credit edge: axes, mixed dims, words, and whether these say all."""


@dataclass(frozen=True, eq=False)
class _Range:
    """Interned lower and upper depths of one site dim, stride 0 where they do not vary."""

    low: Tensor
    high: Tensor


@dataclass(frozen=True, eq=False)
class Relation:
    """How the elements of one value depend on those of one site; interned, so compare by identity."""

    shape: Shape
    """Of the value."""
    extent: Shape
    """Sizes of the site's element dims; one pseudo dim of size 1 for a site without any."""
    _ranges: tuple[_Range, ...] = field(repr=False)

    @cached_property
    def edges(self) -> dict[tuple[Shape, int], EdgeParts]:
        """What credit edges were made from it, by the site's shape and number of element dims."""
        return {}

    @cached_property
    def lo(self) -> tuple[Tensor, ...]:
        """Per site dim, the lowest index each value element reads; stride 0 where it does not vary."""
        return tuple(_integers(r.low, 1) for r in self._ranges)

    @cached_property
    def hi(self) -> tuple[Tensor, ...]:
        """Per site dim, the highest index each value element reads; below ``lo`` where it reads nothing."""
        return tuple(_integers(r.high, -1) for r in self._ranges)

    @cached_property
    def empty(self) -> Tensor:
        """Which value elements read nothing of the site, stride 0 where that does not vary."""
        gaps = [rules.tight(r.low) == 0 for r in self._ranges]
        gap = gaps[0]
        for other in gaps[1:]:
            gap = gap | other
        return gap.expand(self.shape)

    def tied(self, site_dim: int) -> int | None:
        """The value's dim along which element ``a`` reads just index ``a`` of ``site_dim``, else None."""
        return self._tied[site_dim]

    @cached_property
    def _tied(self) -> tuple[int | None, ...]:
        return tuple(self._tied_dim(i) for i in range(len(self.extent)))

    def _tied_dim(self, site_dim: int) -> int | None:
        low, high = rules.tight(self._ranges[site_dim].low), rules.tight(self._ranges[site_dim].high)
        varying = [d for d, size in enumerate(low.shape) if size > 1]
        size = self.extent[site_dim]
        if low.shape != high.shape or len(varying) != 1 or low.numel() != size:
            return None
        indices = torch.arange(size, dtype=torch.float64, device="cpu")
        exact = torch.equal(low.flatten(), indices - FAR) and torch.equal(high.flatten(), -indices - FAR)
        return varying[0] if exact else None

    def mixed(self, site_dim: int) -> bool:
        """Does every value element read the full range of ``site_dim``?"""
        low, high = rules.tight(self._ranges[site_dim].low), rules.tight(self._ranges[site_dim].high)
        whole = low.numel() == 1 and high.numel() == 1
        return whole and float(low) == -FAR and float(high) == -(self.extent[site_dim] - 1) - FAR

    def pointlike(self, site_dim: int) -> bool:
        """Does every value element read at most one index of ``site_dim``?"""
        return self._pointlike[site_dim]

    @cached_property
    def _pointlike(self) -> tuple[bool, ...]:
        return tuple(bool((lo >= hi).all()) for lo, hi in zip(self.lo, self.hi, strict=True))

    def classify(self) -> tuple[Link, ...]:
        """One word a site dim: tied, mixed, point (one index each), banded (moves along one dim), or a general box."""
        return tuple(self._link(i) for i in range(len(self.extent)))

    def _link(self, site_dim: int) -> Link:
        if self.mixed(site_dim):
            return "mixed"
        if self.tied(site_dim) is not None:
            return "tied"
        if self.pointlike(site_dim):
            return "point"
        lo, hi = rules.tight(self._ranges[site_dim].low), rules.tight(self._ranges[site_dim].high)
        varying = {d for x in (lo, hi) for d, size in enumerate(x.shape) if size > 1}
        if len(varying) == 1 and not bool(self.empty.any()):
            (dim,) = varying
            if all(bool((x.diff(dim=dim) * sign >= 0).all()) for x, sign in ((lo, 1), (hi, -1))):
                return "banded"
        return "box"


def _integers(depth: Tensor, sign: int) -> Tensor:
    return (sign * (rules.tight(depth) + FAR)).long().expand(depth.shape)


_States = dict[Relation, int]
"""For one value: its relations, each with the bit set of the sites that have it."""


@dataclass(frozen=True)
class Influence:
    """The relations of every node of a graph to every site."""

    sources: tuple[str, ...]
    fallbacks: Mapping[str, str]
    """Nodes taken as "every element reads everything", and why."""
    _states: Mapping[str, tuple[_States, ...]] = field(repr=False)
    _bits: Mapping[str, int] = field(repr=False)

    def relation(self, node: str, site: str) -> Relation | None:
        """How ``node`` (one tensor) depends on ``site``; None: not at all."""
        bit = self._bits[site]
        return next((relation for relation, sites in self._only(node).items() if sites & bit), None)

    def sites(self, node: str) -> frozenset[str]:
        """The sites that any output of ``node`` depends on."""
        mask = 0
        for state in self._states.get(node, ()):
            for sites in state.values():
                mask |= sites
        return frozenset(name for name, bit in self._bits.items() if mask & bit)

    def related(self, node: str) -> dict[str, Relation]:
        """Every site that ``node`` (one tensor) depends on, and how."""
        states = self._only(node)
        return {name: relation for name, bit in self._bits.items() for relation, sites in states.items() if sites & bit}

    def relations(self, nodes: Iterable[str]) -> dict[str, list[Relation]]:
        """For each site, the different ways in which ``nodes`` (each one tensor), but itself, depend on it."""
        sites_of: _States = {}
        for node in nodes:
            own = self._bits.get(node, 0)
            for relation, sites in self._only(node).items():
                sites_of[relation] = sites_of.get(relation, 0) | sites & ~own
        return {
            name: [relation for relation, sites in sites_of.items() if sites & bit] for name, bit in self._bits.items()
        }

    def _only(self, node: str) -> _States:
        states = self._states.get(node, ())
        assert len(states) <= 1, f"%{node} has several outputs: ask about the nodes that take one"
        return states[0] if states else {}


def influence(
    graph: Graph, sources: Iterable[str] | None = None, *, through_detach: bool = True, through_sites: bool = True
) -> Influence:
    """Follows ``sources`` through ``graph``, which must write nothing in place.

    Args:
        graph: Any graph of functional operations.
        sources: Names of samples, inputs or any other nodes holding one tensor; by default all samples but data.
        through_detach: Whether a detached value still depends on what it was computed from.
        through_sites: Whether a site depends on the sites that its parameters depend on.
    """
    if sources is None:
        sources = [node.name for node in graph.of(Sample) if not node.data]
    with torch.no_grad():
        analysis = _Analysis(graph, tuple(sources), through_detach, through_sites)
        for node in graph:
            analysis.visit(node)
    return Influence(analysis.sources, analysis.fallbacks, analysis.states, analysis.bits)


@contextmanager
def shared_ranges() -> Iterator[None]:
    """The analyses within remember together what nodes made of ranges: passes ask about graphs that differ little."""
    token = _pool.set(_Pool())
    try:
        yield
    finally:
        _pool.reset(token)


_Rule = Callable[[Mapping[Ref, Tensor]], Depths]
_Found = tuple[tuple["_Range | None", ...], str | None]
"""The ranges of a node's outputs, and why every element was taken to read everything."""


class _Pool:
    """Interns ranges and relations by content, and remembers what nodes made of them."""

    def __init__(self) -> None:
        self.found: dict[Any, _Found] = {}
        self._ranges: dict[Any, _Range] = {}
        self._relations: dict[Any, Relation] = {}
        self._nodes: dict[int, Node] = {}

    def identity(self, node: Node) -> int:
        """A number that no other node gets, which it is kept alive for."""
        self._nodes[id(node)] = node
        return id(node)

    def range(self, low: Tensor | None, high: Tensor | None) -> _Range | None:
        """The range of these depths; None if they read nothing."""
        if low is None or high is None or low.numel() == 0:
            return None
        shape = tuple(low.shape)
        low, high = _compress(low), _compress(high)
        if not bool(low.any()):
            return None
        key = (shape, low.shape, high.shape, low.numpy().tobytes(), high.numpy().tobytes())
        if key not in self._ranges:
            self._ranges[key] = _Range(low.expand(shape), high.expand(shape))
        return self._ranges[key]

    def relation(self, extent: Shape, ranges: tuple[_Range, ...]) -> Relation:
        key = (extent, ranges)
        if key not in self._relations:
            self._relations[key] = Relation(tuple(ranges[0].low.shape), extent, ranges)
        return self._relations[key]


_pool: ContextVar[_Pool | None] = ContextVar("pool", default=None)


def _compress(x: Tensor) -> Tensor:
    """``x`` with size 1 along every dim over which its values do not vary."""
    x = rules.tight(x)
    for dim, size in enumerate(x.shape):
        if size > 1 and bool((x == x.narrow(dim, 0, 1)).all()):
            x = x.narrow(dim, 0, 1)
    return (x + 0.0).contiguous()  # + 0.0: no negative zeros, which would be other bytes


class _Analysis:
    """One forward pass; see `influence`."""

    def __init__(self, graph: Graph, sources: tuple[str, ...], through_detach: bool, through_sites: bool) -> None:
        self.graph = graph
        self.sources = sources
        self.through_detach = through_detach
        self.through_sites = through_sites
        self.bits = {name: 1 << i for i, name in enumerate(sources)}
        self.states: dict[str, tuple[_States, ...]] = {}
        self.fallbacks: dict[str, str] = {}
        self.pool = _pool.get() or _Pool()
        self.constants: dict[str, Any] = {}
        self.parts: dict[Any, Any] = {}
        self.worlds: list[Ref] = []  # what impure opaque calls have been told so far

    # -- one node
    def visit(self, node: Node) -> None:
        if (value := _fold(self.graph, node, self.constants)) is not None:
            self.constants[node.name] = value
        states = self._follow(node)
        if node.name in self.bits:
            assert len(states) <= 1, f"%{node.name} has several outputs and cannot be a source"
            own = {self._identity(node): self.bits[node.name]} if 0 not in node.tensor.shape else {}
            states = (_union(states[0], own, self._join) if states else own,)
        if any(states):
            self.states[node.name] = states
        if isinstance(node, Op) and lookup(node.target) is not None and is_impure(node):
            self._write_statistics(node)

    def _write_statistics(self, node: Op) -> None:
        """Running statistics of a batch norm read its input: so does whoever reads them after it."""
        named = bind(node)
        read = [ref for ref in refs_in(node.args) if ref in self.states]
        for ref in (named.get("running_mean"), named.get("running_var")):
            if isinstance(ref, Ref) and read:
                buffer = self.graph.nodes[ref]
                rule = partial(_all_of, _shapes(buffer))
                self.states[ref] = self._through(buffer, read, rule, None)

    def _identity(self, node: Node) -> Relation:
        """Every element depends on itself; event dims share their element."""
        shape = node.tensor.shape
        extent = shape[: len(shape) - node.tensor.event_ndim]
        if not extent:
            one = torch.full((), -FAR, dtype=torch.float64, device="cpu").expand(shape)
            whole = self.pool.range(one, one)
            assert whole is not None
            return self.pool.relation((1,), (whole,))
        ranges = []
        for dim, size in enumerate(extent):
            index = torch.arange(size, dtype=torch.float64, device="cpu")
            index = index.reshape([-1 if d == dim else 1 for d in range(len(shape))]).expand(shape)
            found = self.pool.range(index - FAR, -index - FAR)
            assert found is not None
            ranges.append(found)
        return self.pool.relation(extent, tuple(ranges))

    def _join(self, one: Relation, other: Relation) -> Relation:
        pairs = zip(one._ranges, other._ranges, strict=True)
        ranges = [self.pool.range(torch.minimum(a.low, b.low), torch.minimum(a.high, b.high)) for a, b in pairs]
        return self.pool.relation(one.extent, tuple(r for r in ranges if r is not None))

    def _follow(self, node: Node) -> tuple[_States, ...]:
        """The relations that ``node`` gets from what it reads."""
        match node:
            case Op():
                return self._op(node)
            case Cost() | Bound():
                return self.states.get(node.value, ())
            case Marginal():
                return (self._marginal(node),)
            case Dist():
                return self._through(node, node.params, partial(_dist, node), self.pool.identity(node))
            case Sample():
                refs = ((node.dist,) if self.through_sites else ()) + ((node.value,) if node.value else ())
                key = (self.through_sites, self._with_dist(node))
                return self._through(node, refs, partial(_sample, node, self._dist(node.dist)), key)
            case LogProb():
                rule = partial(_log_prob, node, self._dist(node.dist))
                return self._through(node, (node.dist, node.value), rule, self._with_dist(node))
            case Expected():
                return self._through(node, node.dists, partial(_expected, node), None)
            case Depends():
                return self._through(node, (node.value, node.on), partial(_depends, node), None)
            case Opaque():
                refs = refs_in(node.args)
                if not node.pure:
                    self.worlds.extend(refs)
                    refs = tuple(self.worlds)
                return self._through(node, refs, partial(_opaque, node, _shapes(node)), None)
            case _:
                return ()

    def _marginal(self, node: Marginal) -> _States:
        """What the value reads, but for the sites that are summed."""
        summed = sum(self.bits[s.name] for s in self.graph.of(Sample) if s.name in self.bits and node.sums(s))
        if node.value is not None:
            return self._without(summed, node.value)
        inputs = {ref: self._without(summed, ref) for ref in dict.fromkeys(node.inputs)}
        (states,) = self._joined(node, inputs, partial(_marginal, node), None)
        return states

    def _without(self, sites: int, ref: Ref) -> _States:
        (states,) = self.states.get(ref, ({},))
        return {relation: left for relation, related in states.items() if (left := related & ~sites)}

    def _with_dist(self, node: Sample | LogProb) -> tuple[int, int]:
        return self.pool.identity(node), self.pool.identity(self._dist(node.dist))

    def _dist(self, ref: Ref) -> Dist:
        dist = self.graph.nodes[ref]
        assert isinstance(dist, Dist)
        return dist

    def _op(self, node: Op) -> tuple[_States, ...]:
        if node.target is operator.getitem:
            states = self.states.get(node.args[0])
            return (states[node.args[1]],) if states else ()
        if not any(ref in self.states for ref in node.inputs):
            return ()
        if not self.through_detach and _is_detach(node):
            return ()
        _refuse_writes(node)
        types = {ref: type_ for ref in node.inputs if isinstance(type_ := self.graph.nodes[ref].type, TensorType)}
        key, refs = self._signature(node, types)
        return self._through(node, refs, lambda d: self._run(node, types, self.constants, d), key)

    def _signature(self, node: Op, types: Mapping[Ref, TensorType]) -> tuple[Any, tuple[Ref, ...]]:
        """What decides the rule's result besides the relations: equal in every step of a loop."""
        refs = tuple(dict.fromkeys(node.inputs))

        def stand_in(ref: Ref) -> Any:
            known = (self, ref) if ref in self.constants else None  # other graphs may have another constant there
            return (refs.index(ref), types.get(ref), known)

        arguments = _freeze(map_refs(stand_in, [list(node.args), dict(node.kwargs)]))
        return (node.target, arguments, _shapes(node)), refs

    # -- groups of sites
    def _through(self, node: Node, refs: Iterable[Ref], rule: _Rule, key: Any) -> tuple[_States, ...]:
        """Applies ``rule`` once for each class of sites that have the same relations to all of ``refs``."""
        found = {ref: self.states.get(ref, ({},)) for ref in refs}
        return self._joined(node, {ref: s[0] if len(s) == 1 else {} for ref, s in found.items()}, rule, key)

    def _joined(self, node: Node, inputs: Mapping[Ref, _States], rule: _Rule, key: Any) -> tuple[_States, ...]:
        distinct = tuple(inputs)
        shapes = _shapes(node)
        outputs: tuple[_States, ...] = tuple({} for _ in shapes)
        for operands, sites in _classes(list(inputs.values())):
            extent = operands[0][1].extent
            per_dim = []
            for dim in range(len(extent)):
                ranges = tuple((i, relation._ranges[dim]) for i, relation in operands)
                found = self.pool.found.get((key, ranges)) if key is not None else None
                if found is None:
                    found = self._ranges(node, shapes, rule, {distinct[i]: r for i, r in ranges})
                    if key is not None:
                        self.pool.found[key, ranges] = found
                if found[1] is not None:
                    self.fallbacks[node.name] = found[1]
                per_dim.append(found[0])
            for i, output in enumerate(outputs):
                ranges_out = tuple(found[i] for found in per_dim)
                if all(r is not None for r in ranges_out):
                    relation = self.pool.relation(extent, tuple(r for r in ranges_out if r is not None))
                    output[relation] = output.get(relation, 0) | sites
        return outputs

    def _ranges(self, node: Node, shapes: tuple[Shape, ...], rule: _Rule, operands: Mapping[Ref, _Range]) -> _Found:
        why = None
        lows, highs = ({ref: getattr(r, end) for ref, r in operands.items()} for end in ("low", "high"))
        try:
            low, high = rule(lows), rule(highs)
            _check(low, shapes)
            _check(high, shapes)
        except (Unknown, RuntimeError, ValueError, TypeError, IndexError, KeyError, NotImplementedError) as error:
            # Sound whatever a rule stumbled over: every output reads all that any input reads.
            why = f"{type(error).__name__}: {error}"
            low, high = (rules.everything(ends.values(), shapes) for ends in (lows, highs))
        return tuple(self.pool.range(a, b) for a, b in zip(low, high, strict=True)), why

    # -- operations
    def _run(
        self, node: Op, types: Mapping[Ref, TensorType], constants: Mapping[str, Any], depths: Mapping[Ref, Tensor]
    ) -> Depths:
        depths = {ref: depth for ref, depth in depths.items() if ref in types}
        if not depths:
            return [None for _ in _shapes(node)]
        op = lookup(node.target)
        if op is not None:
            call = Call(op, node.target, bind(node), types, depths, constants.get, _shapes(node))
            try:
                result = rules.RULES[op.kind](call)
                _check(result, call.outputs)
                return result
            except Unknown:
                pass  # its decomposition may know better
        return self._dissolve(node, types, constants, depths)

    def _dissolve(
        self, node: Op, types: Mapping[Ref, TensorType], constants: Mapping[str, Any], depths: Mapping[Ref, Tensor]
    ) -> Depths:
        """Runs the operations that ``node`` consists of."""
        key = (node.name, tuple(types))
        if key not in self.parts:
            try:
                self.parts[key] = decompose(node, types)
            except Unknown as error:
                self.parts[key] = error
        if isinstance(self.parts[key], Unknown):
            raise self.parts[key]
        nodes, results = self.parts[key]
        types, depths = dict(types), dict(depths)
        known: dict[str, Any] = {ref: constants[ref] for ref in types if ref in constants}
        for part in nodes:
            if (value := _fold(None, part, known)) is not None:
                known[part.name] = value
            part_types = {ref: types[ref] for ref in part.inputs}
            read = {ref: depths[ref] for ref in part.inputs if ref in depths}
            found = self._run(part, part_types, known, read)
            for ref, type_, depth in zip(*_names(part), found, strict=True):
                types[ref] = type_
                if depth is not None:
                    depths[ref] = rules.loosen(depth)
        return [depths.get(ref) if ref is not None else None for ref in results]


def _names(part: Op) -> tuple[list[Ref], list[TensorType]]:
    """A decomposed operation's outputs: `_3`, or `_3.0`, `_3.1`."""
    if isinstance(part.type, TensorType):
        return [Ref(part.name)], [part.type]
    assert isinstance(part.type, tuple)
    return [Ref(f"{part.name}.{i}") for i in range(len(part.type))], [t for t in part.type if isinstance(t, TensorType)]


def _all_of(shapes: tuple[Shape, ...], depths: Mapping[Ref, Tensor]) -> Depths:
    return rules.everything(depths.values(), shapes)


def _check(depths: Depths, shapes: tuple[Shape, ...]) -> None:
    if len(depths) != len(shapes):
        raise Unknown(f"{len(depths)} outputs followed of {len(shapes)}")
    for depth, shape in zip(depths, shapes, strict=True):
        if depth is not None and tuple(depth.shape) != shape:
            raise Unknown(f"followed to shape {tuple(depth.shape)}, but it is {shape}")


def _shapes(node: Node) -> tuple[Shape, ...]:
    """Shapes of the outputs; a distribution counts as one value of its batch shape."""
    if isinstance(node, Dist):
        return (node.template.batch_shape,)
    if isinstance(node.type, TensorType):
        return (node.type.shape,)
    if isinstance(node.type, tuple):
        return tuple(item.shape if isinstance(item, TensorType) else () for item in node.type)
    return ()


def _classes(inputs: list[_States]) -> list[tuple[tuple[tuple[int, Relation], ...], int]]:
    """Splits the sites by their relations to each input: ``((input, relation), ...)`` and the bit set of sites."""
    everyone = 0
    for state in inputs:
        for sites in state.values():
            everyone |= sites
    classes: list[tuple[tuple[tuple[int, Relation], ...], int]] = [((), everyone)] if everyone else []
    for i, state in enumerate(inputs):
        if not state:
            continue
        split = []
        for operands, sites in classes:
            for relation, related in state.items():
                if both := sites & related:
                    split.append(((*operands, (i, relation)), both))
                    sites &= ~related
            if sites:
                split.append((operands, sites))
        classes = split
    return classes


def _union(one: _States, other: _States, join: Callable[[Relation, Relation], Relation]) -> _States:
    result: _States = {}
    for operands, sites in _classes([one, other]):
        relations = [relation for _, relation in operands]
        relation = relations[0] if len(relations) == 1 else join(*relations)
        result[relation] = result.get(relation, 0) | sites
    return result


def _freeze(tree: Any) -> Any:
    if isinstance(tree, list | tuple):
        return (type(tree), *map(_freeze, tree))
    if isinstance(tree, dict):
        return (dict, *((k, _freeze(v)) for k, v in tree.items()))
    if isinstance(tree, slice):
        return (slice, _freeze(tree.start), _freeze(tree.stop), _freeze(tree.step))
    return (type(tree), tree)  # 1, 1.0 and True are equal but not the same argument


def _is_detach(node: Op) -> bool:
    return node.op_name in ("detach", "detach_")


def _refuse_writes(node: Op) -> None:
    schema = getattr(node.target, "_schema", None)
    op = lookup(node.target)
    declared = schema is not None and schema.is_mutable and not (op is not None and op.impure)
    assert not declared, f"%{node.name} ({node.op_name}, {node.loc}) writes in place: functionalize the graph first"


_FOLD_LIMIT = 1 << 20
"""Elements of the largest constant that is computed."""


def _fold(graph: Graph | None, node: Node, constants: Mapping[str, Any]) -> Any:
    """The value of ``node`` if nothing but constants goes into it."""
    if isinstance(node, Param) and graph is not None and node.role == "constant" and node.path in graph.tensors:
        return graph.tensors[node.path].detach().cpu()
    if not isinstance(node, Op) or not isinstance(node.type, TensorType) or node.type.dtype.is_complex:
        return None
    op = lookup(node.target)
    if op is None or is_random(node) or is_impure(node) or node.op_name.startswith(("empty", "new_empty")):
        return None
    if math.prod(node.type.shape) > _FOLD_LIMIT or not (op.kind == "nothing" or node.inputs):
        return None
    shaped = op.kind == "nothing" and graph is not None

    def value(ref: Ref) -> Any:
        if ref in constants:
            return constants[ref]
        type_ = graph.nodes[ref].type if graph is not None else None
        assert isinstance(type_, TensorType)
        return torch.zeros((), dtype=type_.dtype, device="cpu").expand(type_.shape)

    if not shaped and not all(ref in constants for ref in node.inputs):
        return None
    kwargs = {k: v for k, v in node.kwargs.items() if k not in ("device", "pin_memory")}
    try:
        result = node.target(*map_refs(value, node.args), **map_refs(value, kwargs))
    except (RuntimeError, AssertionError, TypeError):
        return None  # not a constant that can be had here: then it counts as unknown
    return result if isinstance(result, Tensor) else None


# -- rules of the stochastic nodes --------------------------------------------------------------------------------
def _dist(node: Dist, depths: Mapping[Ref, Tensor]) -> Depths:
    """What each batch element of a distribution reads: [*B]."""
    parts = []
    for ref, event in zip(node.params, node.template.event_dims, strict=True):
        if ref in depths:
            x = depths[ref]
            kept = max(x.ndim - event, 0)
            parts.append(rules.squash(x, range(kept, x.ndim)).reshape([*rules.tight(x).shape[:kept]]))
    return [rules.join(parts, node.template.batch_shape)]


def _sample(node: Sample, dist: Dist, depths: Mapping[Ref, Tensor]) -> Depths:
    """[*sample_shape, *B, *E] from [*B]; a replayed value brings its own."""
    shape = node.tensor.shape
    total = rules.nothing(shape)
    if node.dist in depths:
        elements = shape[: len(shape) - len(dist.template.event_shape)]
        total = rules.put_left(depths[node.dist].expand(elements), shape)
    if node.value is not None and node.value in depths:
        total = torch.minimum(rules.tight(total), rules.tight(depths[node.value].expand(shape))).expand(shape)
    return [total]


def _log_prob(node: LogProb, dist: Dist, depths: Mapping[Ref, Tensor]) -> Depths:
    """[*B] from the parameters' [*B] and the value's [*B, *E]."""
    parts = [depths[node.dist]] if node.dist in depths else []
    if node.value in depths:
        value, event = depths[node.value], len(dist.template.event_shape)
        kept = max(value.ndim - event, 0)
        parts.append(rules.squash(value, range(kept, value.ndim)).reshape([*rules.tight(value).shape[:kept]]))
    return [rules.join(parts, node.tensor.shape)]


def _expected(node: Expected, depths: Mapping[Ref, Tensor]) -> Depths:
    """[*B] from the distributions' [*B]; a moment has the event dims of its draw behind them."""
    shape = node.tensor.shape
    kept = shape[: len(shape) - node.tensor.event_ndim]
    return [rules.put_left(rules.join(depths.values(), kept), shape)]


def _depends(node: Depends, depths: Mapping[Ref, Tensor]) -> Depths:
    """``value`` as it is, and what ``on`` reads: at the same index, up to it, or anywhere."""
    shape = node.tensor.shape
    parts = [depths[node.value]] if node.value in depths else []
    if node.on in depths:
        x = depths[node.on]
        for dim in range(x.ndim):
            word = node.dims[dim] if dim < len(node.dims) else "mixed"
            if word == "causal" and x.stride(dim) != 0:
                x = x.cummin(dim).values
            elif word == "mixed":
                x = rules.squash(x.expand(x.shape), [dim]).expand([1 if d == dim else n for d, n in enumerate(x.shape)])
        shared = min(x.ndim, len(shape))
        if any(n != 1 for n in x.shape[shared:]):
            raise Unknown("dims named beyond those that value has")
        parts.append(rules.put_left(x.reshape(x.shape[:shared]), shape))
    return [rules.join(parts, shape)]


def _marginal(node: Marginal, depths: Mapping[Ref, Tensor]) -> Depths:
    """What the values and the sites' parameters read, plates joined."""
    shape = node.tensor.shape
    parts = []
    for factor in (*node.factors, *node.sites):
        if factor.node in depths:
            x = depths[factor.node]
            kept = {axis: dim for dim, axis in enumerate(factor.axes) if axis is not None and axis < len(shape)}
            x = rules.squash(x, [dim for dim in range(x.ndim) if dim not in kept.values()])
            x = x.permute([*(kept[axis] for axis in sorted(kept)), *set(range(x.ndim)).difference(kept.values())])
            sizes = iter(x.shape)
            parts.append(x.reshape([next(sizes) if axis in kept else 1 for axis in range(len(shape))]))
    return [rules.join(parts, shape)]


def _opaque(node: Opaque, shapes: tuple[Shape, ...], depths: Mapping[Ref, Tensor]) -> Depths:
    """Leading batch dims are apart, all else reads everything."""
    n = node.batch_dims
    wholes = []
    for x in depths.values():
        fits = all(x.ndim >= n and len(shape) >= n and shape[:n] == x.shape[:n] for shape in shapes)
        wholes.append(
            rules.squash(x, range(n, x.ndim)).reshape(rules.tight(x).shape[:n])
            if fits
            else rules.squash(x, None).reshape(())
        )
    total = wholes[0]
    for whole in wholes[1:]:
        total = torch.minimum(total, whole)
    return [rules.put_left(total, shape) if total.ndim else total.expand(shape) for shape in shapes]

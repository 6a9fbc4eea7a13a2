"""Un-reduction: the scalar objective is split into the cost tensors whose elements different samples influence.

    before   %loss = op   f32[]       mean(%nll)
    after    %c    = cost f32[B]      %nll
             %loss = op   f32[]       mean(%c)        (in the tail, linear in the costs)

Walking back from the objective through operations that are linear in their influenced operands changes no value; the
expectation of a linear map is the map of the expectation: each cost may be credited, averaged or summed out by itself.
Schulman et al. 2015, section 3; without it credit assignment finds one global cost.
"""

from __future__ import annotations

import dataclasses
import operator
from dataclasses import dataclass

import torch
from torch import Tensor

from scg.analysis.influence import Influence, Relation, influence
from scg.ir import Bound, Cost, Expected, Graph, Marginal, Node, Op, Ref, Sample, TensorType, map_refs
from scg.operations import is_linear, lookup, packet_name


def split_costs(graph: Graph, credit: str = "element") -> Graph:
    """Inserts a `Cost` node at every cut of the objective, and names the linear tail above the cuts.

    Args:
        graph: normalized.
        credit: ``"none"`` keeps the scalar objective as the only cost.
    """
    if graph.tail or any(not cost.declared for cost in graph.of(Cost)):
        return graph
    found = influence(graph, [node.name for node in graph.of(Sample)])
    split = _Split(graph, found)
    if credit == "none":
        whole = graph.objective
        while isinstance(node := graph[whole], Cost):
            whole = node.value
        return _insert(graph, {str(whole): Label()} if found.sites(whole) else {}, set())
    return _insert(graph, split.cuts(), split.tail)


@dataclass(frozen=True)
class Label:
    """What a cost is called: as `scg.cost` says, else after the variable nearest to it on the way to the objective."""

    text: str = ""
    declared: bool = False

    def of(self, node: Node) -> Label:
        """The label of what ``node`` is computed from, and of itself."""
        if isinstance(node, Cost):
            return Label(node.label, node.declared)
        return Label(node.variable) if node.variable and not self.declared else self


class _Split:
    """The walk back from the objective."""

    def __init__(self, graph: Graph, found: Influence) -> None:
        self.graph, self.found = graph, found
        self.tail: set[str] = set()
        self._worth: dict[str, bool] = {}
        self._closed = graph.descendants(node.name for node in graph.of(Expected))

    def cuts(self) -> dict[str, Label]:
        """Names of the nodes to cut at, with the user's label for each where there is one."""
        region = self._linear_region()
        for name in self.graph.nodes:  # topological, so operands come first
            if name in region:
                node = self.graph[name]
                operands = self._influenced(node)
                whole = (Bound, Marginal)
                below = any(self._worth.get(ref, False) or isinstance(self.graph[ref], whole) for ref in operands)
                self._worth[name] = below or isinstance(node, Cost) or self._loses(node)
        labels: dict[str, Label] = {}
        seen: set[str] = set()
        stack = [(str(self.graph.objective), Label())]
        while stack:
            name, label = stack.pop()
            if name in seen:
                continue
            seen.add(name)
            node = self.graph[name]
            if not self.found.sites(name):
                continue
            label = label.of(node)
            # a cost the user named is cut where they named it, unless opening it separates something
            passes = isinstance(node.type, tuple) or (not label.declared and self._free(node, region))
            if name in region and (self._worth[name] or passes):
                self.tail.add(name)
                stack.extend((str(ref), label) for ref in reversed(self._influenced(node)))
            else:
                labels[name] = label
        return labels | self._closed_cuts()

    def _closed_cuts(self) -> dict[str, Label]:
        """Addends in closed form that no site influences: costs like others, to be named and seen."""
        if self._is_closed(self.graph.objective):
            return {str(self.graph.objective): Label().of(self.graph[self.graph.objective])}
        addends = (ref for node in self.graph if node.name in self.tail and _adds(node) for ref in node.inputs)
        return {str(ref): Label().of(self.graph[ref]) for ref in addends if self._is_closed(ref) and self._added(ref)}

    def _added(self, ref: Ref) -> bool:
        """Whether the tail does nothing but add it: as a factor it is a coefficient, and no cost."""
        return all(_adds(self.graph[user]) for user in self.graph.users[ref] if user in self.tail)

    def _is_closed(self, ref: Ref) -> bool:
        return ref in self._closed and not self.found.sites(ref) and _is_floating(self.graph[ref])

    def _influenced(self, node: Node) -> list[Ref]:
        return [ref for ref in dict.fromkeys(node.inputs) if self.found.sites(ref)]

    def _linear_region(self) -> set[str]:
        region: set[str] = set()
        stack = [str(self.graph.objective)]
        while stack:
            name = stack.pop()
            node = self.graph[name]
            if name in region or not self.found.sites(name):
                continue
            linear = isinstance(node, Cost) or (isinstance(node, Op) and is_linear(node, self._influenced(node)))
            if isinstance(node, Op) and node.target is operator.getitem:
                source = self.graph[node.inputs[0]]
                linear = isinstance(source, Op) and is_linear(source, self._influenced(source))
            if linear and all(_is_floating(self.graph[ref]) for ref in self._influenced(node)):
                region.add(name)
                stack.extend(self._influenced(node))
        return region

    def _free(self, node: Node, region: set[str]) -> bool:
        """Stepping through costs nothing: so the pieces ``L[i]`` of one tensor meet again in one cut."""
        if not isinstance(node, Op):
            return True
        if isinstance(node.type, tuple) or node.target is operator.getitem:
            return True
        if _adds(node) and any(map(self._is_closed, node.inputs)):
            return True
        entry = lookup(node.target)
        if entry is None or len(self._influenced(node)) != 1:
            return False
        if entry.kind == "movement":
            return True
        scaled = {"neg", "mul", "div", "to", "alias", "clone"}
        return entry.kind == "pointwise" and node.op_name.split(".")[0] in scaled and len(set(node.inputs)) == 1

    def _loses(self, node: Node) -> bool:
        """Does ``node`` join elements that different site elements influence?"""
        if not isinstance(node, Op) or isinstance(node.type, tuple) or node.target is operator.getitem:
            return False
        entry = lookup(node.target)
        if entry is None:
            return True
        operands = self._influenced(node)
        if entry.kind == "movement" and node.op_name.split(".")[0] not in ("slice_scatter", "select_scatter"):
            return False
        shape = node.tensor.shape
        joined = self.found.related(node.name)
        for ref in operands:
            own = self.found.related(ref)
            if entry.kind in ("pointwise", "choice"):
                if own.keys() != joined.keys():
                    return True
                if any(not _equal(own[site], joined[site], shape) for site in own):
                    return True
            elif any(not _uniform(relation, self._joined_dims(node, ref)) for relation in own.values()):
                return True
        return False

    def _joined_dims(self, node: Op, ref: Ref) -> list[int]:
        """The dims of ``ref`` that ``node`` may sum over: all, for other than plain reductions."""
        operand = self.graph[ref].tensor
        everything = list(range(operand.ndim))
        if node.op_name in ("sum.dim_IntList", "mean.dim"):
            dims = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
            return [d % operand.ndim for d in dims] if dims and operand.ndim else everything
        return everything


def _adds(node: Node) -> bool:
    return isinstance(node, Op) and packet_name(node.target) in ("add", "sub")


def _is_floating(node: Node) -> bool:
    return not isinstance(node.type, TensorType) or node.type.dtype.is_floating_point


def _equal(a: Relation, b: Relation, shape: tuple[int, ...]) -> bool:
    if a is b:
        return True
    pairs = zip((*a.lo, *a.hi), (*b.lo, *b.hi), strict=True)
    return all(_same(x, y, shape) for x, y in pairs)


def _same(x: Tensor, y: Tensor, shape: tuple[int, ...]) -> bool:
    return torch.equal(x.expand(shape), y.expand(shape))


def _uniform(relation: Relation, dims: list[int]) -> bool:
    """Is the relation constant along ``dims``?"""
    for bound in (*relation.lo, *relation.hi):
        for dim in dims:
            if bound.stride(dim) != 0 and bound.shape[dim] > 1 and not bool((bound == bound.narrow(dim, 0, 1)).all()):
                return False
    return True


def _insert(graph: Graph, cuts: dict[str, Label], tail: set[str]) -> Graph:
    """The graph with a `Cost` behind every cut, read by the tail alone, and declared costs dissolved into labels."""
    dissolved = {node.name: node.value for node in graph.of(Cost)}

    def real(ref: Ref) -> Ref:
        while ref in dissolved:
            ref = dissolved[ref]
        return ref

    cost_of: dict[str, str] = {}
    taken = set(graph.nodes) - set(dissolved)
    elsewhere = [ref for node in graph if node.name not in tail | set(dissolved) for ref in node.inputs]
    map_refs(lambda ref: elsewhere.append(ref) if ref != graph.objective else None, graph.outputs)
    shared = tail & graph.ancestors(elsewhere)
    copies: dict[str, str] = {}
    """What the rest of the program reads too: the tail gets its own."""
    nodes: list[Node] = []
    for node in graph:
        if node.name in dissolved:
            continue
        plain = node.rewire(real)
        if node.name in tail:
            inside = node.rewire(lambda ref: _tail_ref(real(ref), cost_of | copies))
            if node.name in shared:
                nodes.append(plain)
                copies[node.name] = _fresh(f"{node.name}_tail", taken)
                taken.add(copies[node.name])
                inside = dataclasses.replace(inside, name=copies[node.name])
            plain = inside
        nodes.append(plain)
        label = cuts.get(node.name)
        if label is None:
            continue
        name = _fresh(label.text or f"{node.name}_cost", taken)
        taken.add(name)
        cost_of[node.name] = name
        assert isinstance(node.type, TensorType)
        type_ = TensorType(node.type.dtype, node.type.shape, device=node.type.device)
        shown = label.text if label.declared else name if label.text else node.name
        nodes.append(
            Cost(name=name, type=type_, loc=node.loc, scope=node.scope, value=Ref(node.name), label=shown,
                 declared=label.declared)
        )  # fmt: skip
    objective = _tail_ref(real(graph.objective), cost_of | copies)
    outputs = map_refs(lambda ref: objective if ref == graph.objective else real(ref), graph.outputs)
    kept = frozenset(copies.get(name, name) for name in tail if name not in dissolved)
    return graph.with_nodes(nodes, objective=objective, outputs=outputs, tail=kept)


def _tail_ref(ref: Ref, cost_of: dict[str, str]) -> Ref:
    return Ref(cost_of.get(ref, ref))


def _fresh(base: str, taken: set[str]) -> str:
    name, n = base, 0
    while name in taken:
        n += 1
        name = f"{base}_{n}"
    return name

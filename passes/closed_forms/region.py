"""The part of a program between one site and the objective through which the objective is linear in what is drawn.

    loss = (nll + beta * (q.log_prob(z) - p.log_prob(z)).sum(-1)).mean()      terms of z: nll, log q(z), log p(z)

Coefficients may depend on all that does not follow from the draw: given its parameters, the draw is independent of
it, so that each term may be replaced by its conditional expectation.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Mapping
from typing import Any

import torch

from scg.ir import Cost, Graph, Node, Op, Ref, Sample, TensorType, map_refs
from scg.operations import bind, is_linear, lookup
from scg.passes.clean import has_effect
from scg.passes.closed_forms.draft import Draft
from scg.passes.rewriter import is_op

aten = torch.ops.aten

MOST_PATHS = 64
"""Different coefficients of one term, beyond which it is not compared with others."""

Path = dict[int, float]
"""A linear map from a term to the objective: a sum of chains of operations, each by its number, times factors."""


class Region:
    """The linear region of one site.

    Attributes:
        below: all that follows from the draw.
        inside: nodes that are linear in what they read of ``below``, and whose readers up to the objective are.
        terms: what the region reads of ``below`` besides itself, in program order.
    """

    def __init__(self, graph: Graph, site: str) -> None:
        self.graph = graph
        self.below = graph.descendants([site])
        self.inside: set[str] = set()
        terms: set[str] = set()
        stack = [str(graph.objective)] if graph.objective in self.below else []
        while stack:
            name = stack.pop()
            if name in self.inside or name in terms:
                continue
            if self._linear(graph[name]):
                self.inside.add(name)
                stack.extend(self.moving(graph[name]))
            else:
                terms.add(name)
        self.terms = [node.name for node in graph if node.name in terms] if terms else []
        self.order = [node for node in graph if node.name in self.inside] if terms else []
        self._numbers: dict[Any, int] = {}

    def moving(self, node: Node) -> list[Ref]:
        """What ``node`` reads that follows from the draw."""
        return [ref for ref in dict.fromkeys(node.inputs) if ref in self.below]

    def _linear(self, node: Node) -> bool:
        if isinstance(node, Cost):
            return True
        if not isinstance(node, Op) or not all(_is_floating(self.graph[ref]) for ref in self.moving(node)):
            return False
        if node.target is operator.getitem:
            source = self.graph[node.args[0]]
            return isinstance(source, Op) and is_linear(source, self.moving(source))
        return is_linear(node, self.moving(node))

    # -- coefficients -------------------------------------------------------------------------------------------------
    def paths(self) -> Mapping[str, Path | None]:
        """How the objective depends on each term: equal for terms with equal coefficients, None where not compared."""
        found: dict[str, Path | None] = {str(self.graph.objective): {0: 1.0}}
        for node in reversed(self.order):
            path = found.get(node.name)
            for ref in self.moving(node):
                found[ref] = _sum(found.get(ref, {}), self._step(node, ref, path))
        return {term: found.get(term) for term in self.terms}

    def _step(self, node: Node, ref: Ref, path: Path | None) -> Path | None:
        """The map ``path`` after ``node``, seen from its operand ``ref``."""
        if path is None or isinstance(node, Cost):
            return path
        assert isinstance(node, Op)
        source, factor = self.graph[ref], 1.0
        key: Any = None  # the identity
        if is_op(node, aten.add, aten.sub) and isinstance(bind(node)["alpha"], (int, float)):
            named = bind(node)
            sign = 1.0 if is_op(node, aten.add) else -1.0
            uses = (float(named["self"] == ref), float(named["other"] == ref) * sign * named["alpha"])
            factor = sum(uses)
        elif is_op(node, aten.neg):
            factor = -1.0
        elif is_op(node, aten.mul, aten.div) and isinstance(number := bind(node)["other"], (int, float)):
            factor = float(number) if is_op(node, aten.mul) else 1.0 / number
        else:
            # what else the operation reads tells it apart, and of its operands which one this is
            key = (
                node.target,
                repr(map_refs(lambda other: "·" if other == ref else other, (node.args, dict(node.kwargs)))),
            )
        if key is not None or source.type != node.type:
            shapes = tuple(t.shape if isinstance(t, TensorType) else str(t) for t in (source.type, node.type))
            return {self._number((key, shapes, then)): factor * scale for then, scale in path.items()}
        return {then: factor * scale for then, scale in path.items()}

    def _number(self, chain: Any) -> int:
        return self._numbers.setdefault(chain, len(self._numbers) + 1)

    # -- rewriting ----------------------------------------------------------------------------------------------------
    def rewrite(self, draft: Draft, instead: Mapping[str, Ref | None]) -> Ref:
        """Puts the region into ``draft`` with other terms, None for one that is zero; returns the new objective.

        Nodes that the rest of the program reads too stay as they are, and the region gets its own.
        """
        now: dict[str, Ref | None] = dict(instead)
        shared = self._shared(instead)
        for node in self.order:
            if not any(ref in now for ref in node.inputs):
                continue
            if any(now.get(ref, ref) is None for ref in node.inputs):
                found = self._without(node, now, draft)
                if found is not _KEPT:
                    now[node.name] = found
                    continue
                self._write_zeros(node, now, draft)
            new = node.rewire(lambda ref: now.get(ref) or ref)
            if node.name in shared:
                new = dataclasses.replace(new, name=draft.fresh(f"{node.name}_expected"))
                now[node.name] = Ref(new.name)
            draft.nodes[new.name] = new
        objective = self.graph.objective
        if objective in now and now[objective] is None:
            return draft.tensor(0.0, self.graph[objective].tensor, at=self.graph[objective])
        return now.get(objective) or objective

    def _shared(self, instead: Mapping[str, Ref | None]) -> set[str]:
        """Nodes of the region that something else reads."""
        graph = self.graph
        stack = [node.name for node in graph if isinstance(node, Sample) or has_effect(node)]
        map_refs(lambda ref: stack.append(ref) if ref != graph.objective else None, graph.outputs)
        outside = set(stack)
        # terms that are replaced are needed by none of these, or by the rest of the program
        stack += [name for name in self.terms if name not in instead]
        stack += [ref for node in self.order for ref in node.inputs if ref not in self.below]
        while stack:
            name = stack.pop()
            for ref in graph[name].inputs:
                if ref not in outside:
                    outside.add(ref)
                    stack.append(ref)
        return outside & self.inside

    def _without(self, node: Node, now: Mapping[str, Ref | None], draft: Draft) -> Any:
        """What is left of ``node`` without the operands that are zero; `_KEPT` where they must be written out."""
        left = [ref for ref in self.moving(node) if now.get(ref, ref) is not None]
        if isinstance(node, Cost):
            return None
        assert isinstance(node, Op)
        if is_op(node, aten.add, aten.sub):
            named = bind(node)
            one, other = (now.get(x, x) if isinstance(x, Ref) else x for x in (named["self"], named["other"]))
            sign = named["alpha"] if is_op(node, aten.add) else -named["alpha"]
            if one is not None:
                return draft.tensor(one, node.tensor, at=node)
            return None if other is None else draft.tensor(draft.times(other, sign, node), node.tensor, at=node)
        entry = lookup(node.target)
        moves = entry is not None and entry.kind in ("movement", "reduction") and "pad" not in node.op_name
        homogeneous = moves or is_op(node, *_SCALINGS)
        return None if homogeneous and not left and isinstance(node.type, TensorType) else _KEPT

    def _write_zeros(self, node: Node, now: dict[str, Ref | None], draft: Draft) -> None:
        for ref in node.inputs:
            if ref in now and now[ref] is None:
                now[ref] = draft.tensor(0.0, self.graph[ref].tensor, at=node)


_KEPT = object()
_SCALINGS = (aten.neg, aten.mul, aten.div, aten.to, aten._to_copy, aten.alias, aten.clone)


def _sum(one: Path | None, other: Path | None) -> Path | None:
    if one is None or other is None:
        return None
    total = dict(one)
    for key, factor in other.items():
        total[key] = total.get(key, 0.0) + factor
    return total if len(total) <= MOST_PATHS else None


def opposite(one: Path | None, other: Path | None) -> bool:
    """Whether two terms stand in the objective with coefficients of the same size and opposite signs."""
    if one is None or other is None or one.keys() != other.keys():
        return False
    return all(abs(one[key] + other[key]) <= 1e-12 * abs(one[key]) for key in one)


def _is_floating(node: Node) -> bool:
    return not isinstance(node.type, TensorType) or node.type.dtype.is_floating_point

"""Follows one draw through the operations on its way to a term, as far as its expansion is known."""

from __future__ import annotations

import operator
from typing import Any

import torch

from scg.ir import Graph, LogProb, Node, Op, Ref, Sample, TensorType
from scg.operations import lookup
from scg.passes.closed_forms import affine, densities, polynomials
from scg.passes.closed_forms.draft import Draft
from scg.passes.closed_forms.expansion import Expansion, Moments, Polynomial
from scg.passes.rewriter import is_op

aten = torch.ops.aten


class Expander:
    """Expansions of the values below one site, made in a draft."""

    def __init__(self, draft: Draft, graph: Graph, site: Sample, below: set[str]) -> None:
        self.draft, self.graph, self.site, self.below = draft, graph, site, below
        self.moments = Moments(draft, site)
        self._found: dict[str, Expansion | None] = {}

    def __call__(self, name: str) -> Expansion | None:
        """The expansion of a value that follows from the draw; None where it is not known."""
        stack = [name]
        while stack:
            top = stack[-1]
            node = self.graph[top]
            waits = [] if isinstance(node, Sample) else [ref for ref in self._reads(node) if ref not in self._found]
            if top in self._found or not waits:
                stack.pop()
                if top not in self._found:
                    self._found[top] = self._expand(node)
            else:
                stack.extend(waits)
        return self._found[name]

    def mean(self, name: str) -> Ref | None:
        """The expectation of a value, of its shape."""
        node = self.graph[name]
        return self.moments.mean(self(name), node) if isinstance(node.type, TensorType) else None

    def moving(self, node: Node) -> list[Ref]:
        """What ``node`` reads that follows from the draw."""
        return [ref for ref in dict.fromkeys(node.inputs) if ref in self.below]

    def found(self, ref: Any) -> Expansion | None:
        """The expansion of an operand, if it has been made."""
        return self._found.get(ref) if isinstance(ref, Ref) else None

    def _reads(self, node: Node) -> list[Ref]:
        """What follows from the draw, through distributions."""
        if isinstance(node, LogProb):
            return [*self.moving(self.graph[node.dist]), *([node.value] if node.value in self.below else [])]
        if not isinstance(node, Op):
            return []
        # an output of an operation with several is followed through the operation as a whole
        return self.moving(self.graph[node.args[0]] if node.target is operator.getitem else node)

    def _expand(self, node: Node) -> Expansion | None:
        if node.name == self.site.name:
            return self._draw()
        if isinstance(node, LogProb):
            return densities.expand(self, node)
        if not isinstance(node, Op) or any(self._found[ref] is None for ref in self._reads(node)):
            return None
        if isinstance(node.type, TensorType) and not node.type.dtype.is_floating_point:
            return None
        if is_op(node, aten.detach):
            return self._detached(node)
        if node.target is not operator.getitem and lookup(node.target) is None:
            return None
        return polynomials.expand(self, node) or affine.expand(self, node)

    def _draw(self) -> Expansion | None:
        mean = self.draft.mean(self.site)
        return None if mean is None else Polynomial((mean, 1.0), (), self.site.tensor.shape)

    def _detached(self, node: Op) -> Expansion | None:
        """Of a plain ``sample``, whose derivative is that of the expectation: a stop right behind the draw is none."""
        return self.found(node.args[0]) if self.is_draw(node.args[0]) and self.site.method == "sample" else None

    def is_draw(self, ref: Ref) -> bool:
        """Whether a value is the draw itself, up to stops that do not matter to a ``sample``."""
        node = self.graph[ref]
        while is_op(node, aten.detach) and self.site.method == "sample":
            node = self.graph[node.args[0]]
        return node.name == self.site.name

"""Outputs other than the objective: one joint ancestral draw of the program."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from scg.backends.closed_form import closed_form
from scg.backends.doubly import beside_bound
from scg.backends.opaque_call import OpaqueCall
from scg.backends.recorder import record_call
from scg.backends.sample_dims import Batched
from scg.ir import Bound, Cost, Depends, Dist, Expected, LogProb, Marginal, Node, Op, Opaque, Sample, map_refs

if TYPE_CHECKING:
    from scg.backends.lowering import Interpreter


class SingleDraw:
    """One joint ancestral draw: row 0 of the samples, enumerated sites drawn once more."""

    def __init__(self, interpreter: Interpreter, named: Callable[[str], Any]) -> None:
        self.of, self.named = interpreter, named
        self.env: dict[str, Any] = {}
        self.params: dict[str, list[Batched]] = {}

    def value(self, ref: str) -> Any:
        graph = self.of.graph
        wanted = graph.ancestors([ref])
        for node in graph:
            if node.name in wanted and node.name not in self.env and node.name not in self.params:
                with self.named(node.name):
                    self._evaluate(node)
        found = self.env[ref]
        items = [found] if isinstance(found, Batched) else found
        tensors = tuple(beside_bound(self.of, ref, item.tensor) for item in items)
        return tensors[0] if isinstance(found, Batched) else tensors

    def _evaluate(self, node: Node) -> None:
        of = self.of
        known = of.rows.as_made(node.name)
        if known is not None and not isinstance(node, Cost):
            row = self._row(known)
            if row is not None:
                self.env[node.name] = row
                return
        match node:
            case Op():
                args, kwargs = map_refs(self.env.__getitem__, (tuple(node.args), dict(node.kwargs)))
                self.env[node.name] = of.batcher.run(node, args, kwargs)
            case Dist():
                self.params[node.name] = [self.env[ref] for ref in node.params]
            case Sample():
                dist = of.distribution(node.dist, (), params=self.params[node.dist])
                self.env[node.name] = Batched(dist.sample(torch.Size(node.sample_shape)).detach())
            case LogProb():
                template = of.dist_node(node.dist).template
                value: Batched = self.env[node.value]
                extra = [1] * max(value.ndim - len(template.batch_shape) - len(template.event_shape), 0)
                dist = of.distribution(node.dist, (), extra, self.params[node.dist])
                self.env[node.name] = Batched(dist.log_prob(value.tensor))
            case Expected():
                self.env[node.name] = closed_form(of, node, self.params)
            case Opaque():
                plain = map_refs(lambda ref: self.env[ref].tensor, tuple(node.args))
                out = record_call(OpaqueCall(node, (), tuple(False for _ in plain)), *plain)
                self.env[node.name] = Batched(out) if isinstance(out, Tensor) else tuple(Batched(o) for o in out)
            case Marginal():
                self.env[node.name] = self._marginal(node)
            case Cost() | Depends() | Bound():
                self.env[node.name] = self.env[node.value]

    def _marginal(self, node: Marginal) -> Batched:
        """What it sums over has all its rows still, given the draw of everything else."""
        run = copy.copy(self.of)
        run.env, run.params = dict(self.env), dict(self.params)
        run.expectation = run.expectation.beside(run.dims)
        above = run.graph.ancestors([node.name])
        rows = {str(site.node) for site in node.sites}
        for other in run.graph:
            if other.name in above and (other.name in rows or not rows.isdisjoint(other.inputs)):
                run.evaluate(other)
                rows.add(other.name)
        found: Batched = run.env[node.name]
        return found

    def _row(self, value: Any) -> Any:
        """Row 0 of every i.i.d. dim; None where enumerated rows are among them."""
        if isinstance(value, tuple):
            rows = tuple(self._row(item) for item in value)
            return None if any(row is None for row in rows) else rows
        if not isinstance(value, Batched):
            return value
        if any(self.of.dims[name].kind != "iid" for name in value.dims):
            return None
        tensor = value.tensor
        for _ in value.dims:
            tensor = tensor.select(0, 0)
        return Batched(tensor)

"""The program below a site at all changes of one element each, every value evaluated as rarely as its elements allow.

    z              [B, D]       changed     one tensor, in which every element is changed
    exp(z)         [B, D]       changed     row g differs from the draw in element g, which reads z[:, g] alone
    linear(z)      [D, B, H]    rows        every element reads all of z: the draw's value, and what row g adds to it

Rows are written out where a value joins elements: by a rank-one update where the operation is linear, else by
evaluating it in each. See `change_levels` for which values join elements.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from scg.analysis.influence import Influence, Relation
from scg.backends.batching import Batcher
from scg.backends.change_levels import Level, largest, levels, positions, readers
from scg.backends.linear_rows import Change, class_rows, linear_rows
from scg.backends.recorder import active_recorder, compile_time, record_constant
from scg.backends.reruns import evaluated_again
from scg.backends.sample_dims import Batched, SampleDim, SampleDims, stop_gradient
from scg.ir import CreditEdge, Dist, LogProb, Node, Op, Sample, TensorType

if TYPE_CHECKING:
    from scg.backends.lowering import Interpreter

CHUNK_BYTES = {"cpu": 1 << 23}
"""Most bytes that one value takes in a chunk of rows, by device type: chunks are evaluated one after another."""

CHUNK_BYTES_ELSEWHERE = 1 << 28


def changed_signal(
    run: Interpreter, site: Sample, dims: tuple[str, ...], outcomes: Tensor, rest: Tensor | None
) -> Tensor:
    """The signal of each element in the row in which it alone among joined elements takes an outcome.

    Args:
        run: where everything else is taken from, without gradient.
        site: whose elements change.
        dims: sample dims of the draw.
        outcomes: ``[R, *dims | *elements | *event]``.
        rest: what the other elements are in each row, ``[G, *dims | *elements | *event]``; the draw if not given.

    Returns:
        ``[R, *dims | *elements]``, of full size along joined dims.
    """
    graph, signals = run.graph, run.signals
    edges = [edge for edge in signals.edges(site) if signals.bound_of(edge.cost) is None]
    scale = signals.scale(edges)
    below = (graph.ancestors([edge.cost for edge in edges]) & graph.descendants([site.name])) - {site.name}
    changes = SingleChanges(run, site, dims, outcomes.detach(), below, run.found, rest)
    return changes.total([changes.credit(edge, scale) for edge in edges])


@dataclass(frozen=True)
class Part:
    """Something that a row credits its element with."""

    needs: Collection[str]
    """The nodes it is computed from."""
    level: Level
    """Along which joined dims it needs no rows."""
    share: Callable[[Rows, Level], Tensor]
    """Of each element in its own row: ``[R, *dims | *elements]``."""


class SingleChanges:
    """Which values below a site have rows, and what the rows credit their elements with."""

    def __init__(
        self,
        run: Interpreter,
        site: Sample,
        dims: tuple[str, ...],
        outcomes: Tensor,
        below: set[str],
        found: Influence,
        rest: Tensor | None = None,
    ) -> None:
        self.run, self.site, self.dims, self.outcomes = run, site, dims, outcomes
        self.below, self.found, self.rest = below, found, rest
        self.joined = run.joined[site.name]
        self.sizes = {dim: site.tensor.shape[dim] for dim in self.joined}
        # where rows differ in the rest too, along several dims, no evaluation serves all rows of one of them
        differ = rest is not None and len(self.joined) > 1
        self.levels = levels(run.graph, found, site, below, self.joined, rows=differ)
        self.size = _size(run.supports[site.name])
        """The absolute value of every change, where there is one other outcome."""
        self.split = max(self.joined, key=self.sizes.__getitem__, default=-1)
        """The joined dim whose rows are evaluated in chunks."""

    def credit(self, edge: CreditEdge, scale: float) -> Part:
        """A cost's share of the signal."""
        level = self.crediting_level(edge, self.levels[edge.cost])
        return Part([edge.cost], level, lambda rows, at: rows.share(edge, rows.at(edge.cost, at), at, scale))

    def crediting_level(self, edge: CreditEdge, level: Level) -> Level:
        """Where a value holds all changes at once and credits none of its elements to several of the site's."""
        return frozenset(dim for dim in level if not edge.mixed[dim])

    def total(self, parts: Sequence[Part]) -> Tensor:
        """The sum of all parts.  ``[R, *dims | *elements]``"""
        chunks = self._chunks()
        if len(chunks) <= 1:
            return self._sum(parts, None)
        if (total := self._at_once(parts)) is not None:
            return total
        rows = [part for part in parts if self.split not in part.level]
        total = torch.cat([self._sum(rows, chunk) for chunk in chunks], 1 + len(self.dims) + self.split)
        whole = [part for part in parts if self.split in part.level]
        return total + self._sum(whole, None) if whole else total

    def _sum(self, parts: Sequence[Part], chunk: range | None) -> Tensor:
        graph = self.run.graph
        rows = Rows(self, graph.ancestors([name for part in parts for name in part.needs]) & self.below, chunk)
        shares = [part.share(rows, part.level) for part in parts]
        return functools.reduce(torch.add, shares)

    def _at_once(self, parts: Sequence[Part]) -> Tensor | None:
        """The sum without chunks, where its values are small: of a rank-one update often only a product is wanted."""
        recorder = active_recorder()
        return None if recorder is None else recorder.within(self._budget, lambda: self._sum(parts, None))

    @property
    def _budget(self) -> int:
        return CHUNK_BYTES.get(self.outcomes.device.type, CHUNK_BYTES_ELSEWHERE)

    def _chunks(self) -> list[range]:
        """The rows of the split dim that are evaluated together."""

        def copies(level: Level) -> int:
            rows = math.prod(size for dim, size in self.sizes.items() if dim not in level)
            return rows * len(self.outcomes) * math.prod(self.run.dims.sizes(self.dims))

        rowed = {name: level for name, level in self.levels.items() if self.split in self.sizes.keys() - level}
        if not rowed:
            return []
        rows = self.sizes[self.split]
        size = max(int(rows * self._budget / largest(self.run.graph, rowed, copies)), 1)
        return [range(start, min(start + size, rows)) for start in range(0, rows, size)]


def _size(support: Tensor | None) -> float | None:
    if support is None or support.shape != (2,):
        return None
    with compile_time():
        return abs(float(support[1]) - float(support[0]))


class Rows:
    """One evaluation of the slice below a site, at some of the rows."""

    def __init__(self, changes: SingleChanges, wanted: set[str], chunk: range | None) -> None:
        run, site = changes.run, changes.site
        self.of, self.run, self.site, self.wanted = changes, run, site, wanted
        self.rows = {dim: range(size) for dim, size in changes.sizes.items()}
        if chunk is not None:
            self.rows[changes.split] = chunk
        run.reruns += 1
        prefix, order = f"{site.name}*{run.reruns}", -1 - run.reruns
        self.names = {dim: f"{prefix}.{dim}" for dim in self.rows}
        outcomes = changes.outcomes
        self.lead = (prefix,) if len(outcomes) > 1 else ()
        """The sample dim of the outcomes; none where there is one."""
        made = [SampleDim(prefix, len(outcomes), "counterfactual", site.name, order)]
        made += [
            SampleDim(self.names[dim], len(rows), "counterfactual", site.name, order) for dim, rows in self.rows.items()
        ]
        self.dims = SampleDims([*run.dims.table.values(), *made])
        self.level: Level = frozenset()
        """Of the node that is being evaluated."""
        self.own: dict[str, Any] = {
            site.name: Batched(outcomes if self.lead else outcomes[0], (*self.lead, *changes.dims))
        }
        self._written: dict[tuple[str, Level], Batched] = {}
        self.base_env = run.env if changes.rest is None else self._rest(changes.rest)
        self.child = self._child()
        for node in run.graph:
            if node.name in wanted:
                self._evaluate(node)

    def _child(self) -> Interpreter:
        run = self.run
        child = copy.copy(run)
        child.dims, child.batcher = self.dims, Batcher(self.dims)
        child.env = _Values(self)
        child.params = {name: [child.env[ref] for ref in run.dist_node(name).params] for name in run.params}
        child.before_transform = {name: stop_gradient(value) for name, value in run.before_transform.items()}
        child.extras, child.expectation = dict(run.extras), run.expectation.beside(self.dims)
        child.rerunning, child.training = True, False
        child.signals = child.make_signals()
        return child

    def _rest(self, rest: Tensor) -> Mapping[str, Any]:
        """The values of the slice where nothing but the rest is changed."""
        rest = rest.reshape([*self.of.sizes.values(), *rest.shape[1:]])
        for axis, rows in enumerate(self.rows.values()):
            rest = rest.narrow(axis, rows.start, len(rows))
        value = Batched(rest, (*self.names.values(), *self.of.dims))
        return evaluated_again(self.run, self.site, self.dims, value, self.wanted).env

    # -- values -------------------------------------------------------------------------------------------------------
    def base(self, name: str) -> Any:
        """A value without any change."""
        value = self.base_env[name]
        return stop_gradient(value) if isinstance(value, Batched) else value

    def at(self, name: str, level: Level) -> Any:
        """A value that holds all changes at once along the joined dims ``level``, and has rows along the others."""
        if name not in self.own:
            return self.base(name)
        value, leaving = self.own[name], self.of.levels[name] - level
        relation = self.of.found.relation(name, self.site.name) if leaving else None
        if relation is None or not isinstance(value, Batched):
            return value
        if (name, leaving) not in self._written:
            self._written[name, leaving] = self.written_out(value, self.base(name), relation, leaving)
        return self._written[name, leaving]

    def written_out(self, value: Batched, base: Batched, relation: Relation, leaving: Level) -> Batched:
        """Rows along ``leaving`` of a value that holds all changes at once."""
        dims = self.dims.union(value.dims, base.dims, [self.names[dim] for dim in leaving])
        chosen: Tensor | None = None
        for dim in sorted(leaving):
            with compile_time():
                mask = readers(relation, dim, self.rows[dim])
            mask = record_constant(functools.partial(mask.to, value.tensor.device))
            mask = self.dims.align(Batched(mask, (self.names[dim],)), dims)
            chosen = mask if chosen is None else torch.logical_and(chosen, mask)
        assert chosen is not None
        new, old = (self.dims.align(side, dims, value.ndim) for side in (value, base))
        return Batched(torch.where(chosen, new, old), dims)

    def _evaluate(self, node: Node) -> None:
        if isinstance(node, Dist):
            return  # whoever uses it takes its parameters as it wants them
        rows = (self._linear(node) or class_rows(node, self.own, self.base)) if isinstance(node, Op) else None
        if rows is not None:
            self.own[node.name] = rows
            return
        self.level = self.of.levels[node.name]
        if isinstance(node, (Sample, LogProb)):
            self.take_parameters(node.dist)
        self.child.evaluate(node)

    def take_parameters(self, dist: str) -> None:
        """Gives a distribution the parameters that the node being evaluated wants."""
        if dist in self.wanted:
            self.child.evaluate(self.run.graph[dist])

    def _linear(self, node: Op) -> Batched | None:
        """The rows of an operation that is linear in the one operand that changes."""
        moving = [ref for ref in dict.fromkeys(node.inputs) if ref in self.own]
        if len(moving) != 1 or not isinstance(node.type, TensorType):
            return None
        ref, value = moving[0], self.own[moving[0]]
        leaving = self.of.levels[ref] - self.of.levels[node.name]
        if not leaving or not isinstance(value, Batched) or not value.tensor.dtype.is_floating_point:
            return None
        relation = self.of.found.relation(ref, self.site.name)
        if relation is None:
            return None
        with compile_time():
            found = positions(relation, {dim: rows for dim, rows in self.rows.items() if dim in leaving})
        if found is None:
            return None
        names = tuple(self.names[dim] for dim in self.rows if dim in leaving)
        base = self._own_base(ref, relation, leaving)
        shared = self.dims.union(value.dims, base.dims)
        amount = Batched(self.dims.align(value, shared) - self.dims.align(base, shared), shared)
        change = Change(ref, amount, *found, names, self.of.size if ref == self.site.name else None)
        return linear_rows(self.run.graph, node, change, self.base, self.base(node.name), self.dims)

    def _own_base(self, ref: str, relation: Relation, leaving: Level) -> Batched:
        """What each element is without the change, in the row in which it changes."""
        base: Batched = self.base(ref)
        names = [self.names[dim] for dim in leaving if self.names[dim] in base.dims]
        if not names:
            return base
        nothing = Batched(torch.zeros_like(base.tensor), base.dims)
        chosen = self.written_out(base, nothing, relation, leaving)
        kept = tuple(name for name in chosen.dims if name not in names)
        return Batched(chosen.tensor.sum([chosen.dims.index(name) for name in names]), kept)

    # -- credit -------------------------------------------------------------------------------------------------------
    def lead_of(self, level: Level) -> tuple[str, ...]:
        """The sample dims of a value with rows along all joined dims but ``level``."""
        return (*self.lead, *(self.names[dim] for dim in self.rows if dim not in level), *self.of.dims)

    def share(self, edge: CreditEdge, value: Batched, level: Level, scale: float) -> Tensor:
        """What a cost credits each element with in its own row: `own_of` its credits."""
        return self.own_of(self.child.signals.share(edge, self.lead_of(level), scale, value), level)

    def own_of(self, credited: Tensor, level: Level) -> Tensor:
        """Of credits in all rows, those of each element in its own.

        Args:
            credited: ``[*lead_of(level) | *elements]``, of size 1 along elements where it does not vary.
            level: along which joined dims there are no rows.

        Returns:
            ``[R, *dims | *elements]``; along a joined dim with rows, of those.
        """
        lead, first = len(self.lead_of(level)), len(self.lead)
        only = lead + next(iter(self.rows), 0)
        if not self.lead and len(self.rows) == 1 and not level and credited.shape[only] == 1:
            return credited.transpose(0, only)
        for done, dim in enumerate(dim for dim in self.rows if dim not in level):
            axis = lead - done + dim  # of the element dim; that of its rows is the first behind the outcomes
            if credited.shape[axis] == 1:
                credited = credited.squeeze(axis).movedim(first, axis - 1)
            else:
                rows = self.rows[dim]
                credited = credited.narrow(axis, rows.start, len(rows)).diagonal(0, first, axis).movedim(-1, axis - 1)
        return credited if self.lead else credited.unsqueeze(0)

    def unchanged(self, credited: Tensor, level: Level) -> Tensor:
        """Credits without any change ``[*dims | *elements]`` as `own_of` lays them out."""
        for dim, rows in self.rows.items():
            axis = len(self.of.dims) + dim
            if dim not in level and credited.shape[axis] > 1:
                credited = credited.narrow(axis, rows.start, len(rows))
        return credited.unsqueeze(0)


class _Values(dict[str, Any]):
    """The values of a slice, each as the node that is being evaluated wants it."""

    def __init__(self, rows: Rows) -> None:
        super().__init__()
        self._of = rows

    def __getitem__(self, name: str) -> Any:
        return self._of.at(name, self._of.level)

    def __setitem__(self, name: str, value: Any) -> None:
        self._of.own[name] = value

"""In which order variables leave a sum of products, and what that costs.

    sum_a sum_b sum_c  f(a, b) g(b, c)      a first: a table over (a, b) leaves a message to b, then c, then b

A *factor* knows which variables (sites, each with its rows) it sees and along which axes it has a value each. Some axes
are *plates*: a variable inside of a plate has its rows once an index of it, and what the plate's variables leave behind
is multiplied up over the plate (Obermeyer et al. 2019). The order is greedy: least fill-in first (Kjaerulff 1990).
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from scg.analysis.flops import bytes_text


@dataclass(frozen=True)
class Scope:
    """What a factor varies with."""

    rows: frozenset[str]
    """The variables it sees."""
    axes: frozenset[int]
    """The axes along which it has a value each."""


@dataclass(frozen=True)
class Plan:
    """An elimination order and its cost."""

    order: tuple[str, ...]
    width: int
    """Variables in the largest table, less one: the tree-width that the order attains."""
    table: int
    """Entries of the largest table, for one index of its axes."""
    entries: int
    """Entries of all tables along all axes: multiplications and additions, each."""
    itemsize: int = 4
    """Bytes of an entry."""

    def __str__(self) -> str:
        return (
            f"{len(self.order)} sites, tree-width {self.width}, tables of up to {self.table:,} rows, "
            f"{2 * self.entries:,} FLOPs, {bytes_text(self.entries * self.itemsize)} of tables"
        )


class Intractable(Exception):
    """Two variables in plates that cross each other meet at every pair of indices."""

    def __init__(self, site: str) -> None:
        super().__init__(site)
        self.site = site


def plan_elimination(
    scopes: Iterable[Scope],
    inside: Mapping[str, frozenset[int]],
    rows: Mapping[str, int],
    sizes: Mapping[int, int],
    itemsize: int = 4,
) -> Plan:
    """A good order to sum all variables out in.

    Args:
        scopes: of all factors.
        inside: the plates that each variable stands in, variables in program order.
        rows: how many rows each variable has.
        sizes: of the axes.
        itemsize: bytes of an entry of a table.

    Raises:
        Intractable: no variable is left that can be summed out on its own.
    """
    run = _Run(inside)
    for scope in scopes:
        run.add(scope)
    order: list[str] = []
    width, table, entries = 0, 1, 0
    while run.met.nodes:
        name = run.next()
        scope = run.sum_out(name)
        count = math.prod(rows[row] for row in scope.rows)
        order.append(name)
        width, table = max(width, len(scope.rows) - 1), max(table, count)
        entries += count * math.prod(sizes[axis] for axis in scope.axes)
    return Plan(tuple(order), width, table, entries, itemsize)


class _Run:
    """The factors that are left, and which variables meet in them."""

    def __init__(self, inside: Mapping[str, frozenset[int]]) -> None:
        import networkx  # it takes its time

        self.inside = inside
        self.place = {name: i for i, name in enumerate(inside)}
        self.plates = frozenset().union(*inside.values())
        self.met = networkx.Graph()
        self.met.add_nodes_from(inside)
        self.factors: dict[str, list[Scope]] = {name: [] for name in inside}
        self._queue: list[tuple[int, int, str]] = []
        """By fill-in, then in program order; outdated entries are passed over."""
        self._fill: dict[str, int] = {}
        self._stale: set[str] = set(inside)
        """Variables whose fill-in is to be counted anew."""

    def add(self, scope: Scope) -> None:
        scope = reduced(scope, self.inside)
        for name in scope.rows:
            self.factors[name].append(scope)
        self.met.add_edges_from(itertools.combinations(scope.rows, 2))
        self._stale.update(scope.rows, *(self.met.neighbors(name) for name in scope.rows))

    def next(self) -> str:
        for name in self._stale & self.met.nodes:
            self._fill[name] = self._fill_in(name)
            heapq.heappush(self._queue, (self._fill[name], self.place[name], name))
        self._stale = set()
        waiting = []
        while self._queue:
            fill, _, name = entry = heapq.heappop(self._queue)
            if name in self.met and fill == self._fill[name]:
                if self._is_ready(name):
                    break
                waiting.append(entry)
        else:
            raise Intractable(max(self.met.nodes, key=lambda name: len(self.inside[name])))
        for entry in waiting:
            heapq.heappush(self._queue, entry)
        return name

    def _is_ready(self, name: str) -> bool:
        return all(scope.axes & self.plates <= self.inside[name] for scope in self.factors[name])

    def _fill_in(self, name: str) -> int:
        pairs = itertools.combinations(self.met.neighbors(name), 2)
        return sum(not self.met.has_edge(a, b) for a, b in pairs)

    def sum_out(self, name: str) -> Scope:
        """Takes ``name`` out; the scope of the table that it was summed in."""
        group = self.factors.pop(name)
        table = Scope(
            frozenset([name]).union(*(scope.rows for scope in group)),
            frozenset().union(*(scope.axes for scope in group)),
        )
        for other in self.met.neighbors(name):
            self._stale.add(other)
            self.factors[other] = [scope for scope in self.factors[other] if name not in scope.rows]
        self.met.remove_node(name)
        self.add(Scope(table.rows - {name}, table.axes))
        return table


def reduced(scope: Scope, inside: Mapping[str, frozenset[int]]) -> Scope:
    """``scope`` multiplied up over the plates that none of its variables stands in."""
    plates = frozenset().union(*inside.values())
    held = frozenset().union(*(inside[name] for name in scope.rows))
    return Scope(scope.rows, scope.axes - (plates - held))

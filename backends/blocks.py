"""Deterministic blocks: the connected operations of one user module that the same sites influence, drawn as one box."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, field

from scg.ir import Bound, Cost, Depends, Dist, Expected, Graph, LogProb, Marginal, Node, Op, Param, Sample

BLOCK = (Op, LogProb, Expected, Depends, Bound, Marginal)
"""The kinds of nodes that deterministic blocks are made of."""


@dataclass
class Group:
    """Nodes drawn as one box."""

    label: str
    """The user's module, "" where there is none."""
    members: list[Node]
    sites: int
    """The sites that influence its members, as a bit set."""
    sources: set[int] = field(default_factory=set)
    """Keys of the groups it reads."""

    @property
    def anonymous(self) -> bool:
        return not self.label and isinstance(self.members[-1], BLOCK) and not self.closed_form

    @property
    def closed_form(self) -> bool:
        """Whether it holds an expectation in closed form: a box of its own says so."""
        return any(isinstance(node, Expected) for node in self.members)

    @property
    def title(self) -> str:
        """The innermost module around all members: a list of modules says which one."""
        scopes = [prefixes(node.scope) for node in self.members if isinstance(node, BLOCK)]
        return max(set(scopes[0]).intersection(*scopes[1:]), key=len)


class Blocks:
    """The partition of the shown nodes into boxes.

    Operations join the box of an operand of the same module that the same sites influence, unless that closes a cycle
    of boxes; then anonymous boxes with a single reader of their kind, or a cost, dissolve into it, and so do those that
    prepare the parameters of a site in the line of its distribution. Distributions are never drawn: a reader of one
    reads its parameters.
    """

    def __init__(self, graph: Graph, shown: set[str]) -> None:
        self.graph = graph
        self.home: dict[str, int] = {}
        """Key of the group of each shown node."""
        self.table: dict[int, Group] = {}
        self._bits = {site.name: 1 << i for i, site in enumerate(graph.of(Sample))}
        self._influence: dict[str, int] = {}
        self._drawing = {prefix for site in graph.of(Sample) for prefix in prefixes(site.scope)}
        for key, node in enumerate(graph):
            if node.name not in shown:
                continue
            influence = 0
            for ref in node.inputs:
                influence |= self._influence[ref]
            self._influence[node.name] = influence | self._bits.get(node.name, 0)
            if not isinstance(node, Dist) and not hidden(node):
                self._place(key, node, influence)
        self._dissolve()
        self._drop_owned_params()
        self._merge_params()
        self.carried = self._carried()
        self.leaving = {name for names in self.carried.values() for name in names}
        """Names of the nodes whose values leave their boxes."""

    def _label(self, node: Node) -> str:
        """The outermost module around ``node`` that draws nothing itself."""
        return next((prefix for prefix in prefixes(node.scope) if prefix not in self._drawing), "")

    def sources(self, node: Node) -> list[str]:
        """Names of the drawn nodes that ``node`` reads, through distributions; repeats dropped."""
        found: dict[str, None] = {}
        for ref in node.inputs:
            source = self.graph[ref]
            for name in self.sources(source) if isinstance(source, Dist) else [source.name]:
                if not hidden(self.graph[name]):
                    found[name] = None
        return list(found)

    def _place(self, key: int, node: Node, influence: int) -> None:
        reads = {self.home[name] for name in self.sources(node)}
        group = self.table[key] = Group("", [node], influence, reads)
        if isinstance(node, BLOCK):
            group.label = self._label(node)
            for other in sorted(reads):
                if self._joinable(self.table[other], group) and not self._cyclic({*group.sources, other}, other):
                    self._absorb(other, group)
                    for reader in self.table.values():  # others may read what was absorbed
                        if other in reader.sources:
                            reader.sources = reader.sources - {other} | {key}
        for member in group.members:
            self.home[member.name] = key

    def _joinable(self, other: Group, group: Group) -> bool:
        if isinstance(group.members[0], Expected):
            return False
        return isinstance(other.members[-1], BLOCK) and (other.label, other.sites) == (group.label, group.sites)

    def _cyclic(self, keys: set[int], target: int) -> bool:
        """Whether a path leads from ``target`` through another group into ``keys``."""
        stack = [key for key in keys if key != target]
        seen = set(stack)
        while stack:
            for source in self.table[stack.pop()].sources:
                if source == target:
                    return True
                if source not in seen:
                    seen.add(source)
                    stack.append(source)
        return False

    def _absorb(self, other: int, group: Group) -> None:
        """Puts the members of the group ``other`` in front of those of ``group``."""
        merged = self.table.pop(other)
        group.members[:0] = merged.members
        group.sources = (group.sources | merged.sources) - {other}

    def _readers(self) -> dict[int, set[int]]:
        """Keys of the groups that read each group."""
        found: dict[int, set[int]] = {key: set() for key in self.table}
        for key, group in self.table.items():
            for source in group.sources:
                found[source].add(key)
        return found

    def _dissolve(self) -> None:
        """Anonymous blocks that a single anonymous block, cost or distribution reads become part of it."""
        readers = self._readers()
        for key in sorted(self.table, reverse=True):
            group = self.table[key]
            if len(readers[key]) != 1 or not group.anonymous:
                continue
            (into,) = readers[key]
            reader = self.table[into]
            if reader.anonymous or isinstance(reader.members[-1], Cost) or self._prepares(group, reader.members[-1]):
                self._absorb(key, reader)
                self.home |= {node.name: into for node in group.members}
                for source in group.sources:
                    readers[source] = readers[source] - {key} | {into}

    def _prepares(self, group: Group, site: Node) -> bool:
        """Whether all of ``group`` stands in the line of the site's distribution: it only prepares parameters."""
        if not isinstance(site, Sample):
            return False
        line = self.graph[site.dist].loc
        return bool(line) and all(node.loc == line for node in group.members)

    def _drop_owned_params(self) -> None:
        """Parameters that a named block owns are counted there, not drawn."""
        readers = self._readers()
        for key, group in list(self.table.items()):
            node = group.members[-1]  # a box begins with the parameters that it has taken over
            blocks = [self.table[reader] for reader in readers[key]]
            if isinstance(node, Param) and all(b.label and node.path.startswith(f"{b.label}.") for b in blocks):
                del self.table[key], self.home[node.name]
                for block in blocks:
                    block.members.insert(0, node)
                    block.sources.discard(key)

    def _merge_params(self) -> None:
        """Parameters with the same readers share one label."""
        readers = self._readers()
        first: dict[frozenset[int], int] = {}
        for key, group in list(self.table.items()):
            if isinstance(group.members[-1], Param):
                into = first.setdefault(frozenset(readers[key]), key)
                if into != key:
                    self.table[into].members.extend(self.table.pop(key).members)
                    self.home[group.members[0].name] = into
                    for reader in readers[key]:
                        self.table[reader].sources.discard(key)

    def groups(self) -> Iterable[Group]:
        """The boxes, in the order of their last nodes."""
        return (self.table[key] for key in sorted(self.table))

    def _carried(self) -> dict[tuple[int, int], dict[str, None]]:
        """Names of the values that each arrow between boxes carries."""
        found: dict[tuple[int, int], dict[str, None]] = {}
        for head, group in self.table.items():
            for node in group.members:
                for name in self.sources(node):
                    tail = self.home.get(name, head)
                    if tail != head:
                        found.setdefault((tail, head), {})[name] = None
        return found

    def edges(self) -> Iterable[tuple[str, str, list[str]]]:
        """Tail and head (a member's name each) of every arrow between boxes, and the values that it carries."""
        for (tail, head), names in self.carried.items():
            yield self.table[tail].members[-1].name, self.table[head].members[-1].name, list(names)


def hidden(node: Node) -> bool:
    """Constants and buffers: nothing that a person would look for."""
    return isinstance(node, Param) and node.role != "parameter"


def prefixes(scope: str) -> list[str]:
    """``a``, ``a.b``, ``a.b.c`` of ``a.b.c``."""
    return list(itertools.accumulate(scope.split("."), lambda a, b: f"{a}.{b}")) if scope else []

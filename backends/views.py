"""What a picture shows: a graph reduced to boxes and arrows, before anything is drawn.

Three views, in the conventions of Schulman et al. (2015), figure 1:

* ``stochastic``: sites, costs and deterministic blocks, a block being the connected operations of one user module (or
  of none) that are influenced by the same sites, so that the picture never shows an influence that is not there;
* ``dataflow``: every operation, in nested clusters of the user's modules;
* ``credit``: which cost teaches which site.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from scg.ir import (
    Bound,
    Cost,
    Depends,
    Dist,
    Expected,
    Graph,
    Input,
    LogProb,
    Marginal,
    Node,
    Op,
    Opaque,
    Param,
    Sample,
    TensorType,
)
from scg.report import estimator_texts, objective_text

Kind = Literal["site", "cost", "block", "opaque", "value"]
Style = Literal["title", "plain", "small", "accent", "credit", "warn"]
Line = tuple[tuple[str, Style], ...]
"""One line of a label: pieces of text, each with its style."""

_MOVES = frozenset(
    "view reshape _unsafe_view expand expand_as unsqueeze squeeze t transpose permute detach alias clone contiguous "
    "getitem select slice to _to_copy lift_fresh_copy lift_fresh".split()
)
"""Operations that only move data: left out of a block's summary where others are there to name."""

_BLOCK = (Op, LogProb, Expected, Depends, Bound, Marginal)
"""The kinds of nodes that deterministic blocks are made of."""

_MOST = 20
"""Credit arrows that a picture with data edges can hold."""


@dataclass(frozen=True)
class Box:
    """One shape of the picture; ``id`` is ours, so that no name of the user's can break a format."""

    id: str
    kind: Kind
    lines: tuple[Line, ...]
    tooltip: str
    members: tuple[str, ...]
    """The IR nodes it stands for."""
    cluster: tuple[str, ...] = ()
    """Path of nested modules it is drawn in."""


@dataclass(frozen=True)
class Arrow:
    """An edge; a credit arrow points from a cost to the site it teaches."""

    tail: str
    head: str
    kind: Literal["data", "credit"]
    tooltip: str
    label: str = ""


@dataclass(frozen=True)
class Picture:
    """All that is drawn."""

    title: str
    caption: str
    boxes: tuple[Box, ...]
    arrows: tuple[Arrow, ...]
    sideways: bool = False
    """Drawn from left to right."""


def picture(graph: Graph, view: str = "stochastic") -> Picture:
    """The boxes and arrows of ``graph`` in one of the `VIEWS`."""
    if view not in VIEWS:
        raise ValueError(f"unknown view {view!r}; known: {', '.join(VIEWS)}")
    return VIEWS[view](graph)


# -- views ------------------------------------------------------------------------------------------------------------
def stochastic(graph: Graph) -> Picture:
    """Sites, costs and deterministic blocks named after the user's modules."""
    shown = _relevant(graph)
    blocks = _Blocks(graph, shown)
    builder = _Builder(graph)
    for group in blocks.groups():
        builder.block(group, blocks)
    for arrow in blocks.edges():
        builder.data(*arrow)
    builder.credit(_MOST)
    return builder.picture("stochastic view")


def dataflow(graph: Graph) -> Picture:
    """Every node, clustered by module."""
    builder = _Builder(graph)
    scopes = {node.scope for node in graph if node.scope}
    for node in graph:
        owner = node.path.rpartition(".")[0] if isinstance(node, Param) else node.scope
        known = owner if owner in scopes or not isinstance(node, Param) else ""
        builder.single(node, tuple(known.split(".")) if known else ())
    for node in graph:
        for ref in dict.fromkeys(node.inputs):
            builder.data(str(ref), node.name, [str(ref)])
    builder.credit(_MOST)
    return builder.picture("dataflow view")


def credit(graph: Graph) -> Picture:
    """Sites on the left, costs on the right, an arrow from each cost to every site it teaches."""
    builder = _Builder(graph)
    for node in graph.of(Sample, Cost):
        builder.single(node)
    builder.credit()
    return builder.picture("credit view", sideways=True)


VIEWS: Mapping[str, Callable[[Graph], Picture]] = {"stochastic": stochastic, "dataflow": dataflow, "credit": credit}


def _relevant(graph: Graph) -> set[str]:
    """Names of the nodes that a site or a cost depends on; the objective stands for costs that were not split yet."""
    ends = [node.name for node in graph.of(Sample, Cost)]
    if not graph.tail:
        ends.append(str(graph.objective))
    return graph.ancestors(ends)


# -- deterministic blocks ---------------------------------------------------------------------------------------------
@dataclass
class _Group:
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
        return not self.label and isinstance(self.members[-1], _BLOCK) and not self.closed_form

    @property
    def closed_form(self) -> bool:
        """Whether it holds an expectation in closed form: a box of its own says so."""
        return any(isinstance(node, Expected) for node in self.members)

    @property
    def title(self) -> str:
        """The innermost module around all members: a list of modules says which one."""
        scopes = [_prefixes(node.scope) for node in self.members if isinstance(node, _BLOCK)]
        return max(set(scopes[0]).intersection(*scopes[1:]), key=len)


class _Blocks:
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
        self.table: dict[int, _Group] = {}
        self._bits = {site.name: 1 << i for i, site in enumerate(graph.of(Sample))}
        self._influence: dict[str, int] = {}
        self._drawing = {prefix for site in graph.of(Sample) for prefix in _prefixes(site.scope)}
        for key, node in enumerate(graph):
            if node.name not in shown:
                continue
            influence = 0
            for ref in node.inputs:
                influence |= self._influence[ref]
            self._influence[node.name] = influence | self._bits.get(node.name, 0)
            if not isinstance(node, Dist) and not _hidden(node):
                self._place(key, node, influence)
        self._dissolve()
        self._drop_owned_params()
        self._merge_params()
        self.carried = self._carried()
        self.leaving = {name for names in self.carried.values() for name in names}
        """Names of the nodes whose values leave their boxes."""

    def _label(self, node: Node) -> str:
        """The outermost module around ``node`` that draws nothing itself."""
        return next((prefix for prefix in _prefixes(node.scope) if prefix not in self._drawing), "")

    def sources(self, node: Node) -> list[str]:
        """Names of the drawn nodes that ``node`` reads, through distributions; repeats dropped."""
        found: dict[str, None] = {}
        for ref in node.inputs:
            source = self.graph[ref]
            for name in self.sources(source) if isinstance(source, Dist) else [source.name]:
                if not _hidden(self.graph[name]):
                    found[name] = None
        return list(found)

    def _place(self, key: int, node: Node, influence: int) -> None:
        reads = {self.home[name] for name in self.sources(node)}
        group = self.table[key] = _Group("", [node], influence, reads)
        if isinstance(node, _BLOCK):
            group.label = self._label(node)
            for other in sorted(reads):
                if self._joinable(self.table[other], group) and not self._cyclic({*group.sources, other}, other):
                    self._absorb(other, group)
                    for reader in self.table.values():  # others may read what was absorbed
                        if other in reader.sources:
                            reader.sources = reader.sources - {other} | {key}
        for member in group.members:
            self.home[member.name] = key

    def _joinable(self, other: _Group, group: _Group) -> bool:
        if isinstance(group.members[0], Expected):
            return False
        return isinstance(other.members[-1], _BLOCK) and (other.label, other.sites) == (group.label, group.sites)

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

    def _absorb(self, other: int, group: _Group) -> None:
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

    def _prepares(self, group: _Group, site: Node) -> bool:
        """Whether all of ``group`` stands in the line of the site's distribution: it only prepares parameters."""
        if not isinstance(site, Sample):
            return False
        line = self.graph[site.dist].loc
        return bool(line) and all(node.loc == line for node in group.members)

    def _drop_owned_params(self) -> None:
        """Parameters that a named block owns are counted there, not drawn."""
        readers = self._readers()
        for key, group in list(self.table.items()):
            node = group.members[0]
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

    def groups(self) -> Iterable[_Group]:
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


def _hidden(node: Node) -> bool:
    """Constants and buffers: nothing that a person would look for."""
    return isinstance(node, Param) and node.role != "parameter"


def _prefixes(scope: str) -> list[str]:
    """``a``, ``a.b``, ``a.b.c`` of ``a.b.c``."""
    return list(itertools.accumulate(scope.split("."), lambda a, b: f"{a}.{b}")) if scope else []


# -- boxes and arrows -------------------------------------------------------------------------------------------------
class _Builder:
    """Collects boxes and arrows, and gives them ids."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.ids: dict[str, str] = {}
        """Box of each drawn IR node."""
        self.boxes: list[Box] = []
        self.arrows: list[Arrow] = []

    def single(self, node: Node, cluster: tuple[str, ...] = ()) -> None:
        """A box for one node."""
        self._add(_kind(self.graph, node), _lines(self.graph, node), [node], cluster)

    def block(self, group: _Group, blocks: _Blocks) -> None:
        """A box for a group of nodes."""
        last = group.members[-1]
        if isinstance(last, Param):
            return self._add("value", _params_lines(group.members), group.members)
        if not isinstance(last, _BLOCK) or last.name == self.graph.objective:
            return self._add(_kind(self.graph, last), _lines(self.graph, last), group.members)
        summary = _summary(self.graph, group.members)
        lines = [_line(group.title, "title"), _line(summary, "small")] if group.label else [_line(summary, "plain")]
        if group.closed_form:
            lines.append(_line("closed form", "accent"))
        leaving = [node for node in group.members if node.name in blocks.leaving and isinstance(node.type, TensorType)]
        if len(leaving) == 1:
            lines.append(_line(str(leaving[0].type), "small"))
        params = [node for node in group.members if isinstance(node, Param)]
        if params:
            lines.append(_line(f"θ {_count(params)}", "small"))
        self._add("block", tuple(lines), group.members)

    def _add(self, kind: Kind, lines: tuple[Line, ...], nodes: list[Node], cluster: tuple[str, ...] = ()) -> None:
        box = Box(
            f"n{len(self.boxes)}", kind, lines, _tooltip(self.graph, nodes), tuple(n.name for n in nodes), cluster
        )
        self.boxes.append(box)
        self.ids |= dict.fromkeys(box.members, box.id)

    def data(self, tail: str, head: str, carried: list[str]) -> None:
        """An arrow for the values ``carried`` between the boxes of two nodes."""
        texts = [_value_text(self.graph[name]) for name in carried]
        self.arrows.append(Arrow(self.ids[tail], self.ids[head], "data", "\n".join(_at_most(texts, 12))))

    def credit(self, most: int | None = None) -> None:
        """Dashed arrows from costs to the sites that they teach; if more than ``most``, a line in each site instead."""
        if most is not None and len(self.graph.credit) > most:
            return self._credit_lines()
        for (site, cost), edge in self.graph.credit.items():
            ends = (self.graph.costs[cost], self.graph[site])
            text = f"{ends[0].label} teaches {site}: {edge.label}"
            tooltip = _printable("\n".join([text, *dict.fromkeys(node.loc for node in ends if node.loc)]))
            self.arrows.append(Arrow(self.ids[cost], self.ids[site], "credit", tooltip, edge.label))

    def _credit_lines(self) -> None:
        """Names the costs that teach a site below its estimator: a curtain of arrows would hide the picture."""
        teachers: dict[str, list[str]] = {}
        for site, cost in self.graph.credit:
            teachers.setdefault(self.ids[site], []).append(self.graph.costs[cost].label)
        for at, box in enumerate(self.boxes):
            if labels := teachers.get(box.id):
                text = ", ".join(labels) if len(labels) < 3 else f"{labels[0]} … {labels[-1]} ({len(labels)})"
                self.boxes[at] = replace(box, lines=(*box.lines, _line(f"⇠ {text}", "credit")))

    def picture(self, view: str, sideways: bool = False) -> Picture:
        caption = f"minimises {objective_text(self.graph)}"
        return Picture(
            _short(f"{self.graph.name} · {view}", 60),
            _short(caption, 90),
            tuple(self.boxes),
            tuple(self.arrows),
            sideways,
        )


def _kind(graph: Graph, node: Node) -> Kind:
    if isinstance(node, Sample):
        return "site"
    if isinstance(node, Cost) or node.name == graph.objective:
        return "cost"
    if isinstance(node, Opaque):
        return "opaque"
    return "value" if isinstance(node, (Input, Param)) else "block"


def _lines(graph: Graph, node: Node) -> tuple[Line, ...]:
    """The label of one node."""
    shape = [_line(str(node.type), "small")] if isinstance(node.type, TensorType) else []
    if isinstance(node, Sample):
        verb = " = " if node.value is not None else " ~ "
        title: Line = ((_short(node.name), "title"), (verb + graph.sites[node.name].distribution, "plain"))
        styles: tuple[Style, Style] = ("accent", "small")
        badge = [_line(text, style) for text, style in zip(estimator_texts(graph, node), styles, strict=False)]
        biased = node.estimator is not None and not node.estimator.unbiased
        return (title, *shape, *badge, *([_line("biased", "warn")] if biased else []))
    if isinstance(node, Cost):
        return (_line(node.label, "title"), *shape)
    if node.name == graph.objective:
        return (_line("objective", "title"), *shape)
    if isinstance(node, (Input, Param)):
        return (_line(node.path, "plain"), *shape)
    if isinstance(node, Opaque):
        return (_line(node.fn.__qualname__.rpartition(".")[2], "title"), _line("opaque", "small"), *shape)
    return (_line(_verb(graph, node), "plain"), *shape)


def _params_lines(nodes: list[Node]) -> tuple[Line, ...]:
    names = [node.path for node in nodes if isinstance(node, Param)]
    if len(names) == 1:
        return (_line(names[0], "plain"), _line(str(nodes[0].type), "small"))
    return (_line(", ".join(_at_most(names, 3)), "plain"), _line(f"θ {_count(nodes)}", "small"))


def _count(params: Sequence[Node]) -> str:
    """How many numbers: ``7,850``, ``51k``, ``124M``."""
    total = sum(math.prod(node.tensor.shape) for node in params)
    for unit, scale in (("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if total >= 10 * scale:
            return f"{total / scale:,.0f}{unit}"
    return f"{total:,}"


def _verb(graph: Graph, node: Node) -> str:
    """What a deterministic node does, without overload names."""
    if isinstance(node, LogProb):
        dist = graph[node.dist]
        return f"{dist.template.family}.log_prob" if isinstance(dist, Dist) else "log_prob"
    if isinstance(node, Expected):
        families = (str(dist.template.family) for dist in map(graph.__getitem__, node.dists) if isinstance(dist, Dist))
        return f"{node.form_name}({', '.join(families)})"
    if isinstance(node, Dist):
        return node.template.family
    if isinstance(node, Op):
        return node.op_name.partition(".")[0] if "<" not in node.op_name else node.op_name
    return node.kind


def _summary(graph: Graph, nodes: list[Node]) -> str:
    """``linear · relu · linear`` of a block; data movement only where there is nothing else."""
    verbs = [_verb(graph, node) for node in nodes if not isinstance(node, Param)]
    named = [verb for verb in verbs if verb not in _MOVES] or verbs
    runs = [verb for verb, _ in itertools.groupby(named)]
    if len(runs) > 4:
        return f"{' · '.join([runs[0], '…', runs[-1]])} ({len(verbs)} ops)"
    return " · ".join(runs)


def _tooltip(graph: Graph, nodes: list[Node]) -> str:
    """The nodes' text form with source lines; of a site, why its estimator was chosen."""
    last = nodes[-1]
    if isinstance(last, Sample):
        dist = graph[last.dist]
        texts = [f"{last.name} ~ {dist.describe()}", f"shape {last.type}"]
        chosen = ", ".join(estimator_texts(graph, last)) or "no estimator"
        texts.append(f"{chosen}: {last.reason}" if last.reason else chosen)
        texts += [f"credited costs: {', '.join(last.credits)}"] if last.credits else []
        return _printable("\n".join([*texts, last.loc])).strip()
    return "\n".join(_at_most([_value_text(node) for node in nodes], 14))


def _value_text(node: Node) -> str:
    return " ".join(
        _short(part, 90) for part in (str(node).partition("  # ")[0], f"({node.loc})" if node.loc else "") if part
    )


def _line(text: str, style: Style) -> Line:
    return ((_short(text), style),)


def _short(text: str, limit: int = 44) -> str:
    """``text`` without control characters, its middle left out when it is long."""
    clean = _printable(text)
    return clean if len(clean) <= limit else f"{clean[: limit * 2 // 3]}…{clean[-(limit // 3) :]}"


def _printable(text: str) -> str:
    """``text`` with spaces for characters that no format can hold; line ends are kept."""
    return "".join(char if char.isprintable() or char == "\n" else " " for char in text)


def _at_most(texts: list[str], limit: int) -> list[str]:
    return texts if len(texts) <= limit else [*texts[: limit - 1], f"… and {len(texts) - limit + 1} more"]

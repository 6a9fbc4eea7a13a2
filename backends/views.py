"""What a picture shows: a graph reduced to boxes and arrows, before anything is drawn.

In the conventions of Schulman et al. (2015), figure 1:

* ``stochastic``: sites, costs and deterministic blocks, a block being the connected operations of one user module (or
  of none) that are influenced by the same sites, so that the picture never shows an influence that is not there;
* ``dataflow``: every operation, in nested clusters of the user's modules;
* ``credit``: which cost teaches which site, and where it does not, why;
* ``passes``: the graph between the passes, side by side;
* ``variance``: the stochastic view, coloured by shares of the gradient's variance.

What is repeated, as the steps of an unrolled loop, is folded into one box with a count unless asked otherwise.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from scg.backends.blocks import BLOCK, Blocks, Group
from scg.backends.boxes import Arrow, Box, Kind, Line, Picture
from scg.backends.dropped import dropped
from scg.backends.folding import fold_repeats
from scg.backends.labels import (
    at_most,
    count,
    kind,
    line,
    lines,
    params_lines,
    printable,
    short,
    summary,
    tooltip,
    value_text,
)
from scg.backends.shares import VarianceShares, coloured
from scg.backends.stages import Stage, stages
from scg.ir import Cost, Graph, Node, Param, Sample, TensorType
from scg.report import objective_text

if TYPE_CHECKING:
    import networkx

VIEWS = ("stochastic", "dataflow", "credit", "passes", "variance")

_MOST = 20
"""Credit arrows that a picture with data edges can hold."""
_MOST_READERS = 6
"""Boxes that may read a value before it is drawn once for each."""
_MOST_ALONE = 150
"""Credit arrows that the credit view can hold, and dropped ones."""


def picture(
    graph: Graph,
    view: str = "stochastic",
    *,
    fold: bool = True,
    history: Sequence[Stage] = (),
    shares: VarianceShares | None = None,
) -> Picture:
    """The boxes and arrows of ``graph`` in one of the `VIEWS`.

    Args:
        graph: as traced, or after any pass.
        view: its name.
        fold: draw repeated structure once, with a count.
        history: the graph between the passes, for ``passes``.
        shares: the measurement, for ``variance``.
    """
    if view == "stochastic":
        return _thin(_folded(graph, stochastic(graph), fold))
    if view == "dataflow":
        return _thin(_calls(_folded(graph, dataflow(graph), fold)))
    if view == "credit":
        return _thin(_folded(graph, credit(graph), fold), _MOST_ALONE)
    if view == "passes":
        if not history:
            raise ValueError("view 'passes' shows what compiling did: call render of a compiled module, not of a graph")
        return stages(history)
    if view == "variance":
        if shares is None:
            raise ValueError("view 'variance' needs measurements: give shares=VarianceShares({(site, cost): share})")
        return _thin(_folded(graph, coloured(graph, stochastic(graph), shares), fold), _MOST_ALONE)
    raise ValueError(f"unknown view {view!r}; known: {', '.join(VIEWS)}")


def _folded(graph: Graph, drawn: Picture, fold: bool) -> Picture:
    return _spread(fold_repeats(graph, drawn) if fold else drawn)


def _spread(drawn: Picture) -> Picture:
    """Inputs and parameters that many boxes read stand beside each of them: arrows across the picture help nobody."""
    readers = Counter(arrow.tail for arrow in drawn.arrows if arrow.kind == "data")
    hubs = {box.id: box for box in drawn.boxes if box.kind == "value" and readers[box.id] > _MOST_READERS}
    copies: dict[str, list[Box]] = {id: [] for id in hubs}
    arrows = []
    for arrow in drawn.arrows:
        if arrow.tail in hubs:
            copy = replace(hubs[arrow.tail], id=f"{arrow.tail}r{len(copies[arrow.tail])}")
            copies[arrow.tail].append(copy)
            arrow = replace(arrow, tail=copy.id)
        arrows.append(arrow)
    boxes = [copy for box in drawn.boxes for copy in (copies[box.id] if box.id in hubs else [box])]
    return replace(drawn, boxes=tuple(boxes), arrows=tuple(arrows))


def _calls(drawn: Picture) -> Picture:
    """A module that is called again, on what came of an earlier call, has a frame for each call.

    One frame would pull the steps of a loop together, and its arrows across the whole picture.
    """
    import networkx

    flow = networkx.DiGraph((arrow.tail, arrow.head) for arrow in drawn.arrows if not arrow.again)
    flow.add_nodes_from(box.id for box in drawn.boxes)
    boxes = {box.id: box for box in drawn.boxes}
    for depth in range(max((len(box.cluster) for box in drawn.boxes), default=0)):
        frames: dict[tuple[str, ...], list[str]] = {}
        for box in boxes.values():
            if len(box.cluster) > depth:
                frames.setdefault(box.cluster[: depth + 1], []).append(box.id)
        for frame, members in frames.items():
            inside = [id for id in members if boxes[id].kind != "value"]
            calls = list(networkx.weakly_connected_components(flow.subgraph(inside)))
            if len(calls) < 2 or not _comes_back(flow, set(members)):
                continue
            place = {id: i for i, id in enumerate(members)}
            calls.sort(key=lambda call: min(place[id] for id in call))
            for n, call in enumerate(calls[1:], 2):
                read = {id for head in call for id in flow.predecessors(head) if set(flow.successors(id)) <= call}
                for id in (call | read) & place.keys():
                    path = boxes[id].cluster
                    boxes[id] = replace(boxes[id], cluster=(*frame[:-1], f"{frame[-1]} ·{n}", *path[depth + 1 :]))
    return replace(drawn, boxes=tuple(boxes.values()))


def _comes_back(flow: networkx.DiGraph, members: set[str]) -> bool:
    """Does a path leave ``members`` and enter them again?"""
    stack = [head for tail in members for head in flow.successors(tail) if head not in members]
    seen = set(stack)
    while stack:
        for head in flow.successors(stack.pop()):
            if head in members:
                return True
            if head not in seen:
                seen.add(head)
                stack.append(head)
    return False


# -- views ------------------------------------------------------------------------------------------------------------
def stochastic(graph: Graph) -> Picture:
    """Sites, costs and deterministic blocks named after the user's modules."""
    shown = _relevant(graph)
    blocks = Blocks(graph, shown)
    builder = _Builder(graph)
    for group in blocks.groups():
        builder.block(group, blocks)
    for arrow in blocks.edges():
        builder.data(*arrow)
    builder.credit()
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
    builder.credit()
    return builder.picture("dataflow view")


def credit(graph: Graph) -> Picture:
    """Sites on the left, costs on the right, an arrow from each cost to every site it teaches, or why it does not."""
    builder = _Builder(graph)
    for node in graph.of(Sample, Cost):
        builder.single(node)
    builder.credit()
    builder.dropped()
    return builder.picture("credit view", sideways=True)


def _relevant(graph: Graph) -> set[str]:
    """Names of the nodes that a site or a cost depends on; the objective stands for costs that were not split yet."""
    ends = [node.name for node in graph.of(Sample, Cost)]
    if not graph.tail:
        ends.append(str(graph.objective))
    return graph.ancestors(ends)


def _thin(drawn: Picture, most: int = _MOST) -> Picture:
    """Names the costs that teach a site below its estimator, where so many arrows would hide the picture."""
    arrows = [arrow for arrow in drawn.arrows if arrow.kind == "credit"]
    if len(drawn.arrows) - len(arrows) > most and any(arrow.kind == "dropped" for arrow in drawn.arrows):
        kept = tuple(arrow for arrow in drawn.arrows if arrow.kind != "dropped")
        left = len(drawn.arrows) - len(kept)
        drawn = replace(drawn, arrows=kept, caption=f"{left} pairs without credit are not drawn")
    if len(arrows) <= most:
        return drawn
    titles = {box.id: box.title for box in drawn.boxes}
    teachers: dict[str, list[str]] = {}
    for arrow in arrows:
        teachers.setdefault(arrow.head, []).append(titles[arrow.tail])
    boxes = []
    for box in drawn.boxes:
        if labels := teachers.get(box.id):
            text = ", ".join(labels) if len(labels) < 3 else f"{labels[0]} … {labels[-1]} ({len(labels)})"
            box = replace(box, lines=(*box.lines, line(f"⇠ {text}", "credit")))
        boxes.append(box)
    rest = tuple(arrow for arrow in drawn.arrows if arrow.kind != "credit")
    return replace(drawn, boxes=tuple(boxes), arrows=rest)


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
        self._add(kind(self.graph, node), lines(self.graph, node), [node], cluster)

    def block(self, group: Group, blocks: Blocks) -> None:
        """A box for a group of nodes."""
        last = group.members[-1]
        if isinstance(last, Param):
            return self._add("value", params_lines(group.members), group.members)
        if not isinstance(last, BLOCK) or last.name == self.graph.objective:
            return self._add(kind(self.graph, last), lines(self.graph, last), group.members)
        text = summary(self.graph, group.members)
        shown = [line(group.title, "title"), line(text, "small")] if group.label else [line(text, "plain")]
        leaving = [node for node in group.members if node.name in blocks.leaving and isinstance(node.type, TensorType)]
        if len(leaving) == 1:
            shown.append(line(str(leaving[0].type), "small"))
        if group.closed_form:
            shown.append(line("closed form", "accent"))
        params = [node for node in group.members if isinstance(node, Param)]
        if params:
            shown.append(line(f"θ {count(params)}", "small"))
        self._add("block", tuple(shown), group.members)

    def _add(self, kind: Kind, lines: tuple[Line, ...], nodes: list[Node], cluster: tuple[str, ...] = ()) -> None:
        members = tuple(node.name for node in nodes)
        box = Box(f"n{len(self.boxes)}", kind, lines, tooltip(self.graph, nodes), members, cluster)
        self.boxes.append(box)
        self.ids |= dict.fromkeys(box.members, box.id)

    def data(self, tail: str, head: str, carried: list[str]) -> None:
        """An arrow for the values ``carried`` between the boxes of two nodes."""
        texts = [value_text(self.graph[name]) for name in carried]
        self.arrows.append(Arrow(self.ids[tail], self.ids[head], "data", "\n".join(at_most(texts, 12))))

    def credit(self) -> None:
        """Dashed arrows from costs to the sites that they teach."""
        for (site, cost), edge in self.graph.credit.items():
            ends = (self.graph.costs[cost], self.graph[site])
            text = f"{ends[0].label} teaches {site}: {edge.label}"
            told = printable("\n".join([text, *dict.fromkeys(node.loc for node in ends if node.loc)]))
            self.arrows.append(Arrow(self.ids[cost], self.ids[site], "credit", told, edge.label))

    def dropped(self) -> None:
        """Grey arrows from costs to the sites that they do not teach, with the reason."""
        for (site, cost), why in dropped(self.graph).items():
            text = printable(f"{self.graph.costs[cost].label} does not teach {site}: {why}")
            self.arrows.append(Arrow(self.ids[cost], self.ids[site], "dropped", text, why))

    def picture(self, view: str, sideways: bool = False) -> Picture:
        return Picture(
            short(f"{self.graph.name} · {view}", 60),
            short(f"minimises {objective_text(self.graph)}", 90),
            tuple(self.boxes),
            tuple(self.arrows),
            sideways,
        )

"""The graph between the passes, side by side: what each pass made, changed and dropped, and the nodes around it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from scg.backends.boxes import Arrow, Box, Mark, Picture
from scg.backends.folding import fold_repeats
from scg.backends.labels import kind, lines, short, tooltip
from scg.ir import Dist, Graph, Node, Param

MOST = 24
"""Nodes of a column beyond which none is shown that did not change."""


@dataclass(frozen=True)
class Stage:
    """The graph after one pass; the first is the graph as traced."""

    name: str
    graph: Graph


@dataclass(frozen=True)
class Change:
    """What one pass did, by names of nodes."""

    name: str
    new: tuple[str, ...]
    changed: tuple[str, ...]
    gone: tuple[str, ...]

    def __str__(self) -> str:
        counts = [
            f"{sign}{len(names)}"
            for sign, names in zip("+~−", (self.new, self.changed, self.gone), strict=True)
            if names
        ]
        return " ".join(counts) or "nothing changed"


def changes(history: Sequence[Stage]) -> list[Change]:
    """One for each pass."""
    return [_change(before.graph, after) for before, after in zip(history, history[1:], strict=False)]


def _change(before: Graph, after: Stage) -> Change:
    old, new = before.nodes, after.graph.nodes
    return Change(
        after.name,
        tuple(name for name in new if name not in old),
        tuple(name for name in new if name in old and _fact(old[name]) != _fact(new[name])),
        tuple(name for name in old if name not in new),
    )


def _fact(node: Node) -> tuple[str, str]:
    """What counts as a change: not that sample dims came to stand in front."""
    return node.kind, node.describe()


def stages(history: Sequence[Stage]) -> Picture:
    """A column for each graph that differs from the one before; what stays the same on both sides is left out."""
    kept = [history[0]]
    made = [Change(history[0].name, (), (), ())]
    for stage, change in zip(history[1:], changes(history), strict=True):
        if change.new or change.changed or change.gone:
            kept.append(stage)
            made.append(change)
    boxes: list[Box] = []
    arrows: list[Arrow] = []
    for at, stage in enumerate(kept):
        column = _column(stage.graph, made[at], made[at + 1] if at + 1 < len(kept) else None, f"c{at}")
        boxes += column.boxes
        arrows += column.arrows
    title = short(f"{history[0].graph.name} · passes", 60)
    return Picture(title, "what each pass made, changed and dropped", tuple(boxes), tuple(arrows), columns=True)


def _column(graph: Graph, made: Change, after: Change | None, key: str) -> Picture:
    marks: dict[str, Mark] = {}
    marks.update((name, "changed") for name in made.changed)
    marks.update((name, "new") for name in made.new)
    marks.update((name, "gone") for name in (after.gone if after else ()))
    seen = {*marks, *(after.changed if after else ())}
    shown = _with_context(graph, [name for name in graph.nodes if name in seen])
    what = f"{made} · " if made.new or made.changed or made.gone else ""
    frame = (f"{made.name}   {what}{len(shown)} of {len(graph)} nodes",)
    boxes: dict[str, Box] = {}
    for name in shown:
        node = graph[name]
        box = Box(f"{key}n{len(boxes)}", kind(graph, node), lines(graph, node), tooltip(graph, [node]), (name,), frame)
        boxes[name] = replace(box, mark=marks.get(name, ""))
    arrows = [
        Arrow(boxes[ref].id, box.id, "data", str(graph[ref]))
        for name, box in boxes.items()
        for ref in dict.fromkeys(graph[name].inputs)
        if ref in boxes
    ]
    column = fold_repeats(graph, Picture(made.name, "", tuple(boxes.values()), tuple(arrows)))
    return replace(column, boxes=(Box(f"{key}top", "anchor", (), "", (), frame), *column.boxes))


def _with_context(graph: Graph, names: Iterable[str]) -> list[str]:
    """Names of the nodes to show: those given, and one that each reads and feeds, as many as there is room for."""
    core = dict.fromkeys(names)
    around: dict[str, None] = {}
    for name in core:
        for beside in (graph[name].inputs, graph.users[name]):
            others = (str(other) for other in beside if not isinstance(graph[other], (Param, Dist)))
            if (first := next(others, None)) is not None and first not in core:
                around[first] = None
    chosen = {*core, *list(around)[: max(0, MOST - len(core))]}
    return [name for name in graph.nodes if name in chosen]

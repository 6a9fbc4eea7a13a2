"""Folding: what is repeated, as the steps of an unrolled loop or the layers of a stack, is drawn once with a count.

    z ─▶ z_1 ─▶ … ─▶ z_19          becomes   z_t ×20, with an arrow to itself
    │     │           │                       │
    nll   nll_1       nll_19                  nll_t ×20

Boxes repeat each other if they come from the same line of the user's, in modules whose paths differ in numbers only,
and do the same. Of several such boxes a step, the first of each step go together, then the second.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import replace

from scg.backends.boxes import Arrow, Box, Line, Picture
from scg.backends.labels import at_most, short
from scg.ir import Cost, Graph, Input, Op, Param, Sample, TensorType

FEWEST = 4
"""Fewer repetitions are drawn one by one."""


def fold_repeats(graph: Graph, drawn: Picture) -> Picture:
    """``drawn`` with repeated boxes, and the arrows between them, in one."""
    classes = _classes(graph, drawn.boxes)
    if not classes:
        return drawn
    names = _names(graph, classes)
    home = {box.id: key for key, boxes in classes.items() for box in boxes}
    first = {key: members[0].id for key, members in classes.items()}
    order = {home.get(box.id, box.id): i for i, box in enumerate(drawn.boxes)}  # the last of a class counts
    boxes: dict[str, Box] = {}
    for box in drawn.boxes:
        key = home.get(box.id, box.id)
        if key not in boxes:
            boxes[key] = _join(classes[key], names) if key in classes else _renamed(box, names)
    arrows: dict[tuple[str, str, str], list[Arrow]] = {}
    for arrow in drawn.arrows:
        tail, head = home.get(arrow.tail, arrow.tail), home.get(arrow.head, arrow.head)
        arrows.setdefault((tail, head, arrow.kind), []).append(arrow)
    index = {box.id: i for members in classes.values() for i, box in enumerate(members)}
    folded = []
    for (tail, head, _), members in arrows.items():
        ends = first.get(tail, tail), first.get(head, head)
        again = members[0].kind == "data" and order[tail] >= order[head]
        label = members[0].label
        if members[0].kind != "data" and len(members) > 1:
            counts = len(classes.get(tail, ())), len(classes.get(head, ()))
            label = _steps([(index.get(a.head, 0), index.get(a.tail, 0)) for a in members], counts, members)
        told = "\n".join(at_most([arrow.tooltip.partition("\n")[0] for arrow in members], 12))
        shares = [arrow.share for arrow in members if arrow.share is not None]
        share = sum(shares) if shares else None
        whole = members[0].tooltip if len(members) == 1 else told
        folded.append(Arrow(*ends, members[0].kind, whole, label, again, share))
    return _framed(replace(drawn, boxes=tuple(boxes.values()), arrows=tuple(folded)))


# -- what repeats -----------------------------------------------------------------------------------------------------
def _classes(graph: Graph, boxes: Sequence[Box]) -> dict[str, list[Box]]:
    """Boxes that repeat each other, in program order, by a key."""
    alike: dict[tuple[Hashable, ...], list[Box]] = defaultdict(list)
    for box in boxes:
        if signature := _signature(graph, box):
            alike[signature].append(box)
    times: dict[Hashable, int] = {}
    for (where, *_), members in alike.items():
        if len(members) >= FEWEST:
            times[where] = min(len(members), times.get(where, len(members)))
    found: dict[str, list[Box]] = {}
    for (where, *_), members in alike.items():
        if len(members) >= FEWEST:
            a_step = int(len(members) / times[where] + 0.25)  # some steps may lack what others have
            for place in range(a_step):
                if len(some := members[place::a_step]) >= FEWEST:
                    found[f"fold {len(found)}"] = some
    return found


def _signature(graph: Graph, box: Box) -> tuple[Hashable, ...]:
    """What repetitions have in common, the line first; empty where nothing could repeat."""
    node = graph[box.members[-1]]
    if isinstance(node, (Param, Input)):
        return ("", _stem(node.path), str(node.type)) if re.search(r"\d", node.path) else ()
    if not node.loc:
        return ()
    scope = _stem(node.scope)
    shape = node.tensor.shape if scope != node.scope and isinstance(node.type, TensorType) else ()
    named = isinstance(node, (Sample, Cost)) or node.name == graph.objective
    what = _stem(node.name) if named else node.op_name if isinstance(node, Op) and len(box.members) == 1 else ""
    clusters = tuple(map(_stem, box.cluster))
    return (node.loc, node.kind, box.kind, box.mark, scope, shape, what, clusters)


def _stem(name: str) -> str:
    """``z_3`` and ``z`` have the same; ``layers.0.weight`` and ``layers.1.weight`` too."""
    return re.sub(r"\d+", "#", re.sub(r"_\d+$", "", name))


def _names(graph: Graph, classes: dict[str, list[Box]]) -> dict[str, str]:
    """``z_t`` for the names of sites and costs that are folded."""
    found: dict[str, str] = {}
    for members in classes.values():
        for box in members:
            node = graph[box.members[-1]]
            if isinstance(node, (Sample, Cost)):
                for name in {node.name, node.label if isinstance(node, Cost) else node.name}:
                    found[name] = f"{re.sub(r'_?[0-9]+$', '', name)}_t"
    return found


# -- one for all ------------------------------------------------------------------------------------------------------
def _join(boxes: Sequence[Box], names: dict[str, str]) -> Box:
    """One box for all."""
    first = boxes[0]
    shares = [box.share for box in boxes if box.share is not None]
    titles = [box.title for box in boxes]
    told = short(f"{len(boxes)} times: {', '.join(at_most(titles, 8))}", 200)
    return replace(
        first,
        lines=_lines(boxes, names),
        tooltip=f"{told}\n{first.tooltip}",
        members=tuple(name for box in boxes for name in box.members),
        count=len(boxes),
        cluster=first.cluster if len({box.cluster for box in boxes}) == 1 else tuple(map(_stem, first.cluster)),
        share=sum(shares) if shares else None,
    )


def _lines(boxes: Sequence[Box], names: dict[str, str]) -> tuple[Line, ...]:
    """Line by line what the boxes share, and how often each wording occurs where they differ."""
    slots: dict[tuple[tuple[str, ...], int], Counter[Line]] = {}
    for box in boxes:
        seen: Counter[tuple[str, ...]] = Counter()
        for line in box.lines:
            styles = tuple(style for _, style in line)
            seen[styles] += 1
            slots.setdefault((styles, seen[styles]), Counter())[_rename(line, names)] += 1
    sites = boxes[0].kind == "site"
    return tuple(_either(texts, len(boxes), sites and styles != ("small",)) for (styles, _), texts in slots.items())


def _either(texts: Counter[Line], times: int, all_told: bool) -> Line:
    """The wordings of one line; of boxes that compute, the usual one is enough."""
    line, n = texts.most_common(1)[0]
    if len(texts) == 1:
        return line if n == times or not all_told else (*line, (f" ×{n}", line[-1][1]))
    if not all_told or len(line) > 1:
        return line
    wordings = [f"{text[0][0]} ×{n}" for text, n in texts.most_common(3)]
    return ((short(", ".join(wordings[:2] if len(texts) <= 2 else [wordings[0], "…"]), 60), line[0][1]),)


def _renamed(box: Box, names: dict[str, str]) -> Box:
    return replace(box, lines=tuple(_rename(line, names) if box.kind != "site" else line for line in box.lines))


def _rename(line: Line, names: dict[str, str]) -> Line:
    """``i64[K, z_t… | 50]`` of ``i64[K, z, z_1, z_2 | 50]``."""

    def text_of(text: str) -> str:
        text = re.sub(r"[\w.]+", lambda word: names.get(word[0], word[0]), text)
        return re.sub(r"(\w+_t)(?:, \1)+", r"\1…", text)

    return tuple((text_of(text), style) for text, style in line)


# -- arrows -----------------------------------------------------------------------------------------------------------
def _steps(pairs: list[tuple[int, int]], counts: tuple[int, int], arrows: Sequence[Arrow]) -> str:
    """Which steps' costs an arrow between folded sites and costs stands for: ``own step and later · tied 0``."""
    labels = list(dict.fromkeys(arrow.label for arrow in arrows))
    what = labels[0] if len(labels) == 1 else f"{labels[0]}, …"
    costs, sites = counts
    if not costs or not sites:
        return f"{what} ×{len(pairs)}"
    found = set(pairs)
    grid = {(s, c) for s in range(sites) for c in range(costs)}
    words = {
        "every step": grid,
        "own step": {(s, c) for s, c in grid if c == s},
        "own step and later": {(s, c) for s, c in grid if c >= s},
        "later steps": {(s, c) for s, c in grid if c > s},
        "next step": {(s, c) for s, c in grid if c == s + 1},
        "earlier steps": {(s, c) for s, c in grid if c < s},
        "own step and earlier": {(s, c) for s, c in grid if c <= s},
        "other steps": {(s, c) for s, c in grid if c != s},
    }
    which = next((word for word, steps in words.items() if steps == found), f"{len(found)} of {len(grid)}")
    return f"{what} · {which}"


# -- the frame around a step ------------------------------------------------------------------------------------------
def _framed(drawn: Picture) -> Picture:
    """Folded boxes that hang together stand in one frame, where no other frames are drawn."""
    if drawn.sideways or any(box.cluster for box in drawn.boxes):
        return drawn
    boxes = {box.id: box for box in drawn.boxes}
    left = {box.id for box in drawn.boxes if box.count > 1 and box.kind != "value"}
    taken: Counter[str] = Counter()
    while left:
        start = next(box.id for box in drawn.boxes if box.id in left)
        part = _connected(start, left, drawn.arrows)
        left -= part
        if len(part) > 1:
            label = f"×{max(boxes[id].count for id in part)}"
            taken[label] += 1
            frame = label if taken[label] == 1 else f"{label} ({taken[label]})"
            for id in part:
                boxes[id] = replace(boxes[id], cluster=(frame,))
    return replace(drawn, boxes=tuple(boxes.values()))


def _connected(start: str, among: set[str], arrows: Iterable[Arrow]) -> set[str]:
    beside: dict[str, set[str]] = defaultdict(set)
    for arrow in arrows:
        if arrow.kind == "data":
            beside[arrow.tail].add(arrow.head)
            beside[arrow.head].add(arrow.tail)
    found, stack = {start}, [start]
    while stack:
        for other in (beside[stack.pop()] & among) - found:
            found.add(other)
            stack.append(other)
    return found

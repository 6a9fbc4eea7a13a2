"""A picture as DOT text, the input of graphviz.

Colours come in pairs (light, dark). The text uses the light ones; `scg.backends.layout` adds a style sheet to SVG that
swaps each for its partner where the reader's screen is dark. Blue and orange are told apart with every kind of colour
blindness (Okabe & Ito 2008), and no fact is told by colour alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from html import escape

from scg.backends.boxes import Arrow, Box, Kind, Line, Mark, Picture, Style
from scg.backends.shares import STEPS, level, percent

PALETTE = {
    "page": ("#ffffff", "#11161d"),
    "ink": ("#1b2430", "#e8edf3"),
    "muted": ("#5a6675", "#9aa7b6"),
    "edge": ("#7a8594", "#8492a3"),
    "site": ("#dcecf9", "#12395a"),
    "site line": ("#0067a8", "#5fb4ee"),
    "site text": ("#00538a", "#8cccf8"),
    "block": ("#f3f5f8", "#1f2732"),
    "block line": ("#9da7b4", "#667485"),
    "opaque": ("#e4e8ee", "#2b3543"),
    "cost": ("#fdebd9", "#4a2a10"),
    "cost line": ("#c75300", "#f5a15b"),
    "cluster": ("#fafbfc", "#161c25"),
    "cluster line": ("#d3d9e0", "#3a4554"),
    "warning": ("#a3006b", "#ff8fd0"),
    "dropped": ("#aeb6c0", "#5a6573"),
    "new": ("#00725a", "#4fd1ae"),
    "share 0": ("#fff6dc", "#1d1a10"),
    "share 1": ("#ffe6b0", "#3b2f10"),
    "share 2": ("#fdce85", "#5d4211"),
    "share 3": ("#f5a04f", "#814d08"),
    "share 4": ("#e8743b", "#9c4a12"),
    "share line": ("#6b3a12", "#ffc48a"),
}
"""Role -> (light, dark)."""

FONT = "Helvetica,Arial,sans-serif"

_SHAPES: dict[Kind, str] = {
    "site": 'shape=ellipse penwidth=1.6 margin="0,0"',
    "cost": 'shape=diamond penwidth=1.6 margin="0.04,0.05"',
    "block": 'shape=box style="filled,rounded"',
    "opaque": "shape=box peripheries=2",
    "anchor": "shape=point style=invis width=0 height=0",
    "value": 'shape=box penwidth=0 width=0 height=0 margin="0.04,0.02"',
}
_COLOURS: dict[Kind, tuple[str, str]] = {
    "site": ("site", "site line"),
    "cost": ("cost", "cost line"),
    "block": ("block", "block line"),
    "opaque": ("opaque", "block line"),
    "value": ("page", "page"),
}
"""Roles of the area and of its outline."""
_STYLES: dict[Style, tuple[str, str, int]] = {
    "title": ("<B>{}</B>", "ink", 13),
    "plain": ("{}", "ink", 12),
    "small": ("{}", "muted", 10),
    "accent": ("<B>{}</B>", "site text", 10),
    "credit": ("{}", "cost line", 10),
    "warn": ("<B>{}</B>", "warning", 10),
    "strong": ("<B>{}</B>", "ink", 12),
}
"""Template, colour role and size of each text style."""
_MARKS: dict[Mark, tuple[str, str, str]] = {
    "": ("", "", ""),
    "new": ("+ ", "new", "penwidth=2.2"),
    "changed": ("~ ", "warning", "penwidth=2.2"),
    "gone": ("− ", "muted", 'penwidth=1.6 style="filled,dashed"'),
}
"""Sign before the title, role of the outline and look of what a pass did."""


def to_dot(picture: Picture) -> str:
    """DOT text of ``picture``."""
    rank = "LR" if picture.sideways else "TB"
    there = {(arrow.tail, arrow.head) for arrow in picture.arrows if arrow.kind == "data" and not arrow.again}
    lines = [
        f"digraph {_quote(picture.title)} {{",
        f'  graph [rankdir={rank} bgcolor="{PALETTE["page"][0]}" fontname="{FONT}" pad=0.2 nodesep=0.28'
        f" ranksep={0.9 if picture.sideways else 0.34} newrank={str(picture.columns).lower()}"
        f" {_effort(picture)}"
        f" labelloc=b labeljust=l label={_legend(picture)}]",
        f'  node [fontname="{FONT}" style=filled penwidth=1.1 margin="0.12,0.05"]',
        f'  edge [fontname="{FONT}" fontsize=10 color="{PALETTE["edge"][0]}" penwidth=1.1 arrowsize=0.65]',
        *_frames(picture.boxes, ()),
        *(_columns(picture) if picture.columns else ()),
        *(_arrow(arrow, f"e{i}", (arrow.head, arrow.tail) in there) for i, arrow in enumerate(picture.arrows)),
        "}",
    ]
    return "\n".join(lines) + "\n"


def _effort(picture: Picture) -> str:
    """Large pictures are laid out with fewer iterations: seconds in the place of minutes; balancing alone is cubic."""
    size = len(picture.boxes) + len(picture.arrows)
    return (
        "" if size < 150 else "nslimit=2 nslimit1=2 mclimit=0.3" if size < 600 else "nslimit=0.1 nslimit1=1 mclimit=0.1"
    )


def _frames(boxes: Iterable[Box], path: tuple[str, ...]) -> list[str]:
    """The boxes drawn in the frame ``path``, those of its inner frames nested."""
    indent = "  " * (len(path) + 1)
    lines: list[str] = []
    inner: dict[str, list[Box]] = {}
    for box in boxes:
        if len(box.cluster) > len(path):
            inner.setdefault(box.cluster[len(path)], []).append(box)
        else:
            lines.append(indent + _box(box))
    for name, members in inner.items():
        whole = (*path, name)
        lines += [
            f"{indent}subgraph {_quote('cluster_' + '.'.join(whole))} {{",
            f'{indent}  graph [label=<<B>{escape(name)}</B>> labelloc=t labeljust=l fontsize=11 style="filled,rounded" '
            f'margin=10 fontcolor="{PALETTE["muted"][0]}" '
            f'fillcolor="{PALETTE["cluster"][0]}" color="{PALETTE["cluster line"][0]}"]',
            *_frames(members, whole),
            f"{indent}}}",
        ]
    return lines


def _columns(picture: Picture) -> list[str]:
    """The anchors, first in their frames, in a row above all others."""
    members: dict[tuple[str, ...], list[str]] = {}
    for box in picture.boxes:
        members.setdefault(box.cluster, []).append(box.id)
    read = {arrow.head for arrow in picture.arrows}
    anchors = [ids[0] for ids in members.values()]
    lines = [f"  {{rank=same; {'; '.join(anchors)}}}", f"  {' -> '.join(anchors)} [style=invis]"]
    return lines + [f"  {ids[0]} -> {id} [style=invis]" for ids in members.values() for id in ids[1:] if id not in read]


def _box(box: Box) -> str:
    if box.kind == "anchor":
        return f'{box.id} [id={box.id} {_SHAPES["anchor"]} label=""]'
    sign, mark_line, mark_look = _MARKS[box.mark]
    shown = box.lines if not sign else (((sign, "title"), *box.lines[0]), *box.lines[1:])
    if box.share is not None:
        shown = tuple(tuple((text, "strong" if style != "title" else style) for text, style in line) for line in shown)
        shown = (*shown, ((percent(box.share), "title"),))
    if box.count > 1 and not any(f"×{box.count}" == part for part in box.cluster):
        shown = (*shown, ((f"×{box.count}", "strong"),))
    rows = "".join(f"<TR><TD>{_text(part)}</TD></TR>" for line in shown for part in _broken(box, line))
    table = f'<TABLE BORDER="0" CELLBORDER="0" CELLSPACING="0" CELLPADDING="0">{rows}</TABLE>'
    fill, line = _COLOURS[box.kind]
    if box.share is not None:
        fill, line = f"share {level(box.share)}", "share line"
    look = f'{_SHAPES[box.kind]} fillcolor="{PALETTE[fill][0]}" color="{PALETTE[mark_line or line][0]}" {mark_look}'
    return f"{box.id} [id={box.id} {look} label=<{table}> tooltip={_quote(box.tooltip)} class={box.kind}]"


def _broken(box: Box, line: Line) -> Iterable[Line]:
    """A long name of a cost on several lines: a diamond around one would be too wide."""
    if box.kind != "cost" or len(line) > 1:
        return [line]
    ((text, style),) = line
    parts = [""]
    for piece in re.findall(r"[^_]*_+|[^_]+", text) if len(text) > 16 and "[" not in text else [text]:
        if parts[-1] and len(parts[-1]) + len(piece) > 16:
            parts.append("")
        parts[-1] += piece
    return [((part, style),) for part in parts]


def _arrow(arrow: Arrow, id: str, back: bool) -> str:
    """One arrow; one that goes ``back`` where a data arrow comes from leaves and arrives at the side of its boxes."""
    tooltip = f"id={id} tooltip={_quote(arrow.tooltip)} class={arrow.kind}"
    if arrow.kind == "data":
        look = f" constraint=false{_label('next', 'muted', arrow.tooltip)}" if arrow.again else ""
        look += " tailport=e headport=e" if arrow.again and back else ""
        return f"  {arrow.tail} -> {arrow.head} [{tooltip}{look}]"
    role, width, dash = ("cost line", 1.3, "dashed") if arrow.kind == "credit" else ("dropped", 1.0, "dotted")
    text = arrow.label
    if arrow.share is not None:
        role, width, text = (
            "share line",
            1 + 4 * max(arrow.share, 0.0),
            f"{percent(arrow.share)} · {text}" if text else percent(arrow.share),
        )
    label = _label(text, "muted" if arrow.kind == "dropped" else role, arrow.tooltip) if text else ""
    look = f'style={dash} color="{PALETTE[role][0]}" penwidth={width:.2g}{label} {tooltip}'
    # laid out backwards, from the site down to the cost that it influences: so it ranks, and routes, like a data edge
    return f"  {arrow.head} -> {arrow.tail} [dir=back weight=0 {look}]"


def _label(text: str, role: str, tooltip: str) -> str:
    """Text on an arrow, on the colour of the page so that it is read where arrows cross."""
    page = PALETTE["page"][0]
    table = (
        f'<TABLE BORDER="0" CELLSPACING="0" CELLPADDING="3" BGCOLOR="{page}"><TR><TD>{escape(text)}</TD></TR></TABLE>'
    )
    return f' label=<{table}> labeltooltip={_quote(tooltip)} fontcolor="{PALETTE[role][0]}"'


def _text(line: Line) -> str:
    return "".join(_font(text, *_STYLES[style]) for text, style in line)


def _font(text: str, template: str, role: str, size: int) -> str:
    return f'<FONT COLOR="{PALETTE[role][0]}" POINT-SIZE="{size}">{template.format(escape(text))}</FONT>'


def _legend(picture: Picture) -> str:
    """Title, caption and the meaning of the shapes and colours that occur."""
    kinds: set[str] = {box.kind for box in picture.boxes} | {arrow.kind for arrow in picture.arrows}
    kinds |= {style for box in picture.boxes for line in box.lines for _, style in line}
    kinds |= {box.mark for box in picture.boxes} | ({"folded"} if picture.folded else set())
    measured = [part.share for part in picture.boxes] + [part.share for part in picture.arrows]
    kinds |= {"share"} if any(share is not None for share in measured) else set()
    entries = [
        ("site", "site line", "●", "stochastic"),
        ("cost", "cost line", "◆", "cost"),
        ("block", "block line", "■", "deterministic"),
        ("opaque", "block line", "▣", "opaque"),
        ("data", "edge", "⟶", "data"),
        ("credit", "cost line", "⇢", "cost teaches site"),
        ("dropped", "dropped", "⇢", "does not, and why"),
        ("folded", "ink", "×n", "drawn once, there n times"),
        ("new", "new", "+", "new"),
        ("changed", "warning", "~", "changed"),
        ("gone", "muted", "−", "gone after"),
    ]
    bounds = ["0", *(f"{100 * step:.0f}" for step in STEPS), "100"]
    entries += [
        ("share", f"share {i}", "■", f"{low}–{high} %")
        for i, (low, high) in enumerate(zip(bounds, bounds[1:], strict=False))
    ]
    used = [
        f"{_font(sign, '{}', role, 12)} {_font(word, '{}', 'muted', 10)}"
        for kind, role, sign, word in entries
        if kind in kinds
    ]
    title = f"{_font(picture.title, '<B>{}</B>', 'ink', 11)}   {_font(picture.caption, '{}', 'muted', 11)}"
    rows = "".join(f'{"   ".join(used[i : i + 6])}<BR ALIGN="LEFT"/>' for i in range(0, len(used), 6))
    return f'<<BR/>{title}<BR ALIGN="LEFT"/>{rows}>'


def _quote(text: str) -> str:
    """A DOT string."""
    clean = text.replace("&", "&amp;").replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{clean}"'

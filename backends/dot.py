"""A picture as DOT text, the input of graphviz.

Colours come in pairs (light, dark). The text uses the light ones; `scg.backends.layout` adds a style sheet to SVG that
swaps each for its partner where the reader's screen is dark. Blue and orange are told apart with every kind of colour
blindness (Okabe & Ito 2008), and no fact is told by colour alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

from scg.backends.views import Arrow, Box, Kind, Line, Picture, Style

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
}
"""Role -> (light, dark)."""

FONT = "Helvetica,Arial,sans-serif"

_SHAPES: dict[Kind, str] = {
    "site": 'shape=ellipse penwidth=1.6 margin="0,0"',
    "cost": 'shape=diamond penwidth=1.6 margin="0.04,0.05"',
    "block": 'shape=box style="filled,rounded"',
    "opaque": "shape=box peripheries=2",
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
}
"""Template, colour role and size of each text style."""


def to_dot(picture: Picture) -> str:
    """DOT text of ``picture``."""
    rank = "LR" if picture.sideways else "TB"
    lines = [
        f"digraph {_quote(picture.title)} {{",
        f'  graph [rankdir={rank} bgcolor="{PALETTE["page"][0]}" fontname="{FONT}" pad=0.25 nodesep=0.32 ranksep=0.42'
        f" labelloc=b labeljust=l label={_legend(picture)}]",
        f'  node [fontname="{FONT}" style=filled penwidth=1.1 margin="0.12,0.05"]',
        f'  edge [fontname="{FONT}" fontsize=10 color="{PALETTE["edge"][0]}" penwidth=1.1 arrowsize=0.65]',
        *_clusters(picture.boxes, ()),
        *(_arrow(arrow, f"e{i}") for i, arrow in enumerate(picture.arrows)),
        "}",
    ]
    return "\n".join(lines) + "\n"


def _clusters(boxes: Iterable[Box], path: tuple[str, ...]) -> list[str]:
    """The boxes drawn in the module ``path``, those of its submodules in nested clusters."""
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
            *_clusters(members, whole),
            f"{indent}}}",
        ]
    return lines


def _box(box: Box) -> str:
    rows = "".join(f"<TR><TD>{_text(line)}</TD></TR>" for line in box.lines)
    table = f'<TABLE BORDER="0" CELLBORDER="0" CELLSPACING="0" CELLPADDING="0">{rows}</TABLE>'
    fill, line = (PALETTE[role][0] for role in _COLOURS[box.kind])
    look = f'{_SHAPES[box.kind]} fillcolor="{fill}" color="{line}"'
    return f"{box.id} [id={box.id} {look} label=<{table}> tooltip={_quote(box.tooltip)} class={box.kind}]"


def _arrow(arrow: Arrow, id: str) -> str:
    tooltip = f"id={id} tooltip={_quote(arrow.tooltip)} class={arrow.kind}"
    if arrow.kind == "data":
        return f"  {arrow.tail} -> {arrow.head} [{tooltip}]"
    orange = PALETTE["cost line"][0]
    label = f' label=<&nbsp;{escape(arrow.label)}&nbsp;> labeltooltip={_quote(arrow.tooltip)} fontcolor="{orange}"'
    look = f'style=dashed color="{orange}" penwidth=1.3{label if arrow.label else ""} {tooltip}'
    # laid out backwards, from the site down to the cost that it influences: so it ranks, and routes, like a data edge
    return f"  {arrow.head} -> {arrow.tail} [dir=back weight=0 {look}]"


def _text(line: Line) -> str:
    return "".join(_font(text, *_STYLES[style]) for text, style in line)


def _font(text: str, template: str, role: str, size: int) -> str:
    return f'<FONT COLOR="{PALETTE[role][0]}" POINT-SIZE="{size}">{template.format(escape(text))}</FONT>'


def _legend(picture: Picture) -> str:
    """Title, caption and the meaning of the shapes that occur."""
    kinds: set[str] = {box.kind for box in picture.boxes} | {arrow.kind for arrow in picture.arrows}
    kinds |= {style for box in picture.boxes for line in box.lines for _, style in line}
    entries = [
        ("site", "site line", "●", "stochastic"),
        ("cost", "cost line", "◆", "cost"),
        ("block", "block line", "■", "deterministic"),
        ("opaque", "block line", "▣", "opaque"),
        ("data", "edge", "⟶", "data"),
        ("credit", "cost line", "⇢", "cost teaches site"),
    ]
    used = [
        f"{_font(sign, '{}', role, 12)} {_font(word, '{}', 'muted', 10)}"
        for kind, role, sign, word in entries
        if kind in kinds
    ]
    title = f"{_font(picture.title, '<B>{}</B>', 'ink', 11)}   {_font(picture.caption, '{}', 'muted', 11)}"
    return f'<<BR/>{title}<BR ALIGN="LEFT"/>{"   ".join(used)}<BR ALIGN="LEFT"/>>'


def _quote(text: str) -> str:
    """A DOT string."""
    clean = text.replace("&", "&amp;").replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{clean}"'

"""A graph as one HTML file that needs no network: every view with zoom, search and details, the report, the code."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import asdict
from html import escape
from importlib.resources import files

from scg.backends.dot import PALETTE
from scg.backends.layout import svg
from scg.backends.views import VIEWS, Picture, picture
from scg.ir import Graph
from scg.report import TITLES, Report, explain


def page(graph: Graph, view: str = "stochastic", report: Report | None = None, code: str = "") -> str:
    """The whole page.

    Args:
        graph: as traced, or after any pass.
        view: the one that is open first.
        report: made from the graph when absent.
        code: the generated code, shown below the report.
    """
    pictures = {view: picture(graph, view), **{name: picture(graph, name) for name in VIEWS if name != view}}
    report = report or explain(graph)
    parts = {
        "TITLE": escape(graph.name),
        "NAME": escape(graph.name),
        "CAPTION": escape(pictures[view].caption),
        "COLOURS": _colours(),
        "TABS": "".join(f'<button data-view="{name}">{name.capitalize()}</button>' for name in VIEWS),
        "VIEWS": "".join(_drawn(name, pictures[name]) for name in VIEWS),
        "REPORT": report.to_html(),
        "LISTINGS": "".join(_listing(id, title, text) for id, title, text in _texts(graph, code) if text),
        "DATA": json.dumps(_data(view, pictures, report)).replace("<", "\\u003c"),
    }
    template = files("scg.backends").joinpath("page.html").read_text(encoding="utf-8")
    return re.sub(r"@@([A-Z]+)@@", lambda match: parts[match[1]], template)


def _texts(graph: Graph, code: str) -> Iterable[tuple[str, str, str]]:
    yield "code", "Generated code", code
    yield "graph", "Graph", str(graph)


def _drawn(name: str, drawn: Picture) -> str:
    return svg(drawn).replace("<svg ", f'<svg data-view="{name}" hidden="" ', 1)


def _listing(id: str, title: str, text: str) -> str:
    lines = "".join(f"<span>{escape(line) or ' '}</span>" for line in text.splitlines())
    return f'<h2>{title}</h2><div class="wide" id="{id}"><pre>{lines}</pre></div>'


def _data(view: str, pictures: dict[str, Picture], report: Report) -> dict[str, object]:
    """What the page's script knows: of each box its text and nodes, of each site its row of the report."""
    titles = asdict(TITLES)
    return {
        "view": view,
        "boxes": {
            name: {
                box.id: {
                    "title": "".join(text for text, _ in box.lines[0]),
                    "text": box.tooltip,
                    "members": box.members,
                }
                for box in drawn.boxes
            }
            for name, drawn in pictures.items()
        },
        "sites": {row.site: {titles[key]: value for key, value in asdict(row).items()} for row in report.rows},
    }


def _colours() -> str:
    """The palette as CSS variables, light and dark."""
    light, dark = ("".join(f"--{role.replace(' ', '-')}:{pair[i]};" for role, pair in PALETTE.items()) for i in (0, 1))
    return f":root{{{light}}}@media (prefers-color-scheme:dark){{:root{{{dark}}}}}"

"""Draws a graph: SVG, PNG, PDF, HTML or DOT, by the suffix of the file."""

from __future__ import annotations

import os
from pathlib import Path

from scg.backends.dot import to_dot
from scg.backends.layout import lay_out, svg
from scg.backends.views import picture
from scg.ir import Graph
from scg.report import Report

SUFFIXES = (".svg", ".png", ".pdf", ".html", ".dot")


def render(
    graph: Graph,
    path: str | os.PathLike[str],
    view: str = "stochastic",
    report: Report | None = None,
    *,
    code: str = "",
) -> Path:
    """Writes a picture of ``graph`` and returns where it is.

    Args:
        graph: as traced, or after any pass.
        path: its suffix, one of `SUFFIXES`, says what is written.
        view: ``stochastic``, ``dataflow`` or ``credit``; an HTML page holds all three and opens at this one.
        report: shown in an HTML page; made from the graph when absent.
        code: the generated code, shown in an HTML page.
    """
    target = Path(path)
    suffix = target.suffix.lower()
    if suffix not in SUFFIXES:
        raise ValueError(f"cannot draw to {target.name!r}: the suffix must be one of {', '.join(SUFFIXES)}")
    if suffix == ".html":
        from scg.backends.html import page

        target.write_text(page(graph, view, report, code), encoding="utf-8")
    elif suffix == ".svg":
        target.write_text(inline_svg(graph, view) + "\n", encoding="utf-8")
    else:
        dot = to_dot(picture(graph, view))
        target.write_bytes(dot.encode() if suffix == ".dot" else lay_out(dot, suffix.removeprefix(".")))
    return target


def inline_svg(graph: Graph, view: str = "stochastic") -> str:
    """One SVG element, to be put into a page or a file."""
    return svg(picture(graph, view))

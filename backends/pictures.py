"""Draws a graph: SVG, PNG, PDF, HTML or DOT, by the suffix of the file."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from scg.backends.dot import to_dot
from scg.backends.layout import lay_out, svg
from scg.backends.shares import VarianceShares
from scg.backends.stages import Stage
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
    fold: bool = True,
    history: Sequence[Stage] = (),
    shares: VarianceShares | None = None,
    order: int = 1,
) -> Path:
    """Writes a picture of ``graph`` and returns where it is.

    Args:
        graph: as traced, or after any pass.
        path: its suffix, one of `SUFFIXES`, says what is written.
        view: one of `scg.backends.views.VIEWS`; an HTML page holds all there are and opens at this one.
        report: shown in an HTML page; made from the graph when absent.
        code: the generated code, shown in an HTML page.
        fold: draw repeated structure once, with a count; an HTML page holds both pictures.
        history: the graph between the passes, for the view ``passes``.
        shares: of the gradient's variance, for the view ``variance``.
        order: of the derivatives that the formulas of an HTML page are for.
    """
    target = Path(path)
    suffix = target.suffix.lower()
    if suffix not in SUFFIXES:
        raise ValueError(f"cannot draw to {target.name!r}: the suffix must be one of {', '.join(SUFFIXES)}")
    if suffix == ".html":
        from scg.backends.html import page

        text = page(graph, view, report, code, fold=fold, history=history, shares=shares, order=order)
        target.write_text(text, encoding="utf-8")
        return target
    drawn = picture(graph, view, fold=fold, history=history, shares=shares)
    if suffix == ".svg":
        target.write_text(svg(drawn) + "\n", encoding="utf-8")
    else:
        dot = to_dot(drawn)
        target.write_bytes(dot.encode() if suffix == ".dot" else lay_out(dot, suffix.removeprefix(".")))
    return target


def inline_svg(graph: Graph, view: str = "stochastic") -> str:
    """One SVG element, to be put into a page or a file."""
    return svg(picture(graph, view))

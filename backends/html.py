"""A graph as one HTML file that needs no network: every view with zoom, search and details, the formulas, the code.

Only the view that is open first stands in the file as it is, unless it is large; the others are packed, and drawn when
they are asked for.
"""

from __future__ import annotations

import base64
import json
import re
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from html import escape
from importlib.resources import files

from scg.backends.boxes import Picture
from scg.backends.dot import PALETTE
from scg.backends.latex import Formula, formula
from scg.backends.layout import svg
from scg.backends.mathml import mathml
from scg.backends.shares import VarianceShares
from scg.backends.stages import Stage, changes
from scg.backends.views import VIEWS, picture
from scg.debug import diff
from scg.ir import Graph, Sample
from scg.report import TITLES, Report, explain

UNFOLDED = "-unfolded"
"""What the name of a view ends in where repeated structure is drawn one by one."""

_LARGE = 400_000
"""Characters of a picture that is packed even if it is open first."""
_MOST_FORMULAS = 20
"""Costs, and sites, whose formulas the page shows one by one; each site has its own in its details."""
_MOST_LINES = 200
"""Lines of a pass's diff that the page holds."""


def page(
    graph: Graph,
    view: str = "stochastic",
    report: Report | None = None,
    code: str = "",
    *,
    fold: bool = True,
    history: Sequence[Stage] = (),
    shares: VarianceShares | None = None,
    order: int = 1,
) -> str:
    """The whole page.

    Args:
        graph: as traced, or after any pass.
        view: the one that is open first.
        report: made from the graph when absent.
        code: the generated code, shown below the report.
        fold: open with repeated structure folded.
        history: the graph between the passes.
        shares: of the gradient's variance.
        order: of the derivatives that the formulas are for.
    """
    pictures = _pictures(graph, view, history, shares)
    first = view if fold or view + UNFOLDED not in pictures else view + UNFOLDED
    drawn = {name: _drawn(name, each) for name, each in pictures.items()}
    inline = len(drawn[first]) < _LARGE
    report = report or explain(graph)
    formulas = formula(graph, order) if graph.costs else None
    parts = {
        "TITLE": escape(graph.name),
        "NAME": escape(graph.name),
        "CAPTION": escape(pictures[view].caption),
        "COLOURS": _colours(),
        "TABS": "".join(
            f'<button data-view="{name}">{name.capitalize()}</button>' for name in VIEWS if name in pictures
        ),
        "VIEWS": drawn[first] if inline else "",
        "REPORT": report.to_html(),
        "FORMULAS": _formulas(formulas) if formulas else "",
        "GRADIENTS": "".join(_gradients(graph, formulas)) if formulas else "",
        "PASSES": _passes(history) if history else "",
        "LISTINGS": "".join(_listing(id, title, text) for id, title, text in _texts(graph, code) if text),
        "DATA": json.dumps(_data(first, pictures, drawn, report, graph, inline)).replace("<", "\\u003c"),
    }
    template = files("scg.backends").joinpath("page.html").read_text(encoding="utf-8")
    return re.sub(r"@@([A-Z]+)@@", lambda match: parts[match[1]], template)


def _pictures(graph: Graph, view: str, history: Sequence[Stage], shares: VarianceShares | None) -> dict[str, Picture]:
    """Every view that there is something for, folded, and unfolded where that is another picture."""
    found: dict[str, Picture] = {}
    for name in VIEWS:
        if name != view and ((name == "passes" and not history) or (name == "variance" and shares is None)):
            continue
        found[name] = picture(graph, name, history=history, shares=shares)
        if found[name].folded and name != "passes":
            found[name + UNFOLDED] = picture(graph, name, fold=False, history=history, shares=shares)
    return found


def _tab(name: str) -> str:
    return f'<button data-view="{name}">{name.capitalize()}</button>'


def _drawn(name: str, drawn: Picture) -> str:
    text = re.sub(r">\n+<", "><", svg(drawn))  # graphviz's line ends would be nodes of the page
    return text.replace("<svg ", f'<svg data-view="{name}" ', 1)


def _pack(text: str) -> str:
    """Deflated and in letters: what the page's script inflates when it is wanted."""
    return base64.b64encode(zlib.compress(text.encode(), 9)).decode()


# -- below the picture ------------------------------------------------------------------------------------------------
def _texts(graph: Graph, code: str) -> Iterable[tuple[str, str, str]]:
    yield "code", "Generated code", code
    yield "graph", "Graph", str(graph)


def _listing(id: str, title: str, text: str) -> str:
    lines = "".join(f"<span>{escape(line) or ' '}</span>" for line in text.splitlines())
    return f'<h2>{title}</h2><div class="wide" id="{id}"><pre>{lines}</pre></div>'


def _formulas(found: Formula) -> str:
    """The objective, its costs, the sites' laws and the surrogate, one formula a line."""
    lines = [found.objective, *found.costs[:_MOST_FORMULAS], *found.sites[:_MOST_FORMULAS], found.surrogate]
    left = len(found.costs) + len(found.sites) + 2 - len(lines)
    rest = f"<p>… and {left} more costs and sites</p>" if left else ""
    return f'<h2>Formulas</h2><div class="wide" id="formulas">{"".join(map(mathml, lines))}{rest}</div>'


def _gradients(graph: Graph, found: Formula) -> Iterable[str]:
    """The gradient estimate of each site, for its details."""
    learned = [site for site in graph.of(Sample) if site.estimator is not None and not site.data]
    for site, latex in zip(learned, found.gradients, strict=True):
        yield f'<div data-site="{escape(site.name)}">{"".join(mathml(part) for part in latex.split(_APART))}</div>'


_APART = r",\quad "
"""Between a gradient's formula and what its letters stand for: each is a line of its own."""


def _passes(history: Sequence[Stage]) -> str:
    """The timeline: what each pass did, and the lines that it changed."""
    items = []
    for before, after, change in zip(history, history[1:], changes(history), strict=False):
        lines = diff(before.graph, after.graph, after.name).splitlines()
        cut = [*lines[:_MOST_LINES], f"… {len(lines) - _MOST_LINES} more lines"] if len(lines) > _MOST_LINES else lines
        listing = "".join(f'<span class="{_DIFF.get(line[:1], "")}">{escape(line)}</span>' for line in cut)
        inside = f'<div class="wide"><pre>{listing}</pre></div>' if cut else ""
        items.append(
            f"<li><details><summary><b>{escape(after.name)}</b> {escape(str(change))}</summary>{inside}</details>"
        )
    return f'<h2>Passes</h2><ol id="passes">{"".join(items)}</ol>'


_DIFF = {"+": "new", "-": "gone"}


# -- what the script knows --------------------------------------------------------------------------------------------
def _data(
    first: str, pictures: dict[str, Picture], drawn: dict[str, str], report: Report, graph: Graph, inline: bool
) -> dict[str, object]:
    """Of each view its boxes and, unless it stands in the page, its picture; of each site its row of the report."""
    titles = asdict(TITLES)
    return {
        "view": first,
        "unfolded": UNFOLDED,
        "boxes": {first: _boxes(pictures[first])} if inline else {},
        "packed": {
            name: _pack(json.dumps({"svg": drawn[name], "boxes": _boxes(each)}))
            for name, each in pictures.items()
            if name != first or not inline
        },
        "sites": {row.site: {titles[key]: value for key, value in asdict(row).items()} for row in report.rows},
        "names": list(graph.nodes),
    }


def _boxes(drawn: Picture) -> dict[str, dict[str, object]]:
    return {box.id: {"title": box.title, "members": box.members} for box in drawn.boxes if box.lines}


def _colours() -> str:
    """The palette as CSS variables, light and dark."""
    light, dark = ("".join(f"--{role.replace(' ', '-')}:{pair[i]};" for role, pair in PALETTE.items()) for i in (0, 1))
    return f":root{{{light}}}@media (prefers-color-scheme:dark){{:root{{{dark}}}}}"

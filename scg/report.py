"""What the compiler decided and why, one row a site: as a terminal table, as Markdown, as HTML.

    >>> print(compiled.explain())                                                              # doctest: +SKIP
    vae: minimises E[nll + kl]
    site  distribution  shape           estimator      why                 credited costs  biased?  rows  where
    z     Bernoulli     f32[K | 50, 8]  leave_one_out  2^8 too many to sum  nll (dim 0 tied)  no      4     vae.py:4
"""

from __future__ import annotations

import html
import textwrap
from collections.abc import Iterable, Mapping
from dataclasses import astuple, dataclass
from itertools import zip_longest

from scg.ir import Graph, Sample

Credits = Mapping[tuple[str, str], str]
"""Which cost node teaches which site, ``(site, cost) -> tied dims``; the text is empty where nothing is known of dims."""

_WRAP = 36
"""Widest cell of the terminal table; longer texts go over several lines."""


@dataclass(frozen=True)
class Row:
    """One site, every field as text for people."""

    site: str
    distribution: str
    shape: str
    estimator: str
    why: str
    costs: str
    biased: str
    rows: str
    where: str


TITLES = Row("site", "distribution", "shape", "estimator", "why", "credited costs", "biased?", "rows", "where")
"""Column titles; ``rows`` counts the evaluations of the downstream costs a step."""


@dataclass(frozen=True)
class Report:
    """The answer of ``explain()``; ``print`` it, show it in a notebook, or take `to_markdown`."""

    title: str
    summary: Mapping[str, str]
    """Header facts by name: objective, costs, …"""
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()
    """Remarks and warnings, whole sentences."""

    def __str__(self) -> str:
        lines = [self.title]
        width = max((len(key) for key in self.summary), default=0)
        lines += [f"  {key:<{width}}  {value}" for key, value in self.summary.items()]
        if self.rows:
            table = [[textwrap.wrap(cell, _WRAP) or [""] for cell in astuple(row)] for row in (TITLES, *self.rows)]
            widths = [max(len(line) for row in table for line in row[i]) for i in range(len(table[0]))]
            text = [
                "  ".join(f"{part:<{w}}" for part, w in zip(parts, widths, strict=True)).rstrip()
                for row in table
                for parts in zip_longest(*row, fillvalue="")
            ]
            lines += ["", text[0], "  ".join("─" * w for w in widths), *text[1:]]
        if self.notes:
            lines += ["", *(f"! {note}" for note in self.notes)]
        return "\n".join(lines)

    def to_markdown(self) -> str:
        """The same facts as GitHub-flavoured Markdown."""

        def cells(row: Row) -> str:
            texts = (html.escape(text, quote=False).replace("|", "\\|").replace("\n", " ") for text in astuple(row))
            return f"| {' | '.join(texts)} |"

        blocks = [f"**{html.escape(self.title, quote=False)}**"]
        blocks.append("\n".join(f"- {key}: {html.escape(value, quote=False)}" for key, value in self.summary.items()))
        if self.rows:
            rule = "|" + " --- |" * len(astuple(TITLES))
            blocks.append("\n".join([cells(TITLES), rule, *map(cells, self.rows)]))
        blocks += [f"> {html.escape(note, quote=False)}" for note in self.notes]
        return "\n\n".join(block for block in blocks if block) + "\n"

    def to_html(self) -> str:
        """The tables alone, without any style."""

        def cells(row: Row, tag: str) -> str:
            return "".join(f"<{tag}>{html.escape(text)}</{tag}>" for text in astuple(row))

        facts = "".join(f"<dt>{html.escape(k)}</dt><dd>{html.escape(v)}</dd>" for k, v in self.summary.items())
        body = "".join(f'<tr data-site="{html.escape(row.site)}">{cells(row, "td")}</tr>' for row in self.rows)
        notes = "".join(f"<li>{html.escape(note)}</li>" for note in self.notes)
        return (
            f"<dl>{facts}</dl><table><thead><tr>{cells(TITLES, 'th')}</tr></thead><tbody>{body}</tbody></table>"
            + (f'<ul class="notes">{notes}</ul>' if notes else "")
        )

    def _repr_html_(self) -> str:
        return f"<h4>{html.escape(self.title)}</h4>{self.to_html()}"


def explain(
    graph: Graph,
    *,
    notes: Iterable[str] = (),
    credits: Credits | None = None,
    evaluations: Mapping[str, int] | None = None,
) -> Report:
    """What was decided for every site of ``graph``.

    Args:
        graph: after the passes; of a graph as traced, the report says what the user's program holds.
        notes: remarks and warnings of the passes.
        credits: tied dims of every credit edge; taken from the sites' ``credits`` when absent.
        evaluations: rows of downstream costs a step, by site.
    """
    edges = credit_edges(graph, credits)
    sites: list[Sample] = graph.of(Sample)
    summary = {"objective": objective_text(graph)}
    if graph.costs:
        summary["costs"] = ", ".join(
            f"{cost.label} {cost.type}" + (f" ({cost.loc})" if cost.loc else "") for cost in graph.costs.values()
        )
    summary["sites"] = str(len(sites))
    dims = dict.fromkeys(dim for site in sites for dim in site.tensor.sample)
    if dims:
        summary["sample dims"] = ", ".join(dims)
    rows = tuple(_row(graph, site, edges, evaluations or {}) for site in sites)
    return Report(f"{graph.name}: minimises {objective_text(graph)}", summary, rows, tuple(notes))


def _row(graph: Graph, site: Sample, edges: Credits, evaluations: Mapping[str, int]) -> Row:
    costs = (
        graph.costs[cost].label + (f" ({dims})" if dims else "") for (name, cost), dims in edges.items() if name == site.name
    )
    estimator = site.estimator
    count = evaluations.get(site.name, getattr(estimator, "samples", None))
    return Row(
        site=site.name,
        distribution=graph.sites[site.name].distribution,
        shape=str(site.type),
        estimator=estimator_text(site) or "—",
        why=site.reason or "—",
        costs=", ".join(costs) or "none",
        biased="—" if estimator is None else "no" if estimator.unbiased else "BIASED",
        rows=str(count) if count else "1" if estimator else "—",
        where=site.loc or "—",
    )


def estimator_text(site: Sample) -> str:
    """The name of a site's estimator, "data" of a draw without gradient, else nothing."""
    return "data" if site.data else site.estimator.name if site.estimator is not None else ""


def objective_text(graph: Graph) -> str:
    """``E[nll + kl]``, from the labels of the costs; long sums are cut short."""
    labels = list(dict.fromkeys(cost.label for cost in graph.costs.values())) or [str(graph.objective)]
    if len(labels) > 6:
        labels = [*labels[:5], "…", labels[-1]]
    return f"E[{' + '.join(labels)}]"


def credit_edges(graph: Graph, credits: Credits | None = None) -> dict[tuple[str, str], str]:
    """``(site, cost node) -> tied dims`` of every credit edge, in program order.

    Args:
        graph: after credit assignment.
        credits: the edges with their dims; when absent, those of the sites' ``credits``, without dims.
    """
    if credits is not None:
        return {edge: dims for edge, dims in credits.items() if edge[0] in graph.nodes and edge[1] in graph.costs}
    by_label: dict[str, list[str]] = {}
    for cost in graph.costs.values():
        by_label.setdefault(cost.label, []).append(cost.name)
    return {(site.name, cost): "" for site in graph.of(Sample) for label in site.credits for cost in by_label.get(label, ())}

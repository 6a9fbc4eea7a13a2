"""What the compiler decided and why, one row a site: as a terminal table, as Markdown, as HTML.

>>> print(compiled.explain())                                                              # doctest: +SKIP
vae: minimises E[nll + kl]
site  distribution  shape           estimator      why                 credited costs  biased?  rows  where
z     Bernoulli     f32[K | 50, 8]  leave_one_out  2^8 too many to sum  nll (dim 0 tied)  no      4     vae.py:4
"""

from __future__ import annotations

import html
import math
import textwrap
from collections.abc import Iterable, Mapping
from dataclasses import astuple, dataclass, field
from itertools import zip_longest

from scg.analysis.contexts import contexts, random_values
from scg.analysis.factors import elimination_plan
from scg.estimators.base import EnumeratingEstimator, Estimator, ScoreEstimator
from scg.estimators.rows import SAMPLES, enumerated_rows, meeting, own_dims
from scg.estimators.score_function import ScoreFunction
from scg.ir import Cost, Graph, Marginal, Sample

_MOST_COSTS = 8
"""Credited costs that a row names one by one."""
_WRAP = 36
"""Widest cell of the terminal table; longer texts go over several lines."""

_CONTEXTS = 6
"""Most sites whose contexts are listed."""


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
    contexts: Mapping[str, str] = field(default_factory=dict)
    """By site that is scored: what a baseline and a critic of it need to read."""
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
        if self.contexts:
            widest = max(map(len, self.contexts))
            lines += ["", "sufficient contexts"]
            lines += [f"  {site:<{widest}}  {text}" for site, text in self.contexts.items()]
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
        if self.contexts:
            texts = (f"- {site}: {html.escape(text, quote=False)}" for site, text in self.contexts.items())
            blocks.append("\n".join(["Sufficient contexts:\n", *texts]))
        blocks += [f"> {html.escape(note, quote=False)}" for note in self.notes]
        return "\n\n".join(block for block in blocks if block) + "\n"

    def to_html(self) -> str:
        """The tables alone, without any style."""

        def cells(row: Row, tag: str) -> str:
            return "".join(f"<{tag}>{html.escape(text)}</{tag}>" for text in astuple(row))

        facts = "".join(f"<dt>{html.escape(k)}</dt><dd>{html.escape(v)}</dd>" for k, v in self.summary.items())
        body = "".join(f'<tr data-site="{html.escape(row.site)}">{cells(row, "td")}</tr>' for row in self.rows)
        notes = "".join(f"<li>{html.escape(note)}</li>" for note in self.notes)
        facts += "".join(
            f"<dt>context of {html.escape(site)}</dt><dd>{html.escape(text)}</dd>"
            for site, text in self.contexts.items()
        )
        return f"<dl>{facts}</dl><table><thead><tr>{cells(TITLES, 'th')}</tr></thead><tbody>{body}</tbody></table>" + (
            f'<ul class="notes">{notes}</ul>' if notes else ""
        )

    def _repr_html_(self) -> str:
        return f"<h4>{html.escape(self.title)}</h4>{self.to_html()}"


def explain(graph: Graph, *, notes: Iterable[str] = ()) -> Report:
    """What was decided for every site of ``graph``.

    Args:
        graph: after the passes; of a graph as traced, the report says what the user's program holds.
        notes: remarks and warnings of the passes.
    """
    sites: list[Sample] = graph.of(Sample)
    summary = {"objective": objective_text(graph)}
    if graph.costs:
        texts = [f"{cost.label} {cost.type}" + (f" ({cost.loc})" if cost.loc else "") for cost in graph.costs.values()]
        summary["costs"] = ", ".join(_shortened(texts))
    summary |= _plans(graph)
    summary["sites"] = str(len(sites))
    summary["samples"] = str(graph.samples)
    rows = tuple(_row(graph, site) for site in sites)
    title = f"{graph.name}: minimises {objective_text(graph)}"
    return Report(title, summary, rows, _contexts(graph, sites), tuple(notes))


def _contexts(graph: Graph, sites: list[Sample]) -> dict[str, str]:
    """Of the first scored sites: those of a long chain are all alike."""
    scored = [site.name for site in sites if isinstance(site.estimator, ScoreEstimator) and site.credits]
    if not scored:
        return {}
    values = random_values(graph)
    found = {name: str(contexts(graph, name, values)) for name in scored[:_CONTEXTS]}
    return found if len(scored) <= _CONTEXTS else {**found, "…": f"{len(scored) - _CONTEXTS} more"}


def _plans(graph: Graph) -> dict[str, str]:
    """How the finite sites are summed over, where they are."""
    if not any(isinstance(site.estimator, EnumeratingEstimator) for site in graph.of(Sample)):
        return {}
    rows = enumerated_rows(graph)
    facts = {}
    for node in graph.of(Marginal):
        plan = elimination_plan(graph, node, {site.node: rows[site.node] for site in node.sites})
        facts[f"{node.name} ({node.loc})" if node.loc else node.name] = str(plan)
    facts["enumeration"] = str(meeting(graph, rows))
    return facts


def _row(graph: Graph, site: Sample) -> Row:
    costs = [
        f"{graph.costs[cost].label} ({edge.label})" for (name, cost), edge in graph.credit.items() if name == site.name
    ]
    estimator: Estimator | None = site.estimator
    rows = "all outcomes" if isinstance(estimator, EnumeratingEstimator) else f"{_rows(graph, site):,}"
    return Row(
        site=site.name,
        distribution=graph.sites[site.name].distribution,
        shape=str(site.type),
        estimator=", ".join(estimator_texts(graph, site)) or "—",
        why=site.reason or "—",
        costs=", ".join(_shortened(costs)) or "none",
        biased="—" if estimator is None else "no" if estimator.unbiased else _label(estimator),
        rows=rows if estimator else "—",
        where=site.loc or "—",
    )


def _label(estimator: Estimator) -> str:
    return "BIASED" + (f": {'; '.join(estimator.biases)}" if estimator.biases else "")


def _shortened(names: list[str]) -> list[str]:
    """The first, the last and how many, of a long list."""
    return names if len(names) <= _MOST_COSTS else [*names[:2], f"… {names[-1]}", f"{len(names)} in all"]


def estimator_texts(graph: Graph, site: Sample) -> list[str]:
    """The name of a site's estimator and of its baseline; "data" of a draw without gradient; else nothing."""
    if site.data:
        return ["data"]
    estimator: Estimator | None = site.estimator
    if isinstance(estimator, ScoreFunction):
        baseline = estimator.resolve(_draws(graph, site)).name
        return [estimator.name, *([baseline] if baseline not in ("", "none") else [])]
    return [estimator.name] if estimator is not None else []


def _rows(graph: Graph, site: Sample) -> int:
    """How often what lies below the site is evaluated a step."""
    if not site.evaluations:
        return _draws(graph, site)
    return site.evaluations * (graph.samples if SAMPLES in own_dims(site, graph.samples) else 1)


def _draws(graph: Graph, site: Sample) -> int:
    """How often the site itself is drawn; a replayed one is not."""
    sizes = {SAMPLES: graph.samples, site.name: (site.estimator.samples if site.estimator is not None else None) or 1}
    return math.prod(sizes[dim] for dim in own_dims(site, graph.samples))


def objective_text(graph: Graph) -> str:
    """``E[loss], linear in nll, kl``: the objective's variable or name and its costs' labels, long lists cut short."""
    labels = list(dict.fromkeys(cost.label for cost in graph.costs.values()))
    if len(labels) > 6:
        labels = [*labels[:4], "…", labels[-1]]
    node = graph[graph.objective]
    name = node.label if isinstance(node, Cost) else node.variable or node.name
    return f"E[{name}]" + (f", linear in {', '.join(labels)}" if labels and graph.tail else "")

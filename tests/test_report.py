"""explain(): one row a site, as text, Markdown and HTML."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch
from torch import nn
from torch.distributions import Bernoulli, Normal

import scg
from scg.estimators.reparam import Reparam
from scg.ir import Ref, Sample
from scg.report import TITLES, explain
from tests import graphs


def test_text_of_a_vae() -> None:
    lines = str(explain(graphs.vae(), notes=["%x is stopped at vae.py:3"])).splitlines()
    assert lines[:6] == [
        "VAE: minimises E[loss], linear in nll, kl",
        "  objective  E[loss], linear in nll, kl",
        "  costs      nll f32[128] (vae.py:11), kl f32[128, 32] (vae.py:12)",
        "  sites      1",
        "  samples    4",
        "",
    ]
    head, rule, first, second, _, title, context, _, note = lines[6:]
    starts = [match.start() for match in re.finditer("─+", rule)]
    assert [_cell(head, starts, i) for i in range(9)] == list(dataclasses.astuple(TITLES))
    assert [_cell(first, starts, i) for i in range(9)] == [
        "z", "Bernoulli", "f32[K | 128, 32]", "score_function, leave_one_out", "support 2^32 is too large to sum;",
        "nll (tied 0), kl (tied 0, tied 1)", "no", "4", "vae.py:10",
    ]  # fmt: skip
    assert second.split() == ["leave-one-out", "over", "K"]
    assert [title, context] == ["sufficient contexts", "  z  baseline {x}; critic {x, z}"]
    assert note == "! %x is stopped at vae.py:3"


def _cell(line: str, starts: list[int], i: int) -> str:
    return line[starts[i] : starts[i + 1] if i + 1 < len(starts) else None].strip()


def test_rows_of_a_policy() -> None:
    rows = {row.site: row for row in explain(graphs.policy(3)).rows}
    assert rows["a_1"].costs == "cost_1 (tied 0), cost_2 (tied 0)"
    assert (rows["a_1"].rows, rows["a_2"].rows) == ("2", "all outcomes")


def test_sites_without_an_estimator() -> None:
    graph = graphs.vae()
    site = graph["z"]
    assert isinstance(site, Sample)
    (row,) = explain(graph.replace(dataclasses.replace(site, estimator=None, data=True), credit={})).rows
    assert (row.estimator, row.costs, row.biased, row.rows) == ("data", "none", "—", "—")


def test_a_replayed_site_has_one_row() -> None:
    graph = graphs.vae()
    site = graph["z"]
    assert isinstance(site, Sample)
    (row,) = explain(graph.replace(dataclasses.replace(site, value=Ref("x")))).rows
    assert (row.estimator, row.rows) == ("score_function, moving_average", "1")


def test_a_biased_estimator_is_labelled() -> None:
    class Straight(Reparam):
        name = "straight"
        unbiased = False

    graph = graphs.vae()
    site = graph["z"]
    assert isinstance(site, Sample)
    (row,) = explain(graph.replace(dataclasses.replace(site, estimator=Straight()))).rows
    assert row.biased == "BIASED"


def test_markdown_is_one_table_and_escapes() -> None:
    lines = explain(graphs.hostile(), notes=["a < b"]).to_markdown().splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert len(table) == 3
    assert len({line.replace("\\|", "").count("|") for line in table}) == 1
    assert "<script>" not in "\n".join(lines)
    assert "\\|" in explain(graphs.vae()).to_markdown()
    assert lines[-1] == "> a &lt; b"


def test_html_escapes() -> None:
    html = explain(graphs.hostile(), notes=["</li>"])._repr_html_()
    assert "<script>" not in html
    assert "&lt;script&gt;" in html
    assert html.count("<li>") == html.count("</li>") == 1


@pytest.mark.parametrize(
    ("estimator", "rows"),
    [
        ("score_function", "2"),
        ("local_expectation", "8"),
        ("disarm", "4"),
        ("arms", "8"),
        ("enumerate", "all outcomes"),
    ],
)
def test_rows_count_what_the_estimator_evaluates(estimator: str, rows: str) -> None:
    """Of two draws of three bits that meet in one cost."""
    theta = nn.Parameter(torch.zeros(3))
    compiled = scg.compile(
        lambda: Bernoulli(logits=theta).sample().sum() ** 2, estimator=estimator, samples=2, example_inputs=()
    )
    assert compiled.explain().rows[0].rows == rows


def test_closed_forms_to_be_had_are_named() -> None:
    loc = nn.Parameter(torch.zeros(3))

    def loss(sampled: bool) -> torch.Tensor:
        q, p = Normal(loc, 1.0), Normal(torch.zeros(3), 1.0)
        z = scg.sample(q, "z")
        return (torch.tanh(z) if sampled else q.log_prob(z) - p.log_prob(z)).sum()

    notes = [scg.compile(loss, example_inputs=(sampled,)).explain().notes for sampled in (True, False)]
    assert notes[0] == () and len(notes[1]) == 1
    assert notes[1][0].startswith("closed_forms=True would take the closed form over %z: kl_divergence")
    assert not scg.compile(loss, example_inputs=(True,), closed_forms={"z": False}).explain().notes

"""Formulas as MathML: everything that our formulas are written in is known, and what comes out is well formed."""

from __future__ import annotations

import xml.etree.ElementTree as ET

import pytest

import scg
from scg.backends.latex import formula
from scg.backends.mathml import mathml, unknown
from tests import graphs


def shape(latex: str) -> str:
    """Element names and texts of the MathML, without attributes: ``(mfrac (mn 1) (mn 2))``."""

    def of(element: ET.Element) -> str:
        inside = [of(child) for child in element] or [element.text or ""]
        return f"({element.tag} {' '.join(inside)})"

    return of(ET.fromstring(mathml(latex)))


@pytest.mark.parametrize(
    ("latex", "expected"),
    [
        (r"\tfrac12", "(math (mfrac (mn 1) (mn 2)))"),
        (r"z_{-i}^2", "(math (msubsup (mi z) (mrow (mo −) (mi i)) (mn 2)))"),
        (r"\sum_{v \in S} p", "(math (mrow (munder (mo ∑) (mrow (mi v) (mo ∈) (mi S))) (mi p)))"),
        (r"P_\mathrm{top}", "(math (msub (mi P) (mtext top)))"),
        (r"\text{leave\_one\_out}", "(math (mtext leave_one_out))"),
        (r"\hat g_{z}", "(math (msub (mover (mi g) (mo ^)) (mi z)))"),
        (r"\mathcal{L}(\theta)", "(math (mrow (mi ℒ) (mo () (mi θ) (mo ))))"),
        (r"\{1..3\}", "(math (mrow (mo {) (mn 1) (mo .) (mo .) (mn 3) (mo })))"),
    ],
)
def test_shapes(latex: str, expected: str) -> None:
    assert shape(latex) == expected


@pytest.mark.parametrize("name", scg.ESTIMATORS)
def test_every_estimators_formula(name: str) -> None:
    latex = scg.ESTIMATORS[name].formula
    assert not unknown(latex)
    ET.fromstring(mathml(latex))


@pytest.mark.parametrize("make", [graphs.vae, graphs.belief_net, graphs.policy, graphs.hostile])
def test_formulas_of_programs(make: object) -> None:
    found = formula(make())  # type: ignore[operator]
    for latex in [found.objective, *found.costs, *found.sites, *found.gradients, found.surrogate]:
        assert not unknown(latex), latex
        ET.fromstring(mathml(latex))


def test_names_are_escaped() -> None:
    assert "<script>" not in mathml(r"\mathit{<script>alert(1)</script>}") + mathml("<script>")

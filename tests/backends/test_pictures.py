"""Pictures: what is drawn, in every format, with every name escaped."""

from __future__ import annotations

import json
import re
import sys
import xml.etree.ElementTree as ET
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from torch.distributions import Bernoulli

from scg.backends.dot import PALETTE, to_dot
from scg.backends.html import page
from scg.backends.layout import lay_out
from scg.backends.pictures import SUFFIXES, inline_svg, render
from scg.backends.views import VIEWS, Box, Picture, picture
from scg.errors import ScgError
from scg.ir import Graph
from tests import graphs

SVG = "{http://www.w3.org/2000/svg}"
EXAMPLES: dict[str, Callable[[], Graph]] = {
    "vae": graphs.vae,
    "belief_net": graphs.belief_net,
    "policy": graphs.policy,
    "hostile": graphs.hostile,
}


def titles(drawn: Picture) -> dict[str, str]:
    return {box.id: "".join(text for text, _ in box.lines[0]) for box in drawn.boxes}


def arrows(drawn: Picture, kind: str) -> set[tuple[str, str]]:
    names = titles(drawn)
    return {(names[arrow.tail], names[arrow.head]) for arrow in drawn.arrows if arrow.kind == kind}


def box(drawn: Picture, title: str) -> Box:
    return next(b for b in drawn.boxes if titles(drawn)[b.id] == title)


def text(b: Box) -> list[str]:
    return ["".join(piece for piece, _ in line) for line in b.lines]


def test_stochastic_view_of_a_vae() -> None:
    drawn = picture(graphs.vae())
    kinds = {titles(drawn)[b.id]: b.kind for b in drawn.boxes}
    assert kinds == {
        "x": "value", "prior_logits": "value", "enc": "block", "dec": "block",
        "z ~ Bernoulli": "site", "nll": "cost", "kl": "cost",
    }  # fmt: skip
    assert arrows(drawn, "data") == {
        ("x", "enc"), ("enc", "z ~ Bernoulli"), ("z ~ Bernoulli", "dec"), ("dec", "nll"), ("x", "nll"),
        ("z ~ Bernoulli", "kl"), ("enc", "kl"), ("prior_logits", "kl"),
    }  # fmt: skip
    assert arrows(drawn, "credit") == {("nll", "z ~ Bernoulli"), ("kl", "z ~ Bernoulli")}
    assert text(box(drawn, "enc")) == ["enc", "linear · tanh · linear", "f32[128, 32]", "θ 163k"]
    assert text(box(drawn, "z ~ Bernoulli")) == ["z ~ Bernoulli", "f32[K | 128, 32]", "score_function", "leave_one_out"]
    assert "vae.py:10" in box(drawn, "z ~ Bernoulli").tooltip
    assert {arrow.label for arrow in drawn.arrows} == {"", "tied 0", "tied 0, tied 1"}


def test_a_module_called_at_every_step_is_a_box_each() -> None:
    drawn = picture(graphs.policy(3))
    assert sum(title == "pi" for title in titles(drawn).values()) == 3
    assert sum(b.kind == "opaque" for b in drawn.boxes) == 3


def test_parameters_prepared_in_the_distribution_line_belong_to_the_site() -> None:
    m = graphs.Maker("f", "f.py")
    x = m.input("x", 3)
    far = m.op("far", torch.ops.aten.exp.default, x, shape=(3,), scope="experts.1", line=1)
    near = m.op("near", torch.ops.aten.neg.default, far, shape=(3,), line=2)
    z = m.sample("z", m.dist("d", Bernoulli(torch.ones(3)), near, line=2), (3,), 2)
    drawn = picture(m.graph(m.op("total", torch.ops.aten.sum.default, z, line=3), [], {}))
    assert arrows(drawn, "data") == {("x", "experts.1"), ("experts.1", "z ~ Bernoulli"), ("z ~ Bernoulli", "objective")}


def test_many_credit_edges_become_a_line_in_each_site() -> None:
    drawn = picture(graphs.policy(8))
    assert not arrows(drawn, "credit")
    assert text(box(drawn, "a_1 ~ Categorical"))[-1] == "⇠ cost_1 … cost_7 (7)"
    assert len(arrows(picture(graphs.policy(8), "credit"), "credit")) == 36


@pytest.mark.parametrize("name", ["vae", "belief_net", "policy"])
def test_boxes_show_no_influence_that_is_not_there(name: str) -> None:
    """A path between two sites, or from a site to a cost, is in the picture exactly if it is in the graph."""
    graph = EXAMPLES[name]()
    drawn = picture(graph)
    home = {member: b.id for b in drawn.boxes for member in b.members}
    below: dict[str, set[str]] = {b.id: set() for b in drawn.boxes}
    for arrow in drawn.arrows:
        if arrow.kind == "data":
            below[arrow.tail].add(arrow.head)

    def reach(start: str) -> set[str]:
        seen: set[str] = set()
        stack = [start]
        while stack:
            for head in below[stack.pop()] - seen:
                seen.add(head)
                stack.append(head)
        return seen

    ends = [*graph.sites, *graph.costs]
    for site in graph.sites:
        assert home[site] not in reach(home[site]), "the boxes form a cycle"
        true = {end for end in ends if end in graph.descendants([site]) and end != site}
        assert {end for end in ends if home[end] in reach(home[site])} == true


def test_a_graph_as_traced_ends_in_its_objective() -> None:
    m = graphs.Maker("f", "f.py")
    x = m.input("x", 3)
    y = m.op("y", torch.ops.aten.exp.default, x, shape=(3,), line=2)
    graph = m.graph(m.op("total", torch.ops.aten.sum.default, y, line=3), [], {})
    drawn = picture(graph)
    assert titles(drawn) == {"n0": "x", "n1": "objective"}
    assert drawn.boxes[1].kind == "cost"


def test_dataflow_view_has_every_node_in_its_module() -> None:
    graph = graphs.vae()
    drawn = picture(graph, "dataflow")
    assert [b.members for b in drawn.boxes] == [(name,) for name in graph.nodes]
    where = {b.members[0]: b.cluster for b in drawn.boxes}
    assert where["enc_0_weight"] == ("enc", "0")
    assert where["h"] == ("enc", "1")
    assert where["z"] == ()


def test_unknown_view_and_suffix(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="known: stochastic, dataflow, credit"):
        picture(graphs.vae(), "pretty")
    with pytest.raises(ValueError, match=r"must be one of \.svg"):
        render(graphs.vae(), tmp_path / "graph.docx")


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_format(tmp_path: Path, suffix: str) -> None:
    target = render(graphs.vae(), tmp_path / f"graph{suffix}")
    starts = {".svg": b"<svg", ".png": b"\x89PNG", ".pdf": b"%PDF", ".html": b"<!doctype html>", ".dot": b"digraph"}
    assert target.read_bytes().startswith(starts[suffix])


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("name", EXAMPLES)
def test_svg_is_well_formed_and_says_where_things_come_from(name: str, view: str) -> None:
    graph = EXAMPLES[name]()
    root = ET.fromstring(inline_svg(graph, view))
    assert root.get("class") == "scg"
    groups = [group for group in root.iter(f"{SVG}g") if group.get("data-id")]
    nodes = {group.get("data-id"): group for group in groups if "node" in group.get("class", "")}
    drawn = picture(graph, view)
    for b in drawn.boxes:
        assert nodes[b.id].findtext(f"{SVG}title") == b.tooltip
        shown = [
            "".join(line.itertext()).replace("\N{NO-BREAK SPACE}", " ") for line in nodes[b.id].findall(f"{SVG}text")
        ]
        assert shown == text(b)
    edges = [str(group.findtext(f"{SVG}title")) for group in groups if "edge" in group.get("class", "")]
    assert sorted(edges) == sorted(arrow.tooltip for arrow in drawn.arrows)
    assert not [element for element in root.iter() if element.tag in (f"{SVG}a", f"{SVG}script") or element.get("id")]


def test_labels_do_not_overlap() -> None:
    """No two boxes of the drawing touch, and every line of text stays inside its box's height."""
    root = ET.fromstring(inline_svg(graphs.belief_net()))
    frames = []
    for group in root.iter(f"{SVG}g"):
        shape = group.find(f"{SVG}ellipse")
        if "node" not in group.get("class", "") or shape is None:
            continue
        x, y, rx, ry = (float(shape.get(key, 0)) for key in ("cx", "cy", "rx", "ry"))
        frames.append((x - rx, y - ry, x + rx, y + ry))
        assert all(y - ry < float(line.get("y", 0)) < y + ry for line in group.findall(f"{SVG}text"))
    assert len(frames) == 2
    (_, _, _, bottom), (_, top, _, _) = sorted(frames, key=lambda frame: frame[1])
    assert bottom < top


def test_each_colour_has_one_role() -> None:
    """The dark style sheet swaps colours by value, so that two roles must not share one."""
    light = [pair[0] for pair in PALETTE.values()]
    assert len(set(light)) == len(light)
    used = set(re.findall(r"#[0-9a-f]{6}", to_dot(picture(graphs.policy(), "dataflow"))))
    assert used <= set(light)


class _Scripts(HTMLParser):
    """Collects what a browser would run or load."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.data = ""
        self._in_data = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [str(value) for key, value in attrs if key in ("src", "href", "xlink:href")]
        self._in_data = ("id", "data") in attrs

    def handle_data(self, data: str) -> None:
        if self._in_data:
            self.data += data


@pytest.mark.parametrize("name", EXAMPLES)
def test_page_is_self_contained_and_escaped(name: str) -> None:
    graph = EXAMPLES[name]()
    html = page(graph, code="x = '</pre></script><img src=x onerror=alert(1)>'")
    parser = _Scripts()
    parser.feed(html)
    assert parser.tags.count("script") == 2
    assert "img" not in parser.tags
    assert not parser.links
    assert "@@" not in html
    data = json.loads(parser.data)
    assert set(data["boxes"]) == set(VIEWS)
    assert set(data["sites"]) == set(graph.sites)


def test_page_opens_at_the_view_asked_for() -> None:
    parser = _Scripts()
    parser.feed(page(graphs.vae(), "dataflow"))
    assert json.loads(parser.data)["view"] == "dataflow"


def test_without_any_graphviz_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.setitem(sys.modules, "pygraphviz", None)
    with pytest.raises(ScgError, match="pip install pygraphviz"):
        lay_out("digraph {}", "svg")


def test_a_graph_shows_itself_in_a_notebook() -> None:
    assert graphs.vae()._repr_html_().startswith("<svg")


def test_a_long_chain_is_drawn_in_seconds() -> None:
    drawn = picture(graphs.policy(100))
    assert sum(b.kind == "site" for b in drawn.boxes) == 100


def test_pictures_of_graphs_do_not_change_them() -> None:
    graph: Graph = graphs.vae()
    before = str(graph)
    picture(graph)
    assert str(graph) == before

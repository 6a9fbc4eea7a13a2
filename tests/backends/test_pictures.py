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

import scg
from scg.backends.boxes import Arrow, Box, Picture
from scg.backends.dot import PALETTE, to_dot
from scg.backends.dropped import dropped
from scg.backends.html import UNFOLDED, page
from scg.backends.layout import lay_out, svg
from scg.backends.pictures import SUFFIXES, inline_svg, render
from scg.backends.shares import VarianceShares
from scg.backends.stages import Stage, changes
from scg.backends.views import picture
from scg.errors import ScgError
from scg.ir import Graph
from tests import graphs

SVG = "{http://www.w3.org/2000/svg}"
VIEWS = ("stochastic", "dataflow", "credit")
"""Those of a graph alone."""
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


def test_a_box_takes_several_parameters_over() -> None:
    layer, w = torch.nn.MultiheadAttention(4, 2), torch.nn.Parameter(torch.zeros(2, 2, 4))

    def loss() -> torch.Tensor:
        z = Bernoulli(logits=w).sample()
        return layer(z, z, z, need_weights=False)[0].square().mean()

    drawn = titles(picture(scg.trace(loss)))
    assert not any("in_proj" in title for title in drawn.values()), "parameters of a box are counted in it"


def test_many_credit_edges_become_a_line_in_each_site() -> None:
    drawn = picture(graphs.policy(8), fold=False)
    assert not arrows(drawn, "credit")
    assert text(box(drawn, "a_1 ~ Categorical"))[-1] == "⇠ cost_1 … cost_7 (7)"
    assert len(arrows(picture(graphs.policy(8), "credit", fold=False), "credit")) == 36


@pytest.mark.parametrize("name", ["vae", "belief_net", "policy"])
def test_boxes_show_no_influence_that_is_not_there(name: str) -> None:
    """A path between two sites, or from a site to a cost, is in the picture exactly if it is in the graph."""
    graph = EXAMPLES[name]()
    drawn = picture(graph, fold=False)
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


def test_every_call_of_a_module_has_a_frame() -> None:
    """Of modules that are called again on what came of them; their parameters stand with the first call, or each."""
    for steps, frames in ((3, ["pi", "pi ·2", "pi ·3"]), (8, ["pi", *(f"pi ·{n}" for n in range(2, 9))])):
        drawn = picture(graphs.policy(steps), "dataflow", fold=False)
        assert [b.cluster[0] for b in drawn.boxes if b.title == "linear"] == frames
        weights = [b.cluster for b in drawn.boxes if b.title == "pi.weight"]
        assert weights == ([("pi",)] if steps == 3 else [(frame,) for frame in frames])


def test_an_arrow_back_keeps_off_the_one_it_answers() -> None:
    """What the next step reads of this one leaves its box at the side where an arrow comes in from there."""
    boxes = tuple(Box(id, "block", ((("text", "plain"),),), "", (id,)) for id in "abc")
    arrows = (
        Arrow("a", "b", "data", ""),
        Arrow("b", "a", "data", "", again=True),
        Arrow("c", "a", "data", "", again=True),
    )
    lines = to_dot(Picture("", "", boxes, arrows)).splitlines()
    assert [line.split(" [")[0].strip() for line in lines if "tailport=e headport=e" in line] == ["b -> a"]


def test_unknown_view_and_suffix(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="known: stochastic, dataflow, credit, passes, variance"):
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
        assert shown == text(b) + ([f"×{b.count}"] if b.count > 1 and f"×{b.count}" not in b.cluster else [])
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
    views = {view.removesuffix(UNFOLDED) for view in {*data["boxes"], *data["packed"]}}
    assert views == set(VIEWS)
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
    drawn = picture(graphs.policy(100), fold=False)
    assert sum(b.kind == "site" for b in drawn.boxes) == 100


def test_pictures_of_graphs_do_not_change_them() -> None:
    graph: Graph = graphs.vae()
    before = str(graph)
    picture(graph)
    assert str(graph) == before


# -- folding ----------------------------------------------------------------------------------------------------------
def test_steps_of_a_loop_are_drawn_once() -> None:
    drawn = picture(graphs.policy(8))
    counts = {b.title: b.count for b in drawn.boxes}
    assert counts == {
        "s": 1, "pi": 8, "a_t ~ Categorical": 8, "reward": 8, "cost_t": 8, "add": 7,
    }  # fmt: skip
    assert {b.cluster for b in drawn.boxes if b.count > 1} == {("×8",)}
    assert text(box(drawn, "a_t ~ Categorical"))[2] == "score_function ×7, enumerate ×1"
    (credit,) = [arrow for arrow in drawn.arrows if arrow.kind == "credit"]
    assert credit.label == "tied 0 · own step and later"
    assert {(titles(drawn)[a.tail], titles(drawn)[a.head]) for a in drawn.arrows if a.again} == {
        ("a_t ~ Categorical", "add"), ("add", "add"),
    }  # fmt: skip


@pytest.mark.parametrize("view", VIEWS)
def test_folding_keeps_every_node_and_every_arrow(view: str) -> None:
    graph = graphs.policy(6)
    whole, folded = picture(graph, view, fold=False), picture(graph, view)
    assert sorted(name for b in folded.boxes for name in b.members) == sorted(
        name for b in {b.members: b for b in whole.boxes}.values() for name in b.members
    )
    home = {name: b.id for b in folded.boxes for name in b.members}
    place = {b.id: b.members[0] for b in whole.boxes}
    kept = {(a.tail, a.head, a.kind) for a in folded.arrows}
    for arrow in whole.arrows:
        assert (home[place[arrow.tail]], home[place[arrow.head]], arrow.kind) in kept


def test_three_alike_are_not_folded() -> None:
    assert not picture(graphs.policy(3)).folded


def test_two_sites_a_step_stay_two() -> None:
    m = graphs.Maker("f", "f.py")
    x, total = m.input("x", 3), []
    for t in range(5):
        for name in ("z", "w"):
            z = m.sample(f"{name}_{t}", m.dist(f"d{name}{t}", Bernoulli(torch.ones(3)), x, line=2), (3,), 2)
            total += [m.op(f"a_{name}_{t}", torch.ops.aten.exp.default, z, shape=(3,), line=3)]
    drawn = picture(m.graph(m.op("sum", torch.ops.aten.stack.default, total, line=4), [], {}), "dataflow")
    counts = [(b.title, b.count) for b in drawn.boxes if b.count > 1 and b.kind == "site"]
    assert counts == [("z_t ~ Bernoulli", 5), ("w_t ~ Bernoulli", 5)]


# -- what was not credited, passes, variance --------------------------------------------------------------------------
def test_dropped_edges_say_why() -> None:
    drawn = picture(graphs.belief_net(), "credit")
    missing = {(titles(drawn)[a.tail], titles(drawn)[a.head]): a.label for a in drawn.arrows if a.kind == "dropped"}
    assert missing == {("nll", "z2 ~ Bernoulli"): "not downstream"}
    assert "does not teach" in next(a.tooltip for a in drawn.arrows if a.kind == "dropped")


def test_stopped_paths_are_told_from_missing_ones() -> None:
    mu = torch.nn.Parameter(torch.zeros(3))

    def loss() -> torch.Tensor:
        z = torch.distributions.Normal(mu, 1.0).rsample()
        y = torch.distributions.Normal(mu, 1.0).rsample()
        far = scg.cost((z.detach() ** 2).sum(), "far")
        return far + scg.cost((y * z).sum(), "near")

    graph = scg.compile(loss, example_inputs=()).graph
    assert dropped(graph) == {("z", "far"): "only stopped paths", ("y", "far"): "not downstream"}


def test_passes_side_by_side() -> None:
    theta = torch.nn.Parameter(torch.zeros(3))
    compiled = scg.compile(lambda: Bernoulli(logits=theta).sample().sum() * 2, example_inputs=())
    assert compiled._latest is not None
    history = [Stage(name, graph) for name, graph in compiled._latest.history]
    drawn = picture(compiled.graph, "passes", history=history)
    frames = list(dict.fromkeys(b.cluster[0].split()[0] for b in drawn.boxes))
    assert frames[0] == "traced" and frames[-1] == "insert_estimators"
    marks = {(b.cluster[0].split()[0], b.mark): b.title for b in drawn.boxes if b.mark}
    assert "Bernoulli" in marks["insert_estimators", "changed"]
    assert ("split_costs", "new") in marks
    assert {box.kind for box in drawn.boxes if not box.lines} == {"anchor"}
    for before, after in zip(history, history[1:], strict=False):
        (change,) = changes([before, after])
        assert set(change.new) == set(after.graph.nodes) - set(before.graph.nodes)
        assert set(change.gone) == set(before.graph.nodes) - set(after.graph.nodes)
    assert ET.fromstring(svg(drawn)).get("class") == "scg"
    with pytest.raises(ValueError, match="call render of a compiled module"):
        picture(compiled.graph, "passes")


def test_variance_shares_colour_sites_and_edges() -> None:
    shares = VarianceShares({("z", "nll"): 0.75, ("z", "kl"): 0.005}, note="1,000 draws")
    drawn = picture(graphs.vae(), "variance", shares=shares)
    assert box(drawn, "z ~ Bernoulli").share == pytest.approx(0.755)
    assert {a.share for a in drawn.arrows if a.kind == "credit"} == {0.75, 0.005}
    dot = to_dot(drawn)
    assert PALETTE["share 4"][0] in dot and "75 %" in dot and "0.5 % · tied 0" in dot and "1,000 draws" in dot
    assert "15–35 %" in dot, "the legend tells the colours"
    with pytest.raises(ValueError, match="site 'y', which VAE does not have"):
        picture(graphs.vae(), "variance", shares=VarianceShares({("y", "nll"): 1.0}))
    with pytest.raises(ValueError, match="needs measurements"):
        picture(graphs.vae(), "variance")


def test_shares_of_folded_steps_add_up() -> None:
    shares = VarianceShares({("a_1", "cost_1"): 0.2, ("a_2", "cost_2"): 0.3})
    drawn = picture(graphs.policy(8), "variance", shares=shares)
    assert box(drawn, "a_t ~ Categorical").share == pytest.approx(0.5)


def _contrast(one: str, other: str) -> float:
    """Ratio of the luminances of two colours (WCAG 2)."""

    def luminance(colour: str) -> float:
        channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted([luminance(one), luminance(other)])
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_text_stands_out_in_light_and_dark(theme: int) -> None:
    colour = {role: pair[theme] for role, pair in PALETTE.items()}
    areas = ["page", "site", "block", "opaque", "cost", "cluster", *(f"share {i}" for i in range(5))]
    assert all(_contrast(colour["ink"], colour[area]) > 4.5 for area in areas)
    assert all(_contrast(colour["muted"], colour[area]) > 4.0 for area in ("page", "site", "block", "cost", "cluster"))
    levels = [_contrast(colour[f"share {i}"], colour["page"]) for i in range(5)]
    assert levels == sorted(levels), "shares are told by lightness, which every eye sees"

"""The HTML report in a real browser: it loads without network or errors, finds, shows and unfolds."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from examples.gallery import compiled
from scg.backends.html import page
from scg.backends.shares import VarianceShares
from tests import browser, graphs

PROGRAM = browser.find()
pytestmark = pytest.mark.skipif(PROGRAM is None, reason=f"no headless browser: none of {', '.join(browser.NAMES)}")
SHOTS = os.environ.get("SCG_SCREENSHOTS")
"""A folder for screenshots of what the tests look at."""


@pytest.fixture(scope="module")
def chromium() -> Iterator[browser.Browser]:
    assert PROGRAM is not None
    with browser.Browser(PROGRAM) as opened:
        yield opened


@pytest.fixture(autouse=True)
def no_complaints(chromium: browser.Browser) -> Iterator[None]:
    chromium.errors.clear()
    chromium.requests.clear()
    yield
    assert chromium.errors == [] and chromium.requests == []


def shot(chromium: browser.Browser, name: str) -> None:
    if SHOTS:
        chromium.screenshot(Path(SHOTS) / f"{name}.png")


def text(chromium: browser.Browser, selector: str) -> str:
    found = chromium.value(f"document.querySelector({selector!r}).textContent")
    assert isinstance(found, str)
    return found


def shown(chromium: browser.Browser) -> str:
    """The view that can be seen; exactly one must be."""
    views = chromium.value("[...document.querySelectorAll('#canvas > svg:not([hidden])')].map(e => e.dataset.view)")
    assert len(views) == 1
    return str(views[0])


@pytest.fixture(scope="module")
def belief_net(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "net.html"
    shares = VarianceShares({("h1", "nll"): 0.5, ("h1", "kl2"): 0.1, ("h2", "kl2"): 0.25, ("h2", "kl1_1"): 0.004})
    compiled("belief_net").render(path, shares=shares)
    return path


def test_search_finds_a_site_and_shows_its_formula_and_code(chromium: browser.Browser, belief_net: Path) -> None:
    chromium.open(belief_net)
    shot(chromium, "opened")
    chromium.type("/h2\n")
    hits = int(text(chromium, "#hits").split()[0])
    assert hits >= 1
    for _ in range(hits):
        if "h2 ~" in text(chromium, "#details h2"):
            break
        chromium.type("\n")
    shot(chromium, "found")
    details = text(chromium, "#details")
    assert "score_function" in details and "gallery.py:" in details and "kl2 (tied 0, tied 1)" in details
    math = chromium.value("document.querySelector('#details math').getBoundingClientRect()")
    assert math is not None
    assert "∇" in text(chromium, "#details math") and "h2" in text(chromium, "#details .math").replace(" ", "")
    code = text(chromium, "#details pre.code")
    assert "torch.bernoulli" in code and "h2_term" in code and "h1_term" not in code


def test_click_follows_the_edges_and_marks_the_row_and_the_code(chromium: browser.Browser, belief_net: Path) -> None:
    chromium.open(belief_net)
    chromium.click(".node.site")
    assert "h1 ~ Bernoulli" in text(chromium, "#details h2")
    assert text(chromium, "#report tr.on td") == "h1"
    lines = chromium.value("[...document.querySelectorAll('#code span.on')].map(e => e.textContent)")
    assert any("torch.bernoulli" in line for line in lines) and any("h1_term" in line for line in lines)
    edges = chromium.value("document.querySelectorAll('svg.focus .edge.on').length")
    assert edges > 4
    chromium.value("document.dispatchEvent(new KeyboardEvent('keydown', {key: 'Escape', bubbles: true}))")
    assert chromium.value("document.querySelectorAll('svg.focus').length") == 0


def test_a_line_of_code_leads_to_its_node(chromium: browser.Browser, belief_net: Path) -> None:
    chromium.open(belief_net)
    chromium.value("[...document.querySelectorAll('#code span')].find(e => /h2_term_3 =/.test(e.textContent)).click()")
    assert "h2 ~ Bernoulli" in text(chromium, "#details h2")


def test_every_view_is_drawn_light_and_dark(chromium: browser.Browser, belief_net: Path) -> None:
    chromium.open(belief_net)
    for view in ("dataflow", "credit", "passes", "variance", "stochastic"):
        chromium.click(f"#views [data-view={view}]")
        assert shown(chromium) == view
        assert chromium.value("document.querySelectorAll('#canvas > svg:not([hidden]) .node').length") > 3
        shot(chromium, view)
    page = "getComputedStyle(document.body).backgroundColor"
    light = chromium.value(page)
    chromium.dark()
    assert chromium.value(page) != light
    fill = "getComputedStyle(document.querySelector('.node.site ellipse')).fill"
    dark = chromium.value(fill)
    shot(chromium, "dark")
    chromium.dark(False)
    assert chromium.value(fill) != dark


def test_repeated_steps_unfold(chromium: browser.Browser, tmp_path: Path) -> None:
    path = tmp_path / "policy.html"
    path.write_text(page(graphs.policy(8)))
    chromium.open(path)
    assert chromium.value("document.querySelectorAll('#canvas > svg:not([hidden]) .node.site').length") == 1
    chromium.click(".node.site")
    assert len(chromium.value("[...document.querySelectorAll('#details .chips button')].map(e => e.textContent)")) == 8
    chromium.click("#details .chips button:nth-child(3)")
    assert text(chromium, "#report tr.on td") == "a_2"
    chromium.click("#fold")
    assert shown(chromium) == "stochastic-unfolded"
    assert chromium.value("document.querySelectorAll('#canvas > svg:not([hidden]) .node.site').length") == 8
    shot(chromium, "unfolded")
    chromium.click("#fold")
    assert shown(chromium) == "stochastic"


def test_hostile_names_do_nothing(chromium: browser.Browser, tmp_path: Path) -> None:
    path = tmp_path / "hostile.html"
    path.write_text(page(graphs.hostile(), code="x = '</pre></script><img src=x onerror=alert(1)>'"))
    chromium.open(path)
    chromium.click(".node.site")
    assert '<script>alert("1")</script>' in text(chromium, "#details h2")
    assert chromium.value("document.querySelectorAll('script').length") == 2
    assert chromium.value("document.querySelectorAll('img').length") == 0


def processor_time() -> float:
    """Seconds of this process and of those that it waited for; the load of others adds nothing to them."""
    return sum(os.times()[:4])


@pytest.mark.slow
def test_a_thousand_nodes_open_fast(chromium: browser.Browser, tmp_path: Path) -> None:
    graph = graphs.policy(125)
    assert len(graph) >= 1000
    path = tmp_path / "large.html"
    start = processor_time()
    path.write_text(page(graph, "dataflow", code=str(graph), fold=False))
    assert processor_time() - start < 20
    assert path.stat().st_size < 2_000_000
    drawn = "document.querySelectorAll('#canvas > svg:not([hidden]) .node').length"
    opened = f"new Promise(done => (function look() {{ {drawn} ? done({drawn}) : requestAnimationFrame(look); }})())"
    chromium.call("Performance.enable")
    seconds = []
    for _ in range(3):
        start, used = time.perf_counter(), chromium.metric("ThreadTime")
        chromium.open(path)
        assert chromium.value(opened) >= 1000
        chromium.settle()
        seconds.append(time.perf_counter() - start)
        assert chromium.metric("ThreadTime") - used < 2.0
    others = max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))  # programs for each processor; on an idle machine 1
    assert min(seconds) < 2.0 * others


def words(chromium: browser.Browser) -> int:
    """How many boxes of the open view have words that are laid out."""
    shown = "[...document.querySelectorAll('#canvas > svg:not([hidden]) .node > text')]"
    return int(chromium.value(f"{shown}.filter(e => e.getBoundingClientRect().width).length"))


@pytest.mark.slow
def test_words_of_a_large_picture_come_with_the_zoom(chromium: browser.Browser, tmp_path: Path) -> None:
    path = tmp_path / "large.html"
    path.write_text(page(graphs.policy(30), "dataflow", fold=False))
    chromium.open(path)
    assert words(chromium) == 0
    chromium.type("/a_20\n")
    chromium.value("for (let i = 0; i < 12; i++) zoomMiddle(0.8)")
    chromium.settle()
    near = words(chromium)
    assert 0 < near < 200
    assert chromium.value("nodeOf(boxOf('a_20')).querySelector('text').getBoundingClientRect().width") > 20
    shot(chromium, "near")
    chromium.click("#zoom button:last-child")
    assert words(chromium) == 0

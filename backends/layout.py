"""DOT text to SVG, PNG or PDF, by ``dot`` where it is installed, else by the graphviz that pygraphviz carries."""

from __future__ import annotations

import re
import shutil
import subprocess
import xml.etree.ElementTree as ET

from scg.backends.boxes import Picture
from scg.backends.dot import FONT, PALETTE, to_dot
from scg.errors import ScgError

_SVG = "http://www.w3.org/2000/svg"
_DIGITS = re.compile(r"(\.\d)\d+")
"""A tenth of a point is as fine as anyone can see."""
_SPACE = "{http://www.w3.org/XML/1998/namespace}space"


def lay_out(dot: str, format: str) -> bytes:
    """``dot`` drawn as ``png``, ``pdf`` or graphviz's own ``svg``."""
    resolution = "-Gdpi=160" if format == "png" else ""
    if program := shutil.which("dot"):
        command = [program, f"-T{format}", *filter(None, [resolution])]
        done = subprocess.run(command, input=dot.encode(), capture_output=True, check=False)
        if done.returncode:
            raise ScgError(f"graphviz could not draw the graph: {done.stderr.decode().strip()}")
        return done.stdout
    try:
        import pygraphviz
    except ImportError as error:
        raise ScgError(f"a {format} picture needs graphviz: pip install pygraphviz, or write a .dot file") from error
    with pygraphviz.AGraph(string=dot) as graph:
        drawn: bytes = graph.draw(format=format, prog="dot", args=resolution)
    return drawn


def svg(picture: Picture) -> str:
    """``picture`` as an SVG element that stands alone or inside a page: tooltips, no ids, light and dark colours."""
    root = ET.fromstring(lay_out(to_dot(picture), "svg"))
    tooltips = {box.id: box.tooltip for box in picture.boxes}
    tooltips |= {f"e{i}": arrow.tooltip for i, arrow in enumerate(picture.arrows)}
    ET.register_namespace("", _SVG)
    for group in list(root.iter(f"{{{_SVG}}}g")):
        kinds = group.get("class", "").split()
        if "node" in kinds or "edge" in kinds:
            _native_tooltip(group, tooltips[group.attrib["id"]])
        elif (title := group.find(f"{{{_SVG}}}title")) is not None:
            group.remove(title)
        if "node" in kinds:
            _centre(group)
    for element in root.iter():
        element.attrib.pop("id", None)  # several pictures may stand in one page
        element.attrib.pop("font-family", None)  # said once for all below
        for place in ("d", "points"):
            if place in element.attrib:
                element.set(place, _DIGITS.sub(r"\1", element.attrib[place]))
    label = f"{picture.title}, {picture.caption}"
    root.attrib |= {"class": "scg", "role": "img", "aria-label": label, "font-family": FONT}
    style = ET.Element(f"{{{_SVG}}}style")
    style.text = _DARK
    root.insert(0, style)
    return ET.tostring(root, encoding="unicode")


def _native_tooltip(group: ET.Element, tooltip: str) -> None:
    """graphviz wraps shapes in links to carry tooltips; browsers and viewers show a ``title`` element instead.

    The ends of an edge, which graphviz writes there, become the attribute ``data-id``.
    """
    title = group.find(f"{{{_SVG}}}title")
    assert title is not None
    group.set("data-id", title.text or "")
    title.text = tooltip
    for wrapper in group.findall(f"{{{_SVG}}}g"):
        (link,) = wrapper
        group.remove(wrapper)
        group.extend(link)


def _centre(group: ET.Element) -> None:
    """Centres every line of a node's label on the node: graphviz places pieces by the widths of its own fonts."""
    shape = next((e for tag in ("ellipse", "polygon", "path") for e in group.iter(f"{{{_SVG}}}{tag}")), None)
    if shape is None:
        return
    numbers = re.findall(r"-?[\d.]+", shape.get("points") or shape.get("d") or "")
    xs = [float(x) for x in numbers[::2]] or [float(shape.get("cx", 0))]
    centre = f"{(min(xs) + max(xs)) / 2:.2f}"
    lines: dict[str, list[ET.Element]] = {}
    for text in group.findall(f"{{{_SVG}}}text"):
        lines.setdefault(text.get("y", ""), []).append(text)
        group.remove(text)
    for y, pieces in lines.items():
        line = ET.SubElement(
            group, f"{{{_SVG}}}text", {"x": centre, "y": y, "text-anchor": "middle", _SPACE: "preserve"}
        )
        for piece in pieces:
            style = {key: value for key, value in piece.attrib.items() if key not in ("x", "y", "text-anchor", _SPACE)}
            ET.SubElement(line, f"{{{_SVG}}}tspan", style).text = piece.text


_DARK = "\n".join(
    [
        ".scg{max-width:100%;max-height:100vh}",  # fits a screen
        ".scg .node,.scg .edge{cursor:default}",
        "@media (prefers-color-scheme:dark){",
        *(
            f'.scg [fill="{light}"]{{fill:{dark}}}.scg [stroke="{light}"]{{stroke:{dark}}}'
            for light, dark in PALETTE.values()
        ),
        "}",
    ]
)

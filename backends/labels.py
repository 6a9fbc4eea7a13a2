"""The text of a box: names, shapes, estimators, what a block computes, and the tooltip."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from scg.backends.boxes import Kind, Line, Style
from scg.ir import Cost, Dist, Expected, Graph, Input, LogProb, Node, Op, Opaque, Param, Sample, TensorType
from scg.report import estimator_texts

_MOVES = frozenset(
    "view reshape _unsafe_view expand expand_as unsqueeze squeeze t transpose permute detach alias clone contiguous "
    "getitem select slice to _to_copy lift_fresh_copy lift_fresh".split()
)
"""Operations that only move data: left out of a block's summary where others are there to name."""


def kind(graph: Graph, node: Node) -> Kind:
    if isinstance(node, Sample):
        return "site"
    if isinstance(node, Cost) or node.name == graph.objective:
        return "cost"
    if isinstance(node, Opaque):
        return "opaque"
    return "value" if isinstance(node, (Input, Param)) else "block"


def lines(graph: Graph, node: Node) -> tuple[Line, ...]:
    """The label of one node."""
    shape = [line(str(node.type), "small")] if isinstance(node.type, TensorType) else []
    if isinstance(node, Sample):
        verb = " = " if node.value is not None else " ~ "
        title: Line = ((short(node.name), "title"), (verb + graph.sites[node.name].distribution, "plain"))
        styles: tuple[Style, Style] = ("accent", "small")
        badge = [line(text, style) for text, style in zip(estimator_texts(graph, node), styles, strict=False)]
        biased = node.estimator is not None and not node.estimator.unbiased
        return (title, *shape, *badge, *([line("biased", "warn")] if biased else []))
    if isinstance(node, Cost):
        return (line(node.label, "title"), *shape)
    if node.name == graph.objective:
        return (line("objective", "title"), *shape)
    if isinstance(node, (Input, Param)):
        return (line(node.path, "plain"), *shape)
    if isinstance(node, Opaque):
        return (line(node.fn.__qualname__.rpartition(".")[2], "title"), line("opaque", "small"), *shape)
    return (line(action(graph, node), "plain"), *shape)


def params_lines(nodes: list[Node]) -> tuple[Line, ...]:
    names = [node.path for node in nodes if isinstance(node, Param)]
    if len(names) == 1:
        return (line(names[0], "plain"), line(str(nodes[0].type), "small"))
    return (line(", ".join(at_most(names, 3)), "plain"), line(f"θ {count(nodes)}", "small"))


def count(params: Sequence[Node]) -> str:
    """How many numbers: ``7,850``, ``51k``, ``124M``."""
    total = sum(math.prod(node.tensor.shape) for node in params)
    for unit, scale in (("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if total >= 10 * scale:
            return f"{total / scale:,.0f}{unit}"
    return f"{total:,}"


def action(graph: Graph, node: Node) -> str:
    """What a deterministic node does, without overload names."""
    if isinstance(node, LogProb):
        dist = graph[node.dist]
        return f"{dist.template.family}.log_prob" if isinstance(dist, Dist) else "log_prob"
    if isinstance(node, Expected):
        families = (str(dist.template.family) for dist in map(graph.__getitem__, node.dists) if isinstance(dist, Dist))
        return f"{node.form_name}({', '.join(families)})"
    if isinstance(node, Dist):
        return node.template.family
    if isinstance(node, Op):
        return node.op_name.partition(".")[0] if "<" not in node.op_name else node.op_name
    return node.kind


def summary(graph: Graph, nodes: list[Node]) -> str:
    """``linear · relu · linear`` of a block; data movement only where there is nothing else."""
    verbs = [action(graph, node) for node in nodes if not isinstance(node, Param)]
    named = [verb for verb in verbs if verb not in _MOVES] or verbs
    runs = [verb for verb, _ in itertools.groupby(named)]
    if len(runs) > 4:
        return f"{' · '.join([runs[0], '…', runs[-1]])} ({len(verbs)} ops)"
    return " · ".join(runs)


def tooltip(graph: Graph, nodes: list[Node]) -> str:
    """The nodes' text form with source lines; of a site, why its estimator was chosen."""
    last = nodes[-1]
    if isinstance(last, Sample):
        dist = graph[last.dist]
        texts = [f"{last.name} ~ {dist.describe()}", f"shape {last.type}"]
        chosen = ", ".join(estimator_texts(graph, last)) or "no estimator"
        texts.append(f"{chosen}: {last.reason}" if last.reason else chosen)
        texts += [f"credited costs: {', '.join(last.credits)}"] if last.credits else []
        return printable("\n".join([*texts, last.loc])).strip()
    return "\n".join(at_most([value_text(node) for node in nodes], 14))


def value_text(node: Node) -> str:
    return " ".join(
        short(part, 90) for part in (str(node).partition("  # ")[0], f"({node.loc})" if node.loc else "") if part
    )


def line(text: str, style: Style) -> Line:
    return ((short(text), style),)


def short(text: str, limit: int = 44) -> str:
    """``text`` without control characters, its middle left out when it is long."""
    clean = printable(text)
    return clean if len(clean) <= limit else f"{clean[: limit * 2 // 3]}…{clean[-(limit // 3) :]}"


def printable(text: str) -> str:
    """``text`` with spaces for characters that no format can hold; line ends are kept."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() or char == "\n" else " " for char in text)


def at_most(texts: list[str], limit: int) -> list[str]:
    return texts if len(texts) <= limit else [*texts[: limit - 1], f"… and {len(texts) - limit + 1} more"]

"""Checks of the captured program that rewrite nothing: gradients no estimator sees, estimators written by hand."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Collection, Mapping

from scg.analysis.smoothness import unseen_gradients
from scg.errors import BiasWarning, TraceError
from scg.ir import Graph, LogProb, Node, Op, Param, Ref, Sample
from scg.operations import packet_name

_PRODUCTS = {"mul", "multiply"}
_CARRIES = {"neg", "sum", "mean", "mul", "div", "view", "reshape", "unsqueeze", "squeeze", "expand", "add", "sub"}
"""Operations through which a log-probability is still one factor of a product, or a summand of it."""

_MANY_TERMS = 8
"""Sums of more are not taken apart: a straight-through estimator has three."""


def check_gradients(graph: Graph, allow_biased: bool | None = None) -> Graph:
    """Refuses jumps that a parameter moves and random numbers average over; notes what looks like an estimator by hand.

    Raises:
        TraceError: for a gradient no estimator sees, unless ``allow_biased`` is True: then it warns and is noted.
    """
    notes = list(graph.notes)
    for fault in unseen_gradients(graph):
        if not allow_biased:
            raise TraceError(fault.text)
        notes.append(f"biased: {fault.text.splitlines()[0]}")
        warnings.warn(fault.text, BiasWarning, stacklevel=2)
    for text in (*_surrogates(graph), *_straight_through(graph)):
        notes.append(text)
        warnings.warn(text, BiasWarning, stacklevel=2)
    return dataclasses.replace(graph, notes=tuple(notes))


def _surrogates(graph: Graph) -> list[str]:
    """Products of a site's own log-probability with a consequence of that site that has no gradient."""
    found = []
    own = [node for node in graph.of(LogProb) if _is_own(graph, node)]
    for log_prob in own:
        below = graph.descendants([log_prob.value])
        for product in _products(graph, log_prob.name):
            if any(_is_reward(graph, ref, log_prob, below) for ref in product.inputs):
                found.append(
                    f"%{product.name} ({product.loc}) multiplies the log-probability of %{log_prob.value} by a "
                    f"consequence of it that has no gradient, as a hand-written surrogate loss does: return the cost "
                    f"itself, scg adds the estimator"
                )
    return list(dict.fromkeys(found))


def _is_reward(graph: Graph, ref: str, log_prob: LogProb, below: Collection[str]) -> bool:
    """A consequence of the draw that is detached somewhere, or reaches neither a parameter nor another density."""
    if log_prob.name in graph.ancestors([ref]):
        return False
    follows = other = False
    stack, seen = [ref], {ref}
    while stack:
        name = stack.pop()
        node = graph[name]
        if isinstance(node, Op) and packet_name(node.target) == "detach" and name in below:
            return True
        follows |= name == log_prob.value
        other |= isinstance(node, LogProb) or isinstance(node, Param) and node.requires_grad
        if not isinstance(node, Sample):
            stack.extend(above for above in node.inputs if above not in seen)
            seen.update(node.inputs)
    drawn = graph[log_prob.value]
    return follows and not other and isinstance(drawn, Sample) and drawn.method == "sample"


def _is_own(graph: Graph, node: LogProb) -> bool:
    value = graph[node.value]
    return isinstance(value, Sample) and value.dist == node.dist and value.value is None and not value.data


def _products(graph: Graph, name: str) -> list[Op]:
    found, stack, seen = [], [name], {name}
    while stack:
        for user in graph.users[stack.pop()]:
            node = graph[user]
            if user in seen or not isinstance(node, Op) or packet_name(node.target) not in _CARRIES:
                continue
            seen.add(user)
            stack.append(user)
            if packet_name(node.target) in _PRODUCTS:
                found.append(node)
    return found


def _straight_through(graph: Graph) -> list[str]:
    """Sums of a draw and of what its distribution is made from, which enters the gradient and not the value.

    z + p - p.detach(),   (z - p).detach() + p
    """
    found = []
    sums: dict[str, dict[tuple[str, bool], float]] = {}
    for node in graph:
        terms = _terms(node, sums)
        if terms is None:
            continue
        sums[node.name] = terms
        for (name, detached), count in terms.items():
            if detached or count == 0 or terms.get((name, True), 0.0) != -count:
                continue
            above, own = graph.ancestors([node.name]), graph.ancestors([name])
            for site in graph.of(Sample):
                if site.data or site.value is not None or site.name in own or site.name not in above:
                    continue
                shared = own & graph.ancestors([site.dist])
                if any(isinstance(graph[leaf], Param) for leaf in shared):
                    found.append(
                        f"%{node.name} ({node.loc}) gives the draw %{site.name} the gradient of %{name}, as a "
                        "straight-through estimator by hand does, and scg adds one of its own: use the draw as it is, "
                        "with estimator='straight_through', or draw it under torch.no_grad() to keep yours"
                    )
    return list(dict.fromkeys(found))


def _terms(node: Node, sums: Mapping[str, Mapping[tuple[str, bool], float]]) -> dict[tuple[str, bool], float] | None:
    """What a node is a sum of, how often, and which of it is detached; None where it is no sum."""
    if not isinstance(node, Op) or node.kwargs or not node.args or not isinstance(node.args[0], Ref):
        return None

    def of(operand: object) -> Mapping[tuple[str, bool], float]:
        return sums.get(operand, {(operand, False): 1.0}) if isinstance(operand, Ref) else {}

    name = packet_name(node.target)
    if name == "detach":
        total: dict[tuple[str, bool], float] = {}
        for (base, _), count in of(node.args[0]).items():
            total[base, True] = total.get((base, True), 0.0) + count
        return total
    if name == "neg":
        return {term: -count for term, count in of(node.args[0]).items()}
    if name not in ("add", "sub"):
        return None
    total = dict(of(node.args[0]))
    for term, count in of(node.args[1]).items():
        total[term] = total.get(term, 0.0) + (count if name == "add" else -count)
    return total if len(total) <= _MANY_TERMS else None

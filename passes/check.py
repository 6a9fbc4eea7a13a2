"""Checks of the captured program that rewrite nothing: gradients no estimator sees, hand-written surrogates."""

from __future__ import annotations

import dataclasses
import warnings

from scg.analysis.smoothness import unseen_gradients
from scg.errors import BiasWarning, TraceError
from scg.ir import Graph, LogProb, Op, Sample
from scg.operations import packet_name

_PRODUCTS = {"mul", "multiply"}
_CARRIES = {"neg", "sum", "mean", "mul", "div", "view", "reshape", "unsqueeze", "squeeze", "expand", "add", "sub"}
"""Operations through which a log-probability is still one factor of a product, or a summand of it."""


def check_gradients(graph: Graph, allow_biased: bool | None = None) -> Graph:
    """Refuses jumps that a parameter moves and random numbers average over; notes products that look like surrogates.

    Raises:
        TraceError: for a gradient no estimator sees, unless ``allow_biased`` is True: then it warns and is noted.
    """
    notes = list(graph.notes)
    for fault in unseen_gradients(graph):
        if not allow_biased:
            raise TraceError(fault.text)
        notes.append(f"biased: {fault.text.splitlines()[0]}")
        warnings.warn(fault.text, BiasWarning, stacklevel=2)
    for text in _surrogates(graph):
        notes.append(text)
        warnings.warn(text, BiasWarning, stacklevel=2)
    return dataclasses.replace(graph, notes=tuple(notes))


def _surrogates(graph: Graph) -> list[str]:
    """Products of a site's own log-probability with a detached consequence of that site."""
    found = []
    own = [node for node in graph.of(LogProb) if _is_own(graph, node)]
    for log_prob in own:
        below = graph.descendants([log_prob.value])
        for product in _products(graph, log_prob.name):
            for ref in product.inputs:
                detached = any(
                    isinstance(above := graph[name], Op) and packet_name(above.target) == "detach" and name in below
                    for name in graph.ancestors([ref])
                )
                if detached and log_prob.name not in graph.ancestors([ref]):
                    found.append(
                        f"%{product.name} ({product.loc}) multiplies the log-probability of %{log_prob.value} by a "
                        f"detached consequence of it, as a hand-written surrogate loss does: return the cost itself, "
                        f"scg adds the estimator"
                    )
    return list(dict.fromkeys(found))


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

"""The invariants of a graph, checked between passes: a failure is a fault of scg, not of the user's.

scg.errors.VerifyError: after share: %y (op f32[3], model.py:7) reads %t, which no earlier node defines
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from scg.errors import VerifyError
from scg.ir import (
    Cost,
    Depends,
    Dist,
    Expected,
    Graph,
    Input,
    LogProb,
    Node,
    Op,
    Param,
    Ref,
    Sample,
    TensorType,
    refs_in,
)

Fault = tuple[Node | None, str]
"""A node (None: the graph as a whole) and what is wrong with it."""

WINDOW = 10
"""Lines of the graph shown on each side of the faulty one."""


def verify(graph: Graph, after: str) -> Graph:
    """Raises `VerifyError` at the first broken invariant, with the lines around it; returns ``graph``.

    Args:
        graph: what the pass returned.
        after: the name of that pass, ``trace`` for the capture itself, which alone may hold in-place writes.
    """
    for invariant in _INVARIANTS:
        for node, what in invariant(graph):
            raise _error(graph, after, node, what)
    if after != "trace":
        for node, what in _functional(graph):
            raise _error(graph, after, node, what)
    return graph


def is_effect(graph: Graph, node: Node) -> bool:
    """Whether ``node`` writes a new value into one of the user's buffers: ``copy_(%buffer, %new)``."""
    if not isinstance(node, Op) or node.op_name != "copy_":
        return False
    written = graph.nodes.get(node.args[0])
    return isinstance(written, Param) and written.role == "buffer"


# -- invariants: what is true of every graph -------------------------------------------------------------------------


def _names_agree(graph: Graph) -> Iterator[Fault]:
    for name, node in graph.nodes.items():
        if name != node.name:
            yield node, f"is filed under the name %{name}"


def _defined_before_use(graph: Graph) -> Iterator[Fault]:
    defined: set[str] = set()
    for node in graph:
        for ref in node.inputs:
            if ref not in defined:
                yield node, f"reads {ref!r}, which no earlier node defines"
        defined.add(node.name)
    for ref in (graph.objective, *refs_in(graph.outputs)):
        if ref not in defined:
            yield None, f"returns {ref!r}, which no node defines"


def _objective_is_scalar(graph: Graph) -> Iterator[Fault]:
    node = graph[graph.objective]
    if not isinstance(node.type, TensorType) or node.type.shape != ():
        yield node, "is the objective, but no scalar"


def _distributions_are_used_as_such(graph: Graph) -> Iterator[Fault]:
    for node in graph:
        wants = _distributions(node)
        for want in wants:
            if not isinstance(graph[want], Dist):
                yield node, f"needs a distribution, but {want!r} is a {graph[want].kind}"
        for ref in node.inputs:
            if ref not in wants and isinstance(graph[ref], Dist):
                yield node, f"reads the distribution {ref!r} as a tensor"


def _distributions(node: Node) -> tuple[Ref, ...]:
    """What ``node`` must find to be distributions."""
    if isinstance(node, Expected):
        return node.dists
    return (node.dist,) if isinstance(node, (Sample, LogProb)) else ()


def _samples_match_distributions(graph: Graph) -> Iterator[Fault]:
    for node in graph.of(Sample):
        template = graph[node.dist].template  # type: ignore[attr-defined]
        shape = (*node.sample_shape, *template.batch_shape, *template.event_shape)
        if node.tensor.event_ndim != len(template.event_shape):
            yield node, f"has {node.tensor.event_ndim} event dims, {node.dist!r} has {len(template.event_shape)}"
        if node.value is None and node.tensor.shape != shape:
            yield node, f"has shape {list(node.tensor.shape)}, but {node.dist!r} draws {list(shape)}"


def _getitem_of_tuples(graph: Graph) -> Iterator[Fault]:
    for node in graph.of(Op):
        if node.op_name == "getitem":
            source, index = node.args
            outputs = graph[source].type
            if not isinstance(outputs, tuple) or not -len(outputs) <= index < len(outputs):
                yield node, f"takes output {index} of {source!r}, which has none such"


def _params_have_tensors(graph: Graph) -> Iterator[Fault]:
    for node in graph.of(Param):
        tensor = graph.tensors.get(node.path)
        if tensor is None:
            yield node, f"stands for {node.path}, but the graph has no such tensor"
        elif (tuple(tensor.shape), tensor.dtype) != (node.tensor.shape, node.tensor.dtype):
            yield node, f"stands for {node.path}, a tensor {tensor.dtype}{list(tensor.shape)}"


def _depends_on_sites(graph: Graph) -> Iterator[Fault]:
    for node in graph.of(Depends):
        if not isinstance(graph[node.on], Sample):
            yield node, f"declares an influence of {node.on!r}, which is no site"


def _tail_exists(graph: Graph) -> Iterator[Fault]:
    for name in sorted(graph.tail - graph.nodes.keys()):
        yield None, f"names %{name} as part of the linear tail, but has no such node"


def _credits_exist(graph: Graph) -> Iterator[Fault]:
    labels = {cost.label for cost in graph.of(Cost)}
    for node in graph.of(Sample):
        for label in node.credits:
            if label not in labels:
                yield node, f"is credited with {label!r}, which is no cost"


def _learns(graph: Graph, site: Sample) -> bool:
    """Whether a gradient is asked for upstream of the site: exogenous noise needs no estimator."""
    above = map(graph.__getitem__, graph.ancestors([site.dist]))
    return any(node.requires_grad for node in above if isinstance(node, (Input, Param)))


def _credited_sites_reach_estimators(graph: Graph) -> Iterator[Fault]:
    sites = graph.of(Sample)
    if any(node.estimator is not None for node in sites):
        for node in sites:
            if node.credits and node.estimator is None and not node.data and _learns(graph, node):
                yield node, "is credited with costs but has no estimator"


_INVARIANTS: tuple[Callable[[Graph], Iterator[Fault]], ...] = (
    _names_agree,
    _defined_before_use,
    _objective_is_scalar,
    _distributions_are_used_as_such,
    _samples_match_distributions,
    _getitem_of_tuples,
    _params_have_tensors,
    _depends_on_sites,
    _tail_exists,
    _credits_exist,
    _credited_sites_reach_estimators,
)


def _functional(graph: Graph) -> Iterator[Fault]:
    """No in-place write is left but those into the user's buffers."""
    for node in graph.of(Op):
        schema: Any = getattr(node.target, "_schema", None)
        if schema is not None and schema.is_mutable and not is_effect(graph, node):
            yield node, f"writes in place ({node.op_name})"


def _error(graph: Graph, after: str, node: Node | None, what: str) -> VerifyError:
    if node is None:
        error = VerifyError(f"after {after}: the graph {what}")
        error.add_note(str(graph))
        return error
    shown = f"{node.kind} {node.type}" if isinstance(node.type, TensorType) else node.kind
    error = VerifyError(f"after {after}: %{node.name} ({', '.join(filter(None, (shown, node.loc)))}) {what}")
    lines = str(graph).splitlines()
    at = list(graph.nodes.values()).index(node) + 1  # the first line is the graph's own
    error.add_note("\n".join(lines[max(0, at - WINDOW) : at + WINDOW + 1]))
    return error

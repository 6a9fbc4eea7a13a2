"""Which sample dims a site brings in, and how many rows its exact enumeration needs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from scg.analysis.influence import Influence, influence
from scg.analysis.support import finite_support
from scg.estimators.base import EnumeratingEstimator, RowEstimator, ScoreEstimator
from scg.ir import Cost, Depends, Dist, Graph, Marginal, Opaque, Sample

SAMPLES = "K"
"""Name of the sample dim of ``samples=K``."""


def enumeration_rows(graph: Graph, found: Influence, site: Sample, support: int) -> int:
    """Rows that exact enumeration of ``site`` needs: support size to the power of its joined elements."""
    joined = joined_dims(graph, found, site)
    shape = site.tensor.shape
    return int(support ** math.prod(shape[dim] for dim in joined))


def enumerated_rows(graph: Graph) -> dict[str, int]:
    """How many rows each enumerated site has."""
    sites = [site for site in graph.of(Sample) if _enumerated(site)]
    if not sites:
        return {}
    found = influence(graph, [node.name for node in graph.of(Sample)])
    rows = {}
    for site in sites:
        dist = graph[site.dist]
        assert isinstance(dist, Dist)
        support = finite_support(graph, dist)
        assert support is not None
        rows[site.name] = enumeration_rows(graph, found, site, len(support))
    return rows


@dataclass(frozen=True)
class Meeting:
    """How many outcomes of enumerated sites stand side by side."""

    rows: int
    """Most at the value of any node: what the program is evaluated at."""
    table: int
    """Most in any table of joint probabilities."""
    node: str
    """Where the most rows meet."""

    def __str__(self) -> str:
        where = f" at %{self.node}" if self.node else ""
        return f"at most {self.rows:,} rows meet{where}, tables of up to {self.table:,} joint probabilities"


def meeting(graph: Graph, rows: Mapping[str, int]) -> Meeting:
    """The rows and tables that exact enumeration needs, sites before the last ones summed out first.

    A value carries the sites it is computed from, and an enumerated value just its own: its parameters stand in its
    probabilities. So a chain of T sites of k outcomes has k rows everywhere, and T tables of k^2.

    Args:
        graph: with credit assigned.
        rows: of each site that is enumerated.
    """
    order = {site: index for index, site in enumerate(node.name for node in graph if node.name in rows)}
    values: dict[str, frozenset[str]] = {}
    parents: dict[str, frozenset[str]] = {}

    def count(names: Iterable[str]) -> int:
        return math.prod(rows[name] for name in names)

    most, where = 1, ""
    for node in graph:
        carried: frozenset[str] = frozenset().union(*(values[ref] for ref in node.inputs))
        if isinstance(node, Marginal):
            carried -= {str(site.node) for site in node.sites}
        if node.name in rows:
            parents[node.name], carried = carried, frozenset([node.name])
        values[node.name] = frozenset() if node.name in graph.tail else carried
        if (found := count(values[node.name])) > most:
            most, where = found, node.name
    table = 1
    stack = [values[node.name] for node in graph.of(Cost, Sample)]
    seen: set[frozenset[str]] = set()
    while stack:
        names = stack.pop()
        if names and names not in seen:
            seen.add(names)
            last = max(names, key=order.__getitem__)
            table = max(table, count(names | parents[last]))
            stack.append((names | parents[last]) - {last})
    return Meeting(most, table, where)


def joined_dims(graph: Graph, found: Influence, site: Sample) -> tuple[int, ...]:
    """Element dims of ``site`` of which some cost or inner site sees more than one index at once.

    Elements along the other dims may change in the same row: no cost element sees two of them.
    """
    ndim = site.tensor.ndim - site.tensor.event_ndim
    wide = {dim for dim in range(ndim) if site.tensor.shape[dim] > 1}
    coarse = isinstance(site.estimator, ScoreEstimator)
    summed = {str(other.node): axes for node in graph.of(Marginal) for other in node.sites for axes in [other.axes]}
    joined = {dim for dim in wide if site.name in summed and summed[site.name][dim] is None}
    for node in graph.of(Cost, Sample):
        if joined == wide:
            break
        relation = found.relation(node.name, site.name)
        if node.name == site.name or relation is None:
            continue
        # an inner draw of which some elements see no element of this site could not say with which one it is weighted
        drawn = isinstance(node, Sample) and not _enumerated(node) and node.name not in summed
        if drawn and bool(relation.empty.any()):
            joined = wide
            break
        joined |= {dim for dim in wide - joined if not relation.pointlike(dim)}
        edge = graph.credit.get((site.name, node.name)) if coarse else None
        if edge is not None:  # coarse credit hands an element the costs of others too
            joined |= {dim for dim, mixed in enumerate(edge.mixed) if mixed and dim in wide}
    return tuple(sorted(joined))


def _enumerated(site: Sample) -> bool:
    return isinstance(site.estimator, EnumeratingEstimator)


def rerun_break(graph: Graph, site: Sample) -> str | None:
    """Why the program below ``site`` cannot be evaluated at other outcomes, with the place."""
    for name in graph.descendants([site.name]):
        node = graph[name]
        where = f" ({node.loc})" if node.loc else ""
        if isinstance(node, Opaque) and not node.pure:
            return f"below it, {node.fn.__qualname__}{where} is stateful (pure=False) and cannot be called again"
        if isinstance(node, Sample) and node.value is not None:
            return f"below it, %{name}{where} is replayed: its outcome would not follow another draw"
        if isinstance(node, Depends):
            return f"below it, %{name}{where} declares a value that does not follow another draw"
    return None


def own_dims(site: Sample, samples: int) -> tuple[str, ...]:
    """The sample dims that a site itself brings in."""
    if isinstance(site.estimator, EnumeratingEstimator):
        return (site.name,)
    if isinstance(site.estimator, RowEstimator):
        return ((SAMPLES,) if samples > 1 else ()) + (site.row_dim,)
    if site.value is not None:
        return ()
    own = (site.name,) if site.estimator is not None and (site.estimator.samples or 1) > 1 else ()
    return ((SAMPLES,) if samples > 1 else ()) + own

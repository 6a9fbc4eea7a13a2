"""Which sample dims a site brings in, and how many rows its exact enumeration needs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from scg.analysis.flops import bytes_text, flops, value_bytes
from scg.analysis.influence import Influence, influence
from scg.analysis.reach import Reach
from scg.analysis.support import site_support
from scg.estimators.base import EnumeratingEstimator, RowEstimator, ScoreEstimator
from scg.ir import Cost, Depends, Graph, Marginal, Opaque, Sample

SAMPLES = "K"
"""Name of the sample dim of ``samples=K``."""


def enumeration_rows(site: Sample, support: int, joined: Iterable[int]) -> int:
    """Rows that exact enumeration of ``site`` needs: support size to the power of its joined elements."""
    shape = site.tensor.shape
    return int(support ** math.prod(shape[dim] for dim in joined))


def enumerated_rows(graph: Graph) -> dict[str, int]:
    """How many rows each enumerated site has."""
    sites = [site for site in graph.of(Sample) if _enumerated(site)]
    if not sites:
        return {}
    joined = joined_dims(graph, influence(graph, [node.name for node in graph.of(Sample)]))
    rows = {}
    for site in sites:
        support = site_support(graph, site)
        assert support is not None
        rows[site.name] = enumeration_rows(site, len(support), joined[site.name])
    return rows


@dataclass(frozen=True)
class Meeting:
    """What stands side by side where enumerated sites meet, and what it costs."""

    rows: int
    """Most outcomes at the value of any node: what the program is evaluated at."""
    node: str
    """Where the most rows meet."""
    table: int
    """Most in any table of joint probabilities."""
    width: int
    """Sites in the table of the most sites, less one: the tree-width of the order."""
    flops: int
    """Of one evaluation forward, at all rows."""
    bytes: int
    """Of all values, at all rows."""

    def __str__(self) -> str:
        where = f" at %{self.node}" if self.node else ""
        return (
            f"at most {self.rows:,} rows meet{where}, tables of up to {self.table:,} joint probabilities, tree-width "
            f"{self.width}, {self.flops:,} FLOPs forward, {bytes_text(self.bytes)} of values"
        )


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
    most, where, work, size = 1, "", 0, 0
    for node in graph:
        carried: frozenset[str] = frozenset().union(*(values[ref] for ref in node.inputs))
        if isinstance(node, Marginal):
            carried -= {str(site.node) for site in node.sites}
        if node.name in rows:
            parents[node.name], carried = carried, frozenset([node.name])
        values[node.name] = frozenset() if node.name in graph.tail else carried
        count = math.prod(rows[name] for name in values[node.name])
        work += count * flops(graph, node)
        size += count * value_bytes(node)
        if count > most:
            most, where = count, node.name
    table, width = 1, 0
    stack = [values[node.name] for node in graph.of(Cost, Sample)]
    seen: set[frozenset[str]] = set()
    while stack:
        names = stack.pop()
        if names and names not in seen:
            seen.add(names)
            last = max(names, key=order.__getitem__)
            joint = names | parents[last]
            entries = math.prod(rows[name] for name in joint)
            table, width = max(table, entries), max(width, len(joint) - 1)
            work += 2 * entries
            stack.append(joint - {last})
    return Meeting(most, where, table, width, work, size)


def joined_dims(graph: Graph, found: Influence) -> dict[str, tuple[int, ...]]:
    """Of each site that ``found`` follows, the element dims of which some cost or draw sees several indices at once.

    Elements along the other dims may change in the same row: no cost element sees two of them.
    """
    summed = {str(other.node): other.axes for node in graph.of(Marginal) for other in node.sites}
    nodes = graph.of(Cost, Sample)
    drawn = [n.name for n in nodes if isinstance(n, Sample) and not _enumerated(n) and n.name not in summed]
    seen, drawn_from = found.relations(node.name for node in nodes), found.relations(drawn)
    mixed: dict[str, set[int]] = {}
    for (name, _), edge in graph.credit.items():
        mixed.setdefault(name, set()).update(dim for dim, word in enumerate(edge.mixed) if word)
    result = {}
    for site in (graph[name] for name in found.sources):
        ndim = site.tensor.ndim - site.tensor.event_ndim
        wide = {dim for dim in range(ndim) if site.tensor.shape[dim] > 1}
        joined = {dim for dim in wide if site.name in summed and summed[site.name][dim] is None}
        joined |= {dim for dim in wide if not all(relation.pointlike(dim) for relation in seen[site.name])}
        if isinstance(site, Sample) and isinstance(site.estimator, ScoreEstimator):
            # coarse credit hands an element the costs of others too
            joined |= wide & mixed.get(site.name, set())
        # a draw of which some elements see no element of this site could not say with which one it is weighted
        if any(bool(relation.empty.any()) for relation in drawn_from[site.name]):
            joined = wide
        result[site.name] = tuple(sorted(joined))
    return result


def _enumerated(site: Sample) -> bool:
    return isinstance(site.estimator, EnumeratingEstimator)


def rerun_breaks(graph: Graph) -> dict[str, str]:
    """Why the program below a site cannot be evaluated at other outcomes, with the place, for the sites where so."""
    reach = Reach(graph, [site.name for site in graph.of(Sample)])
    found: dict[str, str] = {}
    for node in graph.of(Opaque, Sample, Depends):
        where = f" ({node.loc})" if node.loc else ""
        if isinstance(node, Opaque) and not node.pure:
            reason = f"below it, {node.fn.__qualname__}{where} is stateful (pure=False) and cannot be called again"
        elif isinstance(node, Sample) and node.value is not None:
            reason = f"below it, %{node.name}{where} is replayed: its outcome would not follow another draw"
        elif isinstance(node, Depends):
            reason = f"below it, %{node.name}{where} declares a value that does not follow another draw"
        else:
            continue
        for name in reach.above([node.name]):
            found.setdefault(name, reason)
    return found


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

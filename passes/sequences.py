"""Sequences: which sites are drawn as one, and whether they can be.

before   %z   = sample  estimator=unordered_set      after   %z   = sample f32[z | ]  … sequence=z
         %z_1 = sample  estimator=unordered_set              %z_1 = sample f32[z | ]  … sequence=z
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator

from scg.analysis.influence import Influence
from scg.analysis.support import finite_support
from scg.errors import EstimatorError
from scg.estimators.base import EnumeratingEstimator, RowEstimator, SequenceEstimator
from scg.estimators.frames import Frame, frames
from scg.estimators.rows import SAMPLES
from scg.ir import Dist, Graph, Sample


def join_sequences(sites: Iterable[Sample]) -> list[Sample]:
    """The sites, those that share an estimator object which asks for sequences named after the first of them."""
    first: dict[int, str] = {}
    joined = []
    for site in sites:
        estimator = site.estimator
        if isinstance(estimator, SequenceEstimator) and estimator.joins_sites:
            name = first.setdefault(id(estimator), site.name)
            reason = site.reason if name == site.name else f"{site.reason}; in a sequence with %{name}"
            site = dataclasses.replace(site, sequence=name, reason=reason)
        joined.append(site)
    return joined


def check_sequences(graph: Graph, found: Influence) -> None:
    """Refuses what cannot be drawn in rows that are rearranged at every site.

    Args:
        graph: with estimators and sample dims.
        found: of all its sites.

    Raises:
        EstimatorError: with the sites that are in the way, and what to do.
    """
    for frame in frames(graph, found).values():
        for site in _sites(graph, frame):
            _check_between(graph, frame, site)
            _check_dims(graph, frame, site)
        _check_rows(graph, frame)


def _sites(graph: Graph, frame: Frame) -> Iterator[Sample]:
    for name in frame.sites:
        site = graph[name]
        assert isinstance(site, Sample)
        yield site


def _check_between(graph: Graph, frame: Frame, site: Sample) -> None:
    """No weighted rows of others between two sites: their weights would change as rows are rearranged."""
    below = graph.descendants([name for name in frame.sites if name != site.name])
    for name in graph.ancestors([site.dist]) & below:
        other = graph[name]
        if not isinstance(other, Sample) or other.name in frame.sites:
            continue
        several = isinstance(other.estimator, (EnumeratingEstimator, RowEstimator))
        if several or (other.estimator is not None and (other.estimator.samples or 1) > 1):
            raise _misfit(
                site,
                f"%{other.name} ({other.loc}), between %{frame.name} and %{site.name}, has rows of its own "
                f"({other.estimator.name!r})",
                f"Draw %{other.name} in the same sequence, or use 'score_function' for it",
            )


def _check_dims(graph: Graph, frame: Frame, site: Sample) -> None:
    """The rows are those of one beam: sample dims that one site brings, all must have."""
    have = {*graph[frame.name].tensor.sample}
    for dim in site.tensor.sample:
        if dim not in have and dim != SAMPLES:
            raise _misfit(
                site,
                f"%{site.name} has a row for each outcome of %{dim}, which %{frame.name}, the first site of its "
                "sequence, has not",
                f"Use 'score_function' for %{dim}, or another estimator object for %{site.name}",
            )


def _check_rows(graph: Graph, frame: Frame) -> None:
    outcomes = 1.0
    for site in _sites(graph, frame):
        dist = graph[site.dist]
        assert isinstance(dist, Dist)
        support = finite_support(graph, dist)
        assert support is not None
        outcomes *= math.exp(min(frame.lengths[site.name] * math.log(max(len(support), 1)), 700.0))
    first = graph[frame.name]
    assert isinstance(first, Sample) and isinstance(first.estimator, SequenceEstimator)
    if first.estimator.distinct and first.estimator.rows > round(outcomes):
        sites = ", ".join(f"%{name}" for name in frame.sites)
        raise _misfit(
            first,
            f"{first.estimator.rows} distinct outcomes were asked for, and {sites} have {round(outcomes)} together",
            f"Give samples={round(outcomes)} or fewer",
        )


def _misfit(site: Sample, why: str, way_out: str) -> EstimatorError:
    name = site.estimator.name
    return EstimatorError(f"%{site.name} ({site.loc}) cannot be drawn in a sequence by {name!r}: {why}.\n  {way_out}.")

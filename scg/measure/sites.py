"""Variants of a compiled module, and what may stand at its sites."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from scg.estimators import ESTIMATORS, Estimator
from scg.estimators.base import SiteInfo
from scg.estimators.score_function import ScoreFunction
from scg.measure.draws import original
from scg.passes import InsertEstimators, pipeline
from scg.pipeline import CompiledModule, trace

MOST_ROWS = 1024
"""Most rows of downstream costs that a candidate may need: beyond, it is too slow to be worth a try."""

BASELINES = ("none", "moving_average", "leave_one_out", "optimal_scale", "self_critic")
"""Those that need no training to be worth a try."""


def variant(compiled: CompiledModule, **changes: Any) -> CompiledModule:
    """The same model compiled with other options, sharing its parameters."""
    return CompiledModule(original(compiled), dataclasses.replace(compiled.options, **changes))


def candidates(compiled: CompiledModule, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, SiteInfo]:
    """What is known of every site that needs an estimator, by name."""
    options = compiled.options
    insert = InsertEstimators(allow_biased=options.allow_biased)
    graph = trace(original(compiled), *args, **kwargs)
    for name, rewrite in pipeline(insert, options.credit, options.closed_forms):
        if name == "insert_estimators":
            break
        graph = rewrite(graph)
    return insert.candidates(graph)


def every_estimator() -> Iterator[Estimator]:
    """One of each registered class, the score function once with each baseline that needs no training."""
    for cls in ESTIMATORS.values():
        if cls is ScoreFunction:
            yield from (ScoreFunction(baseline=name) for name in BASELINES)
        else:
            yield cls()


def misfit(estimator: Estimator, info: SiteInfo, samples: int) -> str:
    """Why ``estimator`` cannot stand at a site, or is too slow there; empty where it can."""
    fits = estimator.check(info)
    if not fits:
        return fits.reason
    if isinstance(estimator, ScoreFunction):
        baseline = estimator.resolve(samples)
        if samples < baseline.draws:
            return f"{baseline.name} needs two or more draws"
    rows = estimator.evaluations(info)
    return f"it needs {rows:.3g} rows, over {MOST_ROWS}" if rows > MOST_ROWS else ""


def label(estimator: Any) -> str:
    """The name of an estimator with the hyperparameters that are not the default.

    >>> label(ScoreFunction(baseline="leave_one_out"))
    'score_function(baseline=leave_one_out)'
    """
    if isinstance(estimator, type):
        return str(estimator.name) if issubclass(estimator, Estimator) else estimator.__name__
    if not isinstance(estimator, Estimator):
        return str(estimator)
    changed = []
    for field in dataclasses.fields(estimator):
        value = getattr(estimator, field.name)
        if value is not field.default:
            changed.append(f"{field.name}={getattr(value, 'name', value)}")
    return f"{estimator.name}({', '.join(changed)})" if changed else estimator.name

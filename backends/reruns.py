"""Evaluates what lies below a site once more, at rows of other outcomes, and nothing else."""

from __future__ import annotations

import copy
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from torch import Tensor

from scg.backends.batching import Batcher
from scg.backends.sample_dims import Batched, SampleDim, SampleDims, stop_gradient
from scg.estimators.base import Rerun, ScoreEstimator
from scg.ir import CreditEdge, Sample

if TYPE_CHECKING:
    from scg.backends.lowering import Interpreter


def rerun(run: Interpreter, site: Sample, dims: tuple[str, ...], values: Tensor, differentiable: bool) -> Rerun:
    """Evaluates the slice of ``run`` below ``site`` at rows of other outcomes.

    Args:
        run: where everything else is taken from, without gradient.
        site: whose outcomes are replaced.
        dims: sample dims of the draw.
        values: ``[R, *dims | *S]``.
        differentiable: also give a surrogate through which the gradient reaches ``values``.
    """
    run.reruns += 1
    row = SampleDim(f"{site.name}*{run.reruns}", values.shape[0], "counterfactual", site.name, -1 - run.reruns)
    rows = (row.name, *dims)
    edges = run.signals.credited(site)
    wanted = run.graph.ancestors(edge.cost for edge in edges) & run.graph.descendants([site.name])
    child = evaluated_again(run, site, SampleDims([*run.dims.table.values(), row]), Batched(values, rows), wanted)
    child.signals = child.make_signals(follows=differentiable)
    found = child.signals.of(site, rows)
    assert found is not None
    signal, scale = found
    if not differentiable:
        return Rerun(signal)
    child.expectation.forget()
    child.signals, child.contexts, child.memo = child.make_signals(), {}, {}
    return Rerun(signal, _total(child, edges, wanted, scale))


def as_drawn(run: Interpreter, site: Sample, dims: tuple[str, ...]) -> Rerun:
    """What a differentiable rerun at the draw itself would give, from the values of ``run``: one row.

    For a site whose draw is an independent variable of the program (`Interpreter.is_variable`).
    """
    child = copy.copy(run)
    child.expectation = run.expectation.beside(run.dims)
    child.contexts, child.memo, child.kept = {}, {}, dims
    child.signals = child.make_signals(follows=True)
    found = child.signals.of(site, dims)
    assert found is not None
    signal, scale = found
    total = _total(child, run.signals.credited(site), set(), scale)
    return Rerun(signal.unsqueeze(0), total.sum().reshape([1]))


def evaluated_again(
    run: Interpreter, site: Sample, dims: SampleDims, value: Batched, wanted: Collection[str]
) -> Interpreter:
    """A run of the nodes ``wanted`` below ``site`` at another value of it; all else is that of ``run``, detached."""
    below = run.graph.descendants([site.name])
    child = copy.copy(run)
    child.dims, child.batcher = dims, Batcher(dims)
    child.env = _Detached({name: found for name, found in run.env.items() if name not in below})
    child.params = {
        name: [child.env[ref] for ref in run.dist_node(name).params] for name in run.params if name not in below
    }
    child.before_transform = {name: stop_gradient(v) for name, v in run.before_transform.items() if name not in below}
    child.extras = dict(run.extras)
    child.expectation = run.expectation.beside(dims)
    child.contexts, child.memo = {}, {}
    child.rerunning, child.training, child.kept = True, False, value.dims
    child.env[site.name] = value
    for node in run.graph:
        if node.name in wanted and node.name != site.name:
            child.evaluate(node)
    return child


def _total(child: Interpreter, edges: list[CreditEdge], wanted: set[str], scale: float) -> Tensor:
    """Costs and inner terms of a rerun, summed over draws, with the gradient that reaches its rows.  ``[R]``"""
    total: Tensor | None = None
    for edge in edges:
        value = child.expectation(child.env[edge.cost], edge.cost, child.kept).tensor
        value = value if edge.share == 1.0 else value * edge.share
        coefficient = child.signals.coefficients[edge.cost]
        if coefficient.uniform is not None:
            part = _by_row(value) * (coefficient.uniform / scale)
        else:
            assert coefficient.tensor is not None
            part = _by_row(value * coefficient.tensor.detach()) / scale
        total = part if total is None else total + part
    assert total is not None
    for inner in reversed(child.graph.of(Sample)):
        if inner.name in wanted and isinstance(inner.estimator, ScoreEstimator) and child.learns(inner):
            for term in child.score_term(inner):
                total = total + _by_row(term.tensor) * (term.factor / scale)
    return total


def _by_row(tensor: Tensor) -> Tensor:
    """Sums ``[R, …]`` over all but its first dim."""
    return tensor.flatten(1).sum(1) if tensor.dim() > 1 else tensor


class _Detached(dict[str, Any]):
    """Values of a run seen from a rerun: each without its gradient."""

    def __getitem__(self, name: str) -> Any:
        value = super().__getitem__(name)
        if isinstance(value, Batched) and name not in self.__dict__.setdefault("own", set()):
            return stop_gradient(value)
        return value

    def __setitem__(self, name: str, value: Any) -> None:
        self.__dict__.setdefault("own", set()).add(name)
        super().__setitem__(name, value)

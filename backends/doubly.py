"""Gradients of a multi-sample bound that are weighed once more where they reach a draw."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from scg.analysis.bounds import tied_axes
from scg.backends import runtime
from scg.backends.credit_sums import credit_sum
from scg.backends.recorder import compile_time, record_call
from scg.backends.sample_dims import Batched
from scg.errors import EstimatorError
from scg.estimators.base import PathwiseEstimator
from scg.ir import Bound, CreditEdge, Sample

if TYPE_CHECKING:
    from scg.backends.lowering import Interpreter


def weigh_paths(run: Interpreter, node: Bound, bound: Tensor, value: Batched, axis: int) -> Tensor:
    """``bound``, with the gradient that reaches draws by way of it multiplied by their estimator's factor.

    Args:
        run: whose draws they are.
        node: the bound.
        bound: its value, without the dim of the draws.
        value: negative log weights.
        axis: of the draws in it.
    """
    share: Tensor | None = None
    for site in run.graph.of(Sample):
        relation = run.found.relation(node.name, site.name)
        if relation is None or not _is_weighed(site):
            continue
        assert isinstance(site.estimator, PathwiseEstimator)
        if share is None:
            share = torch.softmax(-(1.0 - node.alpha) * value.tensor.detach(), axis)
        factor = site.estimator.bound_factor(share, node.alpha)
        draw = run.before_transform.get(site.name, run.env[site.name])
        if set(value.dims) != set(draw.dims):
            extra = ", ".join(name for name in value.dims if name not in draw.dims)
            raise EstimatorError(
                f"%{site.name} ({site.loc}): {site.estimator.name!r} cannot tell the weights apart in which it meets "
                f"the draws that {extra} has of its own; use 'reparam', or samples=K of scg.compile for all"
            )
        elements = site.tensor.shape[: site.tensor.ndim - site.tensor.event_ndim]
        with compile_time():
            axes = tuple(tied_axes(relation, len(elements)))
        mixed = tuple(tied is None for tied in axes)
        placed = credit_sum(factor, len(value.dims), CreditEdge(site.name, "", axes, mixed, ()), elements)
        placed = placed.reshape([*placed.shape, *[1] * (draw.tensor.dim() - placed.dim())])
        bound = record_call(_WEIGH_PATH, bound, draw.tensor, placed)
    return bound


def beside_bound(run: Interpreter, ref: str, value: Tensor) -> Tensor:
    """An output beside the objective; differentiated through a draw whose gradients are weighed, it is an error."""
    if not run.learning or not run.bounds or not value.requires_grad:
        return value
    above = run.graph.ancestors([ref])
    for site in run.graph.of(Sample):
        if site.name in above and _is_weighed(site):
            return record_call(RefuseGradient(site.name, site.loc), value)  # type: ignore[no-any-return]
    return value


def _is_weighed(site: Sample) -> bool:
    return isinstance(site.estimator, PathwiseEstimator) and site.estimator.weighs_bound


class RefuseGradient:
    """The identity, whose derivative is an error; a leaf of the generated code."""

    __module__ = __name__
    repeatable = False

    def __init__(self, site: str, loc: str) -> None:
        self.__name__ = self.__qualname__ = "refuse_gradient"
        self.text = (
            f"an output beside the objective was differentiated, and its way passes %{site} ({loc}), whose gradients "
            f"are weighed for a bound: put it into the objective, detach it, or use 'reparam' for {site}"
        )

    def fake(self, value: Tensor) -> Tensor:
        return value.view_as(value)

    def __call__(self, value: Tensor) -> Tensor:
        return runtime.refuse_gradient(value, self.text)


class WeighPath:
    """Multiplies the gradient that reaches a draw; a leaf of the generated code."""

    __name__ = __qualname__ = "weigh_path"
    __module__ = __name__
    repeatable = False

    def fake(self, value: Tensor, draw: Tensor, factor: Tensor) -> Tensor:
        return value.view_as(value)

    def __call__(self, value: Tensor, draw: Tensor, factor: Tensor) -> Tensor:
        return runtime.weigh_path(value, draw, factor)


_WEIGH_PATH = WeighPath()  # one for all: programs that differ in their batch size alone have equal leaves

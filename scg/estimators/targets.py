r"""What predictions of the cost-to-go are fitted to: the cost-to-go itself, or one that later predictions complete.

A site's credited costs fall apart by a cut of the graph: those of the sites :math:`w` next below it, and its own. With
:math:`Q` the sampled cost-to-go and :math:`V` its prediction,

.. math:: G_v = Q_v + \sum_{w \in \text{cut}(v)} \big( \lambda (G_w - Q_w) + (1 - \lambda) (V_w - Q_w) \big)

is the lambda-return: costs before the cut as they were drawn, and behind it, predictions. On a chain with a cost each
it is Sutton and Barto 2018, eq. 12.2. Along a causal element dim (logged rewards after logged actions) the cut of an
index is the next index.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from scg.estimators.base import Predicts, SiteContext


@dataclass(frozen=True)
class MonteCarlo:
    """The cost-to-go as it was drawn."""

    def weights(self, steps: int) -> list[float]:
        """Of the corrections 1, 2, … cuts below."""
        return [0.0] * steps

    def inherited(self, context: SiteContext) -> Tensor | None:
        """What is added to the signal, None for nothing."""
        return None


@dataclass(frozen=True)
class TD:
    """The costs down to the k-th cut as they were drawn, and predictions for what lies behind it: TD(0) with ``k=1``.

    Args:
        steps: ``k``.
    """

    steps: int = 1

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"TD: steps={self.steps} must be at least 1")

    def weights(self, steps: int) -> list[float]:
        return [1.0 if k + 1 == self.steps else 0.0 for k in range(steps)]

    def inherited(self, context: SiteContext) -> Tensor | None:
        return self._behind(context, self.steps)

    def _behind(self, context: SiteContext, steps: int) -> Tensor | None:
        key = (context.site.name, "td", steps)
        if key not in context.memo:
            total: Tensor | None = None
            for below in context.next_sites():
                part = _error(below.context, below.predictor) if steps == 1 else self._behind(below.context, steps - 1)
                total = _sum(total, None if part is None else below.gather(part))
            context.memo[key] = total
        return context.memo[key]  # type: ignore[no-any-return]


@dataclass(frozen=True)
class TDLambda:
    r"""The lambda-return: every number of steps, :math:`k` of them with weight :math:`(1 - \lambda) \lambda^{k-1}`.

    With a value function subtracted it is generalised advantage estimation (Schulman et al. 2016).

    Args:
        decay: lambda; 0 is TD(0), 1 the sampled cost-to-go.
    """

    decay: float = 0.95

    def __post_init__(self) -> None:
        if not 0 <= self.decay <= 1:
            raise ValueError(f"TDLambda: decay={self.decay} must lie in [0, 1]")

    def weights(self, steps: int) -> list[float]:
        return [(1 - self.decay) * self.decay**k for k in range(steps)]

    def inherited(self, context: SiteContext) -> Tensor | None:
        key = (context.site.name, "lambda", self.decay)
        if key not in context.memo:
            total: Tensor | None = None
            for below in context.next_sites():
                part = (1 - self.decay) * _error(below.context, below.predictor)
                deeper = self.inherited(below.context)
                if deeper is not None:
                    part = part + self.decay * deeper
                total = _sum(total, below.gather(part))
            context.memo[key] = total
        return context.memo[key]  # type: ignore[no-any-return]


Target = MonteCarlo | TD | TDLambda


def target_of(context: SiteContext, predict: Predicts, target: Target) -> Tensor:
    """The detached target of a site's prediction.  ``[*dims | *elements]``"""
    dim = None if isinstance(target, MonteCarlo) else context.causal_dim()
    if dim is None:
        more = target.inherited(context)
        return context.signal if more is None else context.signal + more
    error = _error(context, predict)
    axis = error.dim() - len(context.site.element_shape) + dim
    size = error.shape[axis]
    weights = target.weights(size)

    def make() -> Tensor:
        ahead = torch.arange(size) - torch.arange(size)[:, None]  # [i, j]: j is that many steps after i
        table = torch.tensor(weights, dtype=torch.float64)[(ahead - 1).clamp(min=0)]
        return torch.where(ahead > 0, table, 0.0).T.to(error.dtype).to(error.device)

    table = context.constant(make)
    return context.signal + (error.movedim(axis, -1) @ table).movedim(-1, axis)


def in_units(context: SiteContext, predicted: Tensor) -> Tensor:
    """What a module predicts for each element, in units of the signal: along a discount, as if each came first."""
    unit = _unit(context, predicted)
    return predicted if unit is None else predicted * unit


def misfit(context: SiteContext, target: Tensor, predicted: Tensor) -> Tensor:
    """The mean squared error of what `in_units` returned, in units of the signal.  A scalar"""
    error, unit = (target - predicted) ** 2, _unit(context, predicted)
    if unit is not None:
        error = error / unit.clamp(min=torch.finfo(unit.dtype).tiny)  # of what has no weight, nothing is predicted
    return error.mean()


def _unit(context: SiteContext, predicted: Tensor) -> Tensor | None:
    elements = context.site.element_shape
    return context.unit if predicted.shape[predicted.dim() - len(elements) :] == elements else None


def _error(context: SiteContext, predict: Predicts) -> Tensor:
    """``V - Q``, of full size along the elements.  ``[*dims | *elements]``"""
    error = predict.prediction(context) - context.signal
    lead = context.value.shape[: context.value.dim() - context.site.event_ndim]
    return error.expand(lead)


def _sum(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    if one is None or other is None:
        return one if other is None else other
    return one + other

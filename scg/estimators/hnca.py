"""Hindsight network credit assignment: each unit summed over its outcomes, as likely as the next layer's draws say."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from scg.estimators.base import RerunEstimator, SiteContext, SiteInfo, Support
from scg.estimators.local_expectation import finite
from scg.estimators.rerun import other_outcomes
from scg.estimators.score_function import ScoreFunction


@dataclass(frozen=True)
class HNCA(ScoreFunction, RerunEstimator):
    r"""Sums each unit over its outcomes, weighed by how likely the draws below would have been.

    .. math:: \hat g = \sum_i \sum_v \nabla_\theta \log p_i(v)\; P(z_i = v \mid y, z_{-i})\, (Q_i(v, y) - b), \qquad
              P(z_i = v \mid y, z_{-i}) \propto p_i(v)\, p(y \mid z_{-i}, v)

    Young 2021 and 2022. With ``y`` the next draws below, kept as they were drawn, and ``Q_i(v, y)`` the cost-to-go
    in which ``v`` stands wherever ``z_i`` itself is read: a cost of a later layer counts as drawn, weighed by the
    likelihood of the layer between; one of this layer alone is summed as by `LocalExpectation`, with no likelihood
    and no baseline. Unbiased, also below costs that are not differentiable. For a ``b`` that does not move, each
    unit's part is a conditional expectation of its score function's part, so never of more variance. Only what lies
    between a layer and the next is evaluated, ``D (S - 1)`` times for ``D`` units. For any finite support in a
    network of draws from densities: a draw below that is enumerated, relaxed or one of several coupled ones is an
    error that says so.

    Args:
        baseline: as of `ScoreFunction`, for the costs of later layers.
    """

    name: ClassVar[str] = "hnca"
    orders: ClassVar[int] = 1
    bounds: ClassVar[bool] = False
    reference: ClassVar[str] = "Young 2021, 2022"
    formula: ClassVar[str] = r"\sum_i \sum_v \nabla_\theta \log p_i(v)\, P(z_i = v \mid y, z_{-i}) (Q_i(v, y) - b)"

    @classmethod
    def supports(cls, site: SiteInfo) -> Support:
        return RerunEstimator.supports(site) and finite(site)

    def evaluations(self, site: SiteInfo) -> int:
        return 1 + site.flips * (len(site.support) - 1 if site.support is not None else 1)

    def term(self, context: SiteContext) -> Tensor:
        outcomes = other_outcomes(context)
        seen, odds = context.hindsight(outcomes), context.log_odds(outcomes)  # [S-1, *dims | *elements]
        term: Tensor | None = None
        if seen.alone is not None:  # p(v) Q(v), of which a constant part has no gradient
            weights = _times(_shares(odds), seen.alone)
            term = context.score_mix(outcomes, weights, weights.sum(0))
        if seen.later is not None:
            assert seen.log_ratio is not None
            posterior = _shares(odds + seen.log_ratio)
            later = _Later(context, seen.later)
            advantage = self._baseline(later).advantage(later).detach()
            part = advantage * context.score_mix(outcomes, posterior)
            if seen.gain is not None:
                weights = _times(posterior, seen.gain)
                part = part + context.score_mix(outcomes, weights, weights.sum(0))
            term = part if term is None else term + part
        assert term is not None
        return term


def _shares(odds: Tensor) -> Tensor:
    """Probabilities of the outcomes that were not drawn, from their log odds to the draw.  ``[S-1, …]``"""
    if len(odds) == 1:
        return odds.sigmoid()
    return torch.cat([torch.zeros_like(odds[:1]), odds]).softmax(0)[1:]


def _times(share: Tensor, gain: Tensor) -> Tensor:
    """What a cost changes by at an impossible outcome does not count, be it infinite."""
    return torch.where(share > 0, share * gain, 0.0)


class _Later:
    """The context of a site with the signal of some of its costs: what a baseline sees."""

    def __init__(self, context: SiteContext, signal: Tensor) -> None:
        self._context, self.signal = context, signal

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)

"""Sampling without replacement with importance weights: a baseline for free."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.distributions import Distribution

from scg.estimators.base import Draw, SiteContext
from scg.estimators.sequences import Beam
from scg.estimators.subsets import Outcomes, WithoutReplacementEstimator, weighted_score


@dataclass(frozen=True)
class WithoutReplacement(WithoutReplacementEstimator):
    r"""Distinct outcomes in the order of a race, weighted by one over their probability of beating the next one.

    .. math::
        \hat g = \sum_{s \in S} w_s \sum_{u \in S \setminus s} w_u (f_s - f_u) \nabla \log p_s, \qquad
        w_s = \frac{p_s}{q_s}, \quad q_s = P(G_s > \kappa \mid \kappa) = 1 - \exp(-e^{\log p_s - \kappa})

    with :math:`\kappa` the largest perturbed log probability outside the set. Kool, van Hoof and Welling 2019. Their
    baseline :math:`\sum_u w_u f_u` (made unbiased) is subtracted from :math:`f_s \sum_{u \ne s} w_u + p_s f_s`, not
    from :math:`f_s`: unbiased as well, since :math:`E[1_{s, u \in S} / (q_s q_u)] = 1`, and a constant added to a cost
    changes nothing, where theirs scales it by weights that sum to one in expectation only. Without a baseline for one
    row. Unbiased; exact when the set is the whole support. ``k`` evaluations. For finite supports.

    The sites that share one object with ``sequence=True`` are drawn as one sequence by stochastic beam search: the set
    is one of joint outcomes, however many there are. Mask the logits of a finished sequence, so that it has one way to
    go on: then it is in the set once.

    Args:
        samples: ``k``, two unless given.
        sequence: draw all sites of this object, and the elements of each that meet in a cost, as one sequence.
    """

    name: ClassVar[str] = "without_replacement"
    unbiased: ClassVar[bool] = True
    reference: ClassVar[str] = "Kool, van Hoof and Welling 2019"
    formula: ClassVar[str] = r"\sum_{s \in S} w_s \sum_{u \in S \setminus s} w_u (f_s - f_u) \nabla \log p_s"

    @property
    def rows(self) -> int:
        return self.samples or 2

    def draw_rows(self, dist: Distribution, shape: torch.Size, support: Tensor | None, joined: tuple[int, ...]) -> Draw:
        assert support is not None
        outcomes = Outcomes(dist, shape, support, joined)
        index, after = self.race(outcomes.log_p, self.rows)
        weight = outcomes.weights(inclusion_weights(outcomes.log_p.gather(-1, index), after))
        return Draw(outcomes.rows(index), weight, (weight,))

    def finish(self, state: Beam) -> tuple[Tensor, tuple[Tensor, ...]]:
        weight = inclusion_weights(state.log_p, -self.threshold(state))
        return weight, (weight,)

    def threshold(self, state: Beam) -> Tensor:
        """The largest perturbed log probability outside the set.  ``[*N]``"""
        return state.threshold

    def term(self, context: SiteContext) -> Tensor:
        assert context.row_axis is not None
        (weight,) = context.extra  # [*dims | *elements]
        signal = torch.where(weight > 0, context.signal, 0.0)
        if self.rows == 1:
            return weighted_score(context, weight, signal)
        weights = weight.sum(context.row_axis, keepdim=True)
        costs = (weight * signal).sum(context.row_axis, keepdim=True)
        return weighted_score(context, weight, weights * signal - costs)  # the pair (s, s) cancels


def inclusion_weights(log_p: Tensor, after: Tensor) -> Tensor:
    """``p / (1 - exp(-p t))`` from log probabilities ``[*N, k]`` and the log of the next time ``t``, ``[*N]``."""
    log_x = (log_p + after.unsqueeze(-1)).clamp_max(50.0)  # beyond, 1 - exp(-x) is one to rounding
    x = log_x.exp().clamp_min(torch.finfo(log_p.dtype).tiny)
    log_q = log_x + torch.log(-torch.expm1(-x) / x)
    return torch.exp(log_p - log_q)

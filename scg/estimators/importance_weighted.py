"""Off-policy score function: replayed outcomes that another distribution drew."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from scg.estimators.base import SiteContext, SiteInfo, Support
from scg.estimators.score_function import ScoreFunction


@dataclass(frozen=True)
class ImportanceWeighted(ScoreFunction):
    r"""The score function of a replayed draw, weighted by how much likelier it is now than when it was drawn.

    .. math:: \hat g = (W Q - W_{\le z} b)\, \nabla_\theta \log p_\theta(z),  W = \prod p_\theta(z) / \beta(z)

    Precup, Sutton and Singh 2000 (per-decision importance sampling). Each cost is weighted by the ratios of all the
    elements that influence it: its own where it is tied, those up to it along a causal dim, all of a dim that it joins.
    Unbiased where :math:`\beta > 0`; the objective's value stays the plain mean of the logged costs. One evaluation.
    Replayed sites alone.

    Args:
        baseline: as of ``score_function``.
        behaviour: name of the input that holds :math:`\log \beta(z)`, one number for each element.
    """

    behaviour: str = "behaviour"

    name: ClassVar[str] = "importance_weighted"
    orders: ClassVar[int] = 1
    bounds: ClassVar[bool] = False
    reference: ClassVar[str] = "Precup, Sutton and Singh 2000"
    formula: ClassVar[str] = r"(W Q - W_{\le z} b)\, \nabla_\theta \log p_\theta(z)"

    @property
    def logged(self) -> Mapping[str, bool]:
        return {self.behaviour: True}

    @classmethod
    def supports(cls, site: SiteInfo) -> Support:
        if not site.replayed:
            return Support(False, "its draw is not replayed: it comes from its own distribution")
        if site.shares_costs:
            return Support(False, "a credited cost depends on another site, whose ratios would be missing")
        for dim, words in enumerate(site.links):
            if len(words) > 1:
                return Support(False, f"costs meet dim {dim} in several ways ({', '.join(sorted(words))})")
        return super().supports(site)

    def term(self, context: SiteContext) -> Tensor:
        log_ratio = log_ratio_of(context, self.behaviour).detach()
        signal, rank = context.signal, len(context.site.element_shape)
        first = signal.dim() - rank
        joined = [axis for axis in range(first, signal.dim()) if signal.shape[axis] == 1 < log_ratio.shape[axis]]
        if joined:
            log_ratio = log_ratio.sum(joined, keepdim=True)
        causal = context.causal_dim()
        if causal is None:
            weight = log_ratio.exp()
            weighted = weight * signal
        else:
            axis = first + causal
            weight = log_ratio.cumsum(axis).exp()
            after = torch.cat([signal.narrow(axis, 1, signal.shape[axis] - 1), signal.narrow(axis, 0, 1) * 0], axis)
            own = weight * (signal - after)  # what falls between an index and the next
            weighted = own.flip(axis).cumsum(axis).flip(axis)
        baseline = self.baseline_value(context)
        return context.score_times(weighted if baseline is None else weighted - weight * baseline)


def log_ratio_of(context: SiteContext, behaviour: str) -> Tensor:
    """``log p(z) - log beta(z)`` with the gradient of ``p``.  ``[*dims | *elements]``"""
    (logged,) = context.read((behaviour,))
    return context.log_prob - logged

"""What estimators with sets of distinct outcomes share: the support's probabilities, races, what they refuse."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.distributions import Distribution

from scg.errors import EstimatorError
from scg.estimators.base import YES, RowEstimator, SiteContext, SiteInfo, Support

_FLOOR = -1e3
"""Log probability of an impossible outcome: its weight underflows to zero, and ratios of several stay defined."""


@dataclass(frozen=True)
class SubsetEstimator(RowEstimator):
    """Base of estimators whose rows are distinct outcomes of one element, with weights.

    Every element has a set of its own; elements that meet in no cost share the rows.
    """

    weighted: ClassVar[bool] = True

    @classmethod
    def supports(cls, site: SiteInfo) -> Support:
        if site.replayed:
            return Support(False, "a replayed outcome is one outcome, not a set")
        if site.pathwise_only:
            return Support(False, site.pathwise_only)
        if site.rerun_break:
            return Support(False, site.rerun_break)
        if site.support is None:
            return Support(False, f"{site.family} has no finite support of known size")
        if site.flips > 1:
            return Support(False, f"it draws a set of outcomes for each element apart, and one cost sees {site.flips} "
                                  f"elements of this site: sets of joint outcomes are not drawn")  # fmt: skip
        return YES

    def check(self, site: SiteInfo) -> Support:
        found = self.supports(site)
        if found and site.support is not None and self.rows > len(site.support):
            return Support(False, f"{self.rows} distinct outcomes were asked for, and its support has only "
                                  f"{len(site.support)}")  # fmt: skip
        return found

    def race(self, log_p: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The first ``k`` of exponential arrivals at rates ``p``, and when the next one arrives.

        The Gumbel-top-k trick on another scale: perturbed log probabilities are minus the logs of the times.

        Args:
            log_p: ``[*N, S]``.
            k: how many.

        Returns:
            Indices ``[*N, k]`` in the order of arrival, and the log of the next time ``[*N]``, infinite if none
            is left.
        """
        uniform = torch.rand_like(log_p).clamp_min(torch.finfo(log_p.dtype).tiny)
        times, order = (torch.log(-torch.log1p(-uniform)) - log_p).sort(-1)  # [*N, S]
        after = times[..., k] if k < log_p.shape[-1] else torch.full_like(times[..., 0], float("inf"))
        return order[..., :k], after


def support_log_prob(dist: Distribution, shape: torch.Size, support: Tensor) -> Tensor:
    """Log probabilities of every outcome, detached, finite, at least in float32.  ``[*shape | *B, S]``"""
    batch = dist.batch_shape
    outcomes = support.reshape(torch.Size([len(support), *[1] * len(batch), *dist.event_shape]))
    log_p = dist.log_prob(outcomes).detach()
    log_p = log_p.to(torch.promote_types(log_p.dtype, torch.float32)).clamp_min(_FLOOR)
    return log_p.movedim(0, -1).expand(torch.Size([*shape, *batch, len(support)]))


def rows_first(chosen: Tensor, event_ndim: int = 0) -> Tensor:
    """``[*N, k, *event]`` as ``[k, *N, *event]``."""
    return chosen.movedim(-1 - event_ndim, 0)


def own_signal(context: SiteContext) -> Tensor:
    """The signal, of which each element must be credited alone: the weights of the others would be missing.

    Raises:
        EstimatorError: where costs of several elements were added up into one signal.
    """
    elements = context.site.element_shape
    if elements and tuple(context.signal.shape[-len(elements) :]) != elements:
        raise EstimatorError(
            f"%{context.site.name}: weighted rows of independent elements need a signal for each; "
            f"use credit='element', or an estimator without weights"
        )
    return context.signal


def weighted_score(context: SiteContext, weight: Tensor, signal: Tensor) -> Tensor:
    """The sum over rows of ``weight * signal * log_prob``, impossible outcomes left out.  Size 1 along the rows"""
    assert context.row_axis is not None
    log_prob = torch.where(weight > 0, context.log_prob, 0.0)
    return (weight * signal * log_prob).sum(context.row_axis, keepdim=True)

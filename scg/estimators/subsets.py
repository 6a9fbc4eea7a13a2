"""What the estimators with sets of distinct outcomes share: joint outcomes, races, and what they refuse."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.distributions import Distribution

from scg.estimators.base import (
    YES,
    RowEstimator,
    SequenceContext,
    SequenceEstimator,
    SiteContext,
    SiteInfo,
    Step,
    Support,
)
from scg.estimators.categorical import log_prob_of_support
from scg.estimators.sequences import Beam, BeamSearch

_FLOOR = -1e3
"""Log probability of an impossible outcome: its weight underflows to zero, and ratios of several stay defined."""


@dataclass(frozen=True)
class SubsetEstimator(RowEstimator):
    """Base of estimators whose rows are distinct outcomes, with weights.

    Elements that meet in a cost have a set of joint outcomes, whose probabilities are all computed; those that meet in
    none have sets of their own in the same rows.
    """

    limit: int = 2**16
    """Most joint outcomes."""

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
        return YES

    def check(self, site: SiteInfo) -> Support:
        found = self.supports(site)
        if not found or site.support is None:
            return found
        outcomes = len(site.support) ** site.flips
        if outcomes > self.limit:
            return Support(False, f"one cost or coarse credit sees {site.flips} elements of it, whose {outcomes:.3g} "
                                  f"joint outcomes are over the limit of {self.limit}")  # fmt: skip
        if self.rows > outcomes:
            return Support(False, f"{self.rows} distinct outcomes were asked for, and its support has only {outcomes}")
        return YES

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


@dataclass(frozen=True)
class WithoutReplacementEstimator(SubsetEstimator, SequenceEstimator, BeamSearch):
    """Base of estimators whose rows are drawn without replacement: from one site, or from a sequence of sites."""

    sequence: bool = False
    """Draw the sites that share this object as one sequence, by stochastic beam search."""

    @property
    def joins_sites(self) -> bool:
        return self.sequence

    def check(self, site: SiteInfo) -> Support:
        return self.supports(site) if self.sequence else super().check(site)

    def grow(self, state: Beam | None, log_p: Tensor, context: SequenceContext) -> Step:
        beam, index, parents = self.extend_by(state, log_p, self.rows)
        return Step(index, parents, beam)


class Outcomes:
    """The joint outcomes of all joined elements, as one support of each group of them."""

    def __init__(self, dist: Distribution, shape: torch.Size, support: Tensor, joined: tuple[int, ...]) -> None:
        batch = dist.batch_shape
        self.support, self.event_ndim = support, len(dist.event_shape)
        self.joined, elements = joined, torch.Size([*shape, *batch])
        self.sizes = [elements[dim] for dim in joined]
        log_p = log_prob_of_support(dist, support, len(batch)).movedim(0, -1)
        log_p = log_p.expand(torch.Size([*elements, len(support)]))
        log_p = log_p.to(torch.promote_types(log_p.dtype, torch.float32))
        self._places = [len(elements) - len(joined) + i for i in range(len(joined))]
        apart = log_p.movedim(joined, self._places)  # [*N, *joined, S]
        apart = apart.reshape([*apart.shape[: len(elements) - len(joined)], math.prod(self.sizes), len(support)])
        total = apart[..., 0, :]
        for other in range(1, apart.shape[-2]):
            total = (total.unsqueeze(-1) + apart[..., other, None, :]).flatten(-2)
        self.log_p = total.clamp_min(_FLOOR)
        """Finite, at least in float32.  ``[*N, outcomes]``"""

    def rows(self, index: Tensor) -> Tensor:
        """The outcomes at ``index``, ``[*N, k]``, as rows ``[k, *shape | *B | *E]``."""
        count, size = math.prod(self.sizes), len(self.support)
        if count == 1 and not self.sizes:
            return self.support[index].movedim(-1 - self.event_ndim, 0)
        digits = [index // size ** (count - 1 - i) % size for i in range(count)]
        apart = torch.stack(digits, -2).reshape([*index.shape[:-1], *self.sizes, index.shape[-1]])
        value = self.support[apart.movedim(self._places, self.joined)]
        return value.movedim(-1 - self.event_ndim, 0)

    def weights(self, weight: Tensor, extra: int = 0) -> Tensor:
        """From ``[*N, k]`` and ``extra`` more dims to rows ``[k, *shape | *B]`` with size 1 along joined dims."""
        kept = weight.dim() - 1 - extra
        apart = weight.reshape([*weight.shape[:kept], *[1] * len(self.sizes), *weight.shape[kept:]])
        return apart.movedim(self._places, self.joined).movedim(-1 - extra, 0)


def weighted_score(context: SiteContext, weight: Tensor, signal: Tensor) -> Tensor:
    """The sum over rows of ``weight * signal * log_prob``, impossible outcomes left out.  Size 1 along the rows"""
    assert context.row_axis is not None
    log_prob = torch.where(weight > 0, context.log_prob, 0.0)
    return (weight * signal * log_prob).sum(context.row_axis, keepdim=True)

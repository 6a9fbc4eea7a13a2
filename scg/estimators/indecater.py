"""IndeCateR: each element summed over its outcomes, the others drawn anew for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from scg.estimators.base import RerunEstimator, SiteContext, SiteInfo, Support
from scg.estimators.local_expectation import LocalExpectation, finite
from scg.estimators.rerun import groups


@dataclass(frozen=True)
class IndeCateR(RerunEstimator):
    r"""Sums each element over its outcomes, with a draw of the other elements of its own.

    .. math:: \hat g = \sum_i \sum_v \nabla_\theta p_i(v)\, Q_i(z^{(i)}_{-i}, v), \quad z^{(i)} \sim p_\theta

    De Smet, Sansone and Zuidberg Dos Martires 2023, theorem 2. The ``D`` draws are independent, so that their noise
    averages out where many elements share a parameter. Unbiased, also below costs that are not differentiable. ``D S``
    evaluations for ``D`` elements that one cost may see; where each cost sees one, it is `LocalExpectation`. Any finite
    support.
    """

    name: ClassVar[str] = "indecater"
    unbiased: ClassVar[bool] = True
    reference: ClassVar[str] = "De Smet et al. 2023"
    formula: ClassVar[str] = r"\sum_i \sum_v \nabla_\theta p_i(v)\, Q_i(z^{(i)}_{-i}, v)"

    @classmethod
    def supports(cls, site: SiteInfo) -> Support:
        return super().supports(site) and finite(site)

    def evaluations(self, site: SiteInfo) -> int:
        return 1 + site.flips * (len(site.support) if site.support is not None else 2)

    def term(self, context: SiteContext) -> Tensor:
        if not context.joined:
            return LocalExpectation().term(context)
        support, value = context.site.support, context.value
        assert support is not None
        batch = value.shape[: value.dim() - context.site.event_ndim]
        fresh = context.dist.expand(batch).sample(torch.Size([groups(context)])).detach()
        outcomes = support.reshape([len(support), *[1] * len(batch), *support.shape[1:]]).expand(-1, *value.shape)
        q = context.change_one(outcomes, fresh)  # [S, *dims | *elements]
        p = context.log_prob_of(outcomes).exp()
        q = torch.where(p > 0, q, 0.0)
        return (p * (q - (p.detach() * q).sum(0))).sum(0)

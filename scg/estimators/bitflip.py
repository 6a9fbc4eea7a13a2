"""BitFlip: one element, picked at random, changed to another outcome."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from scg.estimators.base import RerunEstimator, SiteContext, SiteInfo, Support
from scg.estimators.local_expectation import finite
from scg.estimators.rerun import element_sizes, groups, other_outcomes, pick


@dataclass(frozen=True)
class BitFlip(RerunEstimator):
    r"""Local expectation of one random element, for all elements' sake.

    .. math:: \hat g = D \sum_v \nabla_\theta p_i(v)\, (Q_i(z_{-i}, v) - Q_i(z)), \quad i \sim U\{1, \dots, D\}

    Kunes et al. 2023 (BitFlip-1). Unbiased, also below costs that are not differentiable. ``S - 1`` further evaluations
    for any number ``D`` of elements that one cost may see. Any finite support.
    """

    name: ClassVar[str] = "bitflip"
    unbiased: ClassVar[bool] = True
    reference: ClassVar[str] = "Kunes et al. 2023"
    formula: ClassVar[str] = r"D \sum_v \nabla_\theta p_i(v)\, (Q_i(z_{-i}, v) - Q_i(z)), \quad i \sim U\{1..D\}"

    @classmethod
    def supports(cls, site: SiteInfo) -> Support:
        return super().supports(site) and finite(site)

    def evaluations(self, site: SiteInfo) -> int:
        return 1 + (len(site.support) - 1 if site.support is not None else 1)

    def term(self, context: SiteContext) -> Tensor:
        outcomes, event = other_outcomes(context), context.site.event_ndim  # [S-1, *dims | *elements | *event]
        picked = pick(context, context.value.new_ones(element_sizes(context), dtype=context.log_prob.dtype))
        found = context.rerun(picked.put(picked.of(outcomes, event), context.value, event))
        p = picked.of(context.log_prob_of(outcomes)).exp()
        gain = torch.where(p > 0, picked.of(found.signal) - picked.of(context.signal), 0.0)
        return (p * gain).sum(0) * groups(context)

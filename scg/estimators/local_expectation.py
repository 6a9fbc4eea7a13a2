"""Local expectation gradients: each element summed over its outcomes, the others as they were drawn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from scg.estimators.base import RerunEstimator, SiteContext, SiteInfo, Support
from scg.estimators.rerun import other_outcomes


def finite(site: SiteInfo) -> Support:
    """Whether the support of one element is finite and known."""
    if site.support is None:
        return Support(False, f"{site.family} has no finite support of known size")
    return Support(True)


@dataclass(frozen=True)
class LocalExpectation(RerunEstimator):
    r"""Sums each element over its outcomes while all other elements keep their draw.

    .. math:: \hat g = \sum_i \sum_v \nabla_\theta p_i(v)\, Q_i(z_1, \dots, v, \dots, z_D)

    Titsias and Lázaro-Gredilla 2015, eq. 8. As the probabilities sum to one, outcome ``v`` enters as its difference
    from the draw, ``Q_i(v) - Q_i(z_i)``: a constant added to a cost changes nothing at all. Unbiased, also below costs
    that are not differentiable; exact for a single element. ``D (S - 1)`` further evaluations of what lies below, for
    ``D`` elements that one cost may see. Any finite support.
    """

    name: ClassVar[str] = "local_expectation"
    unbiased: ClassVar[bool] = True
    reference: ClassVar[str] = "Titsias and Lázaro-Gredilla 2015"
    formula: ClassVar[str] = r"\sum_i \sum_v \nabla_\theta p_i(v)\, Q_i(z_{-i}, v)"

    @classmethod
    def supports(cls, site: SiteInfo) -> Support:
        return super().supports(site) and finite(site)

    def evaluations(self, site: SiteInfo) -> int:
        return 1 + site.flips * (len(site.support) - 1 if site.support is not None else 1)

    def term(self, context: SiteContext) -> Tensor:
        outcomes = other_outcomes(context)
        gain = context.change_one(outcomes) - context.signal  # [S-1, *dims | *elements]
        p = context.log_prob_of(outcomes).exp()
        return (p * torch.where(p > 0, gain, 0.0)).sum(0)

"""Pathwise gradients through a reparameterized draw."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.distributions import Distribution

from scg.estimators.base import YES, PathwiseEstimator, SiteInfo, Support


@dataclass(frozen=True)
class Reparam(PathwiseEstimator):
    r"""Differentiates through the draw.

    .. math:: \nabla_\theta E[f(z)] = E[\nabla_\theta f(g_\theta(\epsilon))], \quad z = g_\theta(\epsilon)

    Kingma and Welling 2014; implicitly for Gamma, Beta, Dirichlet: Figurnov, Mohamed and Mnih 2018. Unbiased where the
    whole path from the draw to every credited cost is continuous and differentiable. One evaluation.
    """

    name: ClassVar[str] = "reparam"
    unbiased: ClassVar[bool] = True
    reference: ClassVar[str] = "Kingma and Welling 2014"
    formula: ClassVar[str] = r"\nabla_\theta f(g_\theta(\epsilon))"

    @classmethod
    def supports(cls, site: SiteInfo) -> Support:
        if site.replayed:
            return Support(False, "a replayed outcome has no path back to its parameters")
        if not site.template.has_rsample:
            return Support(False, f"{site.family} has no rsample")
        if site.pathwise_break:
            return Support(False, site.pathwise_break)
        return YES

    def draw(self, dist: Distribution, shape: torch.Size) -> Tensor:
        return dist.rsample(shape)

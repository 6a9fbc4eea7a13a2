"""DReG: pathwise gradients of a multi-sample bound, its score terms reparameterized as well."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.distributions import Distribution

from scg.estimators.base import PathwiseEstimator, SiteInfo, Support
from scg.estimators.reparam import Reparam, moving_support


@dataclass(frozen=True)
class DReG(PathwiseEstimator):
    r"""Differentiates a bound through the draws alone, the score terms of its weights turned into paths too.

    .. math::
        \hat g = \sum_k \big(\alpha \tilde w_k + (1 - \alpha) \tilde w_k^2\big)
                 \frac{\partial \log w_k}{\partial z_k} \nabla_\theta z_k, \qquad
        \tilde w_k = \frac{w_k^{1 - \alpha}}{\sum_j w_j^{1 - \alpha}}

    Tucker, Lawson, Gu and Maddison 2018, for the importance-weighted bound (:math:`\alpha = 0`) and for the Renyi ones.
    `reparam` below a bound has a score term in each weight, whose noise hides the gradient as K grows. Unbiased; the
    parameters that are not the draw's own get the gradient of the bound as it is. One evaluation. For the last draw
    above `scg.multisample`, where ``-log w`` holds its log density once; with one draw it is `reparam` with
    ``path_derivative=True``.
    """

    name: ClassVar[str] = "dreg"
    unbiased: ClassVar[bool] = True
    weighs_bound: ClassVar[bool] = True
    reference: ClassVar[str] = "Tucker et al. 2018"
    formula: ClassVar[str] = (
        r"\sum_k (\alpha \tilde w_k + (1 - \alpha) \tilde w_k^2)\, \partial_{z_k} \log w_k\, \nabla_\theta z_k"
    )

    @classmethod
    def supports(cls, site: SiteInfo) -> Support:
        found = Reparam.supports(site)
        if found and site.bound:
            return moving_support(site)
        if found and site.doubly_break:
            return Support(False, site.doubly_break)
        return found

    @property
    def stops_score(self) -> bool:
        return True

    def draw(self, dist: Distribution, shape: torch.Size) -> Tensor:
        return Reparam().draw(dist, shape)

    def bound_factor(self, share: Tensor, alpha: float) -> Tensor:
        # of the score term, w~ d log q: reparameterized it is (1 - alpha) w~ (1 - w~) times the same path
        return alpha + (1 - alpha) * share

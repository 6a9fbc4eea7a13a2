"""DisARM: an antithetic pair of Bernoulli draws, its uniform noise integrated out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from scg.estimators.antithetic import AntitheticPair, logit, row_difference
from scg.estimators.base import SiteContext


@dataclass(frozen=True)
class DisARM(AntitheticPair):
    r"""ARM conditioned on the two outcomes: only a pair that differs teaches anything.

    .. math:: \hat g = \tfrac12 (f(b) - f(\tilde b)) (b - \tilde b)\, \sigma(|\theta|)\, \nabla \theta, \qquad
              b = 1[u < p],\; \tilde b = 1[1 - u < p],\; \theta = \operatorname{logit} p

    Dong, Mnih and Tucker 2020; the same as U2G of Yin, Ho, Yan, Qian and Zhou 2020. Unbiased, the variance never
    above that of ARM. Two evaluations. For Bernoulli.
    """

    name: ClassVar[str] = "disarm"
    unbiased: ClassVar[bool] = True
    reference: ClassVar[str] = "Dong, Mnih and Tucker 2020; Yin et al. 2020"
    formula: ClassVar[str] = r"\tfrac12 (f(b) - f(\tilde b)) (b - \tilde b)\, \sigma(|\theta|)\, \nabla \theta"

    def term(self, context: SiteContext) -> Tensor:
        assert context.row_axis is not None
        theta = logit(context)
        gap = row_difference(context.signal, context.row_axis)  # [*dims with 1 row | *elements]
        differ = row_difference(context.value, context.row_axis)
        return 0.5 * gap * differ * theta.detach().abs().sigmoid() * theta

"""ARM: augment, REINFORCE, merge."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from scg.estimators.antithetic import AntitheticPair, logit, row_difference
from scg.estimators.base import SiteContext


@dataclass(frozen=True)
class ARM(AntitheticPair):
    r"""The score function in the uniform noise of a Bernoulli draw, with an antithetic pair.

    .. math:: \hat g = (f(b) - f(\tilde b)) (\tfrac12 - u)\, \nabla \theta, \qquad
              b = 1[u < p],\; \tilde b = 1[1 - u < p],\; \theta = \operatorname{logit} p

    Yin and Zhou 2019, theorem 1. Unbiased. Two evaluations. For Bernoulli.
    """

    name: ClassVar[str] = "arm"
    unbiased: ClassVar[bool] = True
    reference: ClassVar[str] = "Yin and Zhou 2019"
    formula: ClassVar[str] = r"(f(b) - f(\tilde b)) (\tfrac12 - u)\, \nabla \theta"

    def term(self, context: SiteContext) -> Tensor:
        assert context.row_axis is not None
        (pair,) = context.extra
        u = pair.narrow(context.row_axis, 0, 1)
        gap = row_difference(context.signal, context.row_axis)  # [*dims with 1 row | *elements]
        return gap * (0.5 - u) * logit(context)

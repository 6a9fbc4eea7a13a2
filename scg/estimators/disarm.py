"""DisARM: an antithetic pair of Bernoulli draws, its uniform noise integrated out; categoricals by their sticks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.distributions import Bernoulli, Distribution

from scg.estimators.antithetic import AntitheticPair, logit, row_difference
from scg.estimators.base import Draw, SiteContext
from scg.estimators.categorical import log_probabilities


@dataclass(frozen=True)
class DisARM(AntitheticPair):
    r"""ARM conditioned on the two outcomes: only a pair that differs teaches anything.

    .. math:: \hat g = \tfrac12 (f(b) - f(\tilde b)) (b - \tilde b)\, \sigma(|\theta|)\, \nabla \theta, \qquad
              b = 1[u < p],\; \tilde b = 1[1 - u < p],\; \theta = \operatorname{logit} p

    Dong, Mnih and Tucker 2020; the same as U2G of Yin, Ho, Yan, Qian and Zhou 2020. Unbiased, the variance never
    above that of ARM. Two evaluations. For Bernoulli.

    A categorical draw is the first one among Bernoulli draws that break its stick (Dong, Mnih and Tucker 2021, the
    coupled estimator): each has its own :math:`\theta_i = \log p_i - \log \sum_{j > i} p_j`, and those that
    neither of the pair reaches are left out.
    """

    name: ClassVar[str] = "disarm"
    unbiased: ClassVar[bool] = True
    reference: ClassVar[str] = "Dong, Mnih and Tucker 2020, 2021; Yin et al. 2020"
    formula: ClassVar[str] = r"\tfrac12 (f(b) - f(\tilde b)) (b - \tilde b)\, \sigma(|\theta|)\, \nabla \theta"
    families: ClassVar[tuple[str, ...]] = ("Bernoulli", "Categorical", "OneHotCategorical")

    def draw_rows(self, dist: Distribution, shape: torch.Size, support: Tensor | None, joined: tuple[int, ...]) -> Draw:
        if isinstance(dist, Bernoulli):
            return super().draw_rows(dist, shape, support, joined)
        assert support is not None
        p = sticks(dist).detach().sigmoid()
        p = p.expand(torch.Size([*shape, *dist.batch_shape, p.shape[-1]]))
        u = self.uniform(p)
        bits = torch.stack([u < p, u >= 1 - p]).to(p.dtype)  # [2, *shape | *B, C - 1]
        category = (1 - bits).cumprod(-1).sum(-1).long()  # zeros before the first one
        return Draw(support[category], extra=(bits, category))

    def term(self, context: SiteContext) -> Tensor:
        assert context.row_axis is not None
        gap = row_difference(context.signal, context.row_axis)  # [*dims with 1 row | *elements]
        if isinstance(context.dist, Bernoulli):
            theta = logit(context)
            differ = row_difference(context.value, context.row_axis)
            return 0.5 * gap * differ * theta.detach().abs().sigmoid() * theta
        bits, category = context.extra
        theta = sticks(context.dist)  # [*dims | *elements, C - 1]
        place = torch.arange(theta.shape[-1], device=theta.device)
        reached = place <= category.amax(context.row_axis, keepdim=True).unsqueeze(-1)
        differ = torch.where(reached, row_difference(bits, context.row_axis), 0.0)
        return 0.5 * gap * (differ * theta.detach().abs().sigmoid() * theta).sum(-1)


def sticks(dist: Distribution) -> Tensor:
    """Log odds of each category but the last against all after it, with gradient.  ``[*batch, C - 1]``"""
    log_p = log_probabilities(dist)
    after = log_p.flip(-1).logcumsumexp(-1).flip(-1)  # at i: all from i on
    return log_p[..., :-1] - after[..., 1:]

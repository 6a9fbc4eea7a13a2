"""Stochastic derivatives: one alternative a draw, kept with the probability that it would have happened."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.distributions import Bernoulli, Binomial, Geometric, Poisson

from scg.estimators.base import RerunEstimator, SiteContext, SiteInfo, Support
from scg.estimators.rerun import pick, sum_joined


@dataclass(frozen=True)
class StochasticAD(RerunEstimator):
    r"""The jump of the cost to the one alternative that an infinitesimal change would have drawn, times its rate.

    .. math:: \hat g = \Big(\sum_j w_j\Big)\, (Q_i(z_{-i}, z_i + s_i) - Q_i(z))\, \nabla_\theta \theta_i,
              \quad P(i) \propto w_i

    Arya et al. 2022: as ``theta_i`` grows by ``h``, an inverse-cdf draw moves from ``z_i`` to its neighbour
    ``z_i + s_i`` with probability ``h w_i``. Of all elements that one cost may see one alternative is kept (pruning),
    with probability proportional to its rate. Unbiased, also below costs that are not differentiable. One further
    evaluation for any number of elements; the program below draws afresh. Bernoulli, Binomial, Poisson, Geometric.
    """

    name: ClassVar[str] = "stochastic_ad"
    unbiased: ClassVar[bool] = True
    reference: ClassVar[str] = "Arya et al. 2022"
    formula: ClassVar[str] = r"\big(\sum_j w_j\big)\, (Q_i(z_{-i}, z_i + s_i) - Q_i(z))\, \nabla_\theta \theta_i"

    @classmethod
    def supports(cls, site: SiteInfo) -> Support:
        if not issubclass(site.template.cls, (Bernoulli, Binomial, Poisson, Geometric)):
            return Support(False, f"{site.family} has no single neighbour that its draw would jump to")
        return super().supports(site)

    def evaluations(self, site: SiteInfo) -> int:
        return 2

    def term(self, context: SiteContext) -> Tensor:
        parameter, rate, step = _alternative(context.dist, context.value)
        rate = rate.expand(context.value.shape)
        total = sum_joined(context, rate)
        picked = pick(context, torch.where(total > 0, rate, 1.0))  # where nothing can jump any element will do
        value = picked.of(context.value)
        jumped = torch.where(picked.of(rate) > 0, value + step, value)  # beyond its support an outcome has no density
        found = context.rerun(picked.put(jumped, context.value).unsqueeze(0))
        gain = picked.of(found.signal)[0] - picked.of(context.signal)
        return picked.of(parameter) * (total * gain).detach()


def _alternative(dist: Any, z: Tensor) -> tuple[Tensor, Tensor, float]:
    """The parameter, the rate of the jump as it grows, and the jump."""
    if isinstance(dist, Poisson):
        return dist.rate, torch.ones_like(z), 1.0
    p = dist.probs.detach()
    other = (1 - p).clamp_min(torch.finfo(p.dtype).tiny)  # where it is zero nothing can jump
    if isinstance(dist, Bernoulli):
        return dist.probs, (1 - z) / other, 1.0
    if isinstance(dist, Binomial):
        return dist.probs, (dist.total_count.detach() - z) / other, 1.0
    return dist.probs, z / (p * other), -1.0

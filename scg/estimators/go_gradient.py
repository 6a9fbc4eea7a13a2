"""GO gradients: a change of the distribution function, paid at the draw by the step to the next outcome."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.distributions import Bernoulli, Binomial, Categorical, Geometric, OneHotCategorical, Poisson

from scg.estimators.base import RerunEstimator, SiteContext, SiteInfo, Support


def _bernoulli(dist: Any, z: Tensor) -> tuple[Tensor, Tensor]:
    other = (1 - dist.probs.detach()).clamp_min(torch.finfo(z.dtype).tiny)
    return torch.ones_like(z), (1 - z) * dist.probs / other


def _categorical(dist: Any, z: Tensor) -> tuple[Tensor, Tensor]:
    following, rate = _one_hot(dist, torch.nn.functional.one_hot(z, dist.probs.shape[-1]))
    return following.argmax(-1), rate


def _one_hot(dist: Any, z: Tensor) -> tuple[Tensor, Tensor]:
    behind = (z.cumsum(-1) > z) & (dist.probs > 0)  # an impossible category is none: no draw would step out of it
    following = (behind & (behind.cumsum(-1) == 1)).to(z.dtype)
    last = ~behind.any(-1)
    below = (dist.probs.cumsum(-1) * z).sum(-1)
    rate = -below / (dist.probs.detach() * z).sum(-1)
    return torch.where(last.unsqueeze(-1), z, following), torch.where(last, 0.0, rate)


def _binomial(dist: Any, z: Tensor) -> tuple[Tensor, Tensor]:
    left = dist.total_count - z
    other = (1 - dist.probs.detach()).clamp_min(torch.finfo(z.dtype).tiny)
    return torch.where(left > 0, z + 1, z), left / other * dist.probs


def _geometric(dist: Any, z: Tensor) -> tuple[Tensor, Tensor]:
    return z + 1, -(z + 1) * dist.probs.log()


def _poisson(dist: Any, z: Tensor) -> tuple[Tensor, Tensor]:
    return z + 1, dist.rate.expand_as(z)


_STEPS: dict[type, Callable[[Any, Tensor], tuple[Tensor, Tensor]]] = {
    Bernoulli: _bernoulli,
    Categorical: _categorical,
    OneHotCategorical: _one_hot,
    Binomial: _binomial,
    Geometric: _geometric,
    Poisson: _poisson,
}
r"""Of each family, from the draw: the next outcome, and what has the derivative :math:`-\nabla F(z) / p(z)`."""


@dataclass(frozen=True)
class GoGradient(RerunEstimator):
    r"""Weighs the cost of the next outcome, less that of the draw, by how fast probability moves past the draw.

    .. math:: \hat g = \sum_i \frac{-\nabla_\theta F_i(z_i)}{p_i(z_i)}\, (Q_i(z_{-i}, z_i + 1) - Q_i(z))

    with the distribution function F. Cong, Zhao, Bai and Carin 2019; for continuous families it is the implicit
    `reparam`. Unbiased, also below costs that are not differentiable. One further evaluation for each of the elements
    that one cost may see. Discrete families with an ordered support: Bernoulli, Categorical and OneHotCategorical (in
    the order of their categories, which the variance depends on), Binomial, Geometric, Poisson.
    """

    name: ClassVar[str] = "go_gradient"
    unbiased: ClassVar[bool] = True
    reference: ClassVar[str] = "Cong, Zhao, Bai and Carin 2019"
    formula: ClassVar[str] = r"\sum_i \frac{-\nabla_\theta F_i(z_i)}{p_i(z_i)} (Q_i(z_{-i}, z_i + 1) - Q_i(z))"

    @classmethod
    def supports(cls, site: SiteInfo) -> Support:
        if not issubclass(site.template.cls, tuple(_STEPS)):
            families = ", ".join(family.__name__ for family in _STEPS)
            return Support(False, f"{site.family} has no next outcome, or its distribution function is not known here: "
                                  f"{families} have")  # fmt: skip
        return super().supports(site)

    def evaluations(self, site: SiteInfo) -> int:
        return 1 + site.flips

    def term(self, context: SiteContext) -> Tensor:
        step = next(step for family, step in _STEPS.items() if isinstance(context.dist, family))
        following, rate = step(context.dist, context.value)
        gain = context.change_one(following[None])[0] - context.signal  # [*dims | *elements]
        return rate * gain.detach()

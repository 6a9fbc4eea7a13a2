"""LAX: the score function with a learned, reparameterized control variate, for continuous draws."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from scg.estimators.base import ScoreEstimator, SiteContext, SiteInfo, Support
from scg.estimators.control_variate import ControlVariate, small_network, surrogate_of, times
from scg.estimators.implicit import WITH_CDF, reparameterized


@dataclass(frozen=True)
class Lax(ScoreEstimator):
    r"""The score function of the draw, with a network's reparameterized derivative as control variate.

    .. math::
        \hat g = (Q(z) - r_\rho(z))\, \nabla_\theta \log p_\theta(z) + \nabla_\theta r_\rho(z)

    Grathwohl et al. 2018, eq. 7. The network sees all elements that one cost may see, and is trained by the variance of
    the gradient in the site's parameters, in the same ``backward()``. The draw is reparameterized implicitly through
    its distribution function, :math:`\nabla z = -\nabla F_\theta(z) / p_\theta(z)` (Figurnov et al. 2018). Unbiased for
    any network, also below costs that are not differentiable. One evaluation. Normal, LogNormal, Laplace, Exponential,
    Cauchy, Gumbel, Weibull.

    Args:
        hidden: width of the network's hidden layer.
    """

    hidden: int = 10

    name: ClassVar[str] = "lax"
    unbiased: ClassVar[bool] = True
    reference: ClassVar[str] = "Grathwohl et al. 2018"
    formula: ClassVar[str] = r"(Q(z) - r_\rho(z))\, \nabla_\theta \log p_\theta(z) + \nabla_\theta r_\rho(z)"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hidden < 1:
            raise ValueError(f"{self.name}: hidden={self.hidden} must be at least 1")

    @classmethod
    def supports(cls, site: SiteInfo) -> Support:
        if site.pathwise_only:
            return Support(False, site.pathwise_only)
        if site.replayed:
            return Support(False, "a replayed outcome has no path back to its parameters")
        if not issubclass(site.template.cls, WITH_CDF):
            return Support(False, f"{site.family} has no differentiable distribution function in PyTorch")
        return Support(True)

    @property
    def learned(self) -> bool:
        return True

    def make_state(self, site: SiteInfo, batch_dims: tuple[int, ...], draws: int) -> nn.Module:
        return ControlVariate(None, False, small_network(site, self.hidden))

    def term(self, context: SiteContext) -> Tensor:
        dist, free, parameters = context.variables()
        value = context.value
        z = reparameterized(dist, value)
        learnt = context.state.free(context, z.unsqueeze(0))[0]  # [*dims | *elements], size 1 along joined dims
        scores = context.gradients(dist.log_prob(value).sum(), free)
        paths = context.gradients(learnt.sum(), free, differentiable=context.training)
        rest = context.signal - learnt
        estimates = [times(rest, score) + path for score, path in zip(scores, paths, strict=True)]
        return surrogate_of(context, estimates, parameters)

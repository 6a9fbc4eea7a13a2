"""MuProp: the score function of what a Taylor expansion at the mean leaves over."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.distributions import Bernoulli, Binomial, Geometric, NegativeBinomial, OneHotCategorical, Poisson

from scg.estimators.base import RerunEstimator, SiteContext, SiteInfo, Support
from scg.estimators.rerun import sum_joined, sum_like

_WITH_MEAN = (Bernoulli, OneHotCategorical, Binomial, Poisson, Geometric, NegativeBinomial)


@dataclass(frozen=True)
class MuProp(RerunEstimator):
    r"""The score function with a first-order Taylor expansion of the cost at the mean as control variate.

    .. math::
        \hat g = \sum_i \big(Q_i(z) - Q_i(\mu) - \nabla Q(\mu)^\top (z - \mu)\big) \nabla_\theta \log p_\theta(z_i)
                 + \nabla Q(\mu)^\top \nabla_\theta \mu

    Gu et al. 2016, eq. 4. Unbiased whatever slope is taken, so that a cost without a derivative is legal and merely
    gains nothing from it. One further evaluation, at the mean, differentiated. Bernoulli, OneHotCategorical, Binomial,
    Poisson, Geometric, NegativeBinomial: draws that are numbers, not an index.
    """

    name: ClassVar[str] = "muprop"
    unbiased: ClassVar[bool] = True
    one_hot: ClassVar[bool] = True
    reference: ClassVar[str] = "Gu et al. 2016"
    formula: ClassVar[str] = (
        r"(Q(z) - Q(\mu) - \nabla Q(\mu)^\top (z - \mu)) \nabla_\theta \log p_\theta(z) + "
        r"\nabla Q(\mu)^\top \nabla_\theta \mu"
    )

    @classmethod
    def supports(cls, site: SiteInfo) -> Support:
        if not issubclass(site.template.cls, _WITH_MEAN):
            index = site.family == "Categorical"
            return Support(False, site.why_no_one_hot if index else f"{site.family} is not discrete")
        return super().supports(site)

    def evaluations(self, site: SiteInfo) -> int:
        return 2

    def term(self, context: SiteContext) -> Tensor:
        value, event = context.value, context.site.event_ndim
        mean = context.dist.mean.expand(value.shape)
        point = context.variable(mean)
        found = context.rerun(point.unsqueeze(0), differentiable=True)
        assert found.surrogate is not None
        slope = context.gradient(found.surrogate.sum(), point)

        def along(change: Tensor) -> Tensor:
            product = slope * change  # [*dims | *elements | *event]
            return product.flatten(-event).sum(-1) if event else product

        expansion = found.signal[0].detach() + sum_joined(context, along(value - mean.detach()))
        term = context.score_times(context.signal - expansion)
        return term + sum_like(along(mean), term)

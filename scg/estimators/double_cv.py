"""Double control variates: leave-one-out over costs that are corrected by their derivative at the other draws."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn
from torch.distributions import Bernoulli, OneHotCategorical

from scg.errors import EstimatorError
from scg.estimators.base import RerunEstimator, SiteContext, SiteInfo, Support
from scg.estimators.control_variate import ControlVariate, surrogate_of, times
from scg.estimators.relaxed import Discrete, logits_of, noise_of
from scg.estimators.rerun import sum_joined


@dataclass(frozen=True)
class DoubleCV(RerunEstimator):
    r"""Leave-one-out with a linear control variate of slope taken at the other draws.

    .. math::
        \hat g = \frac1K \sum_k \Big(h_k - \frac{1}{K-1} \sum_{j \ne k} h_j\Big) \nabla_\theta \log p_\theta(z_k)
                 + \alpha\, \bar s_{-k}^\top \nabla_\theta \mu_k, \qquad
        h_k = Q(z_k) - \alpha\, \bar s_{-k}^\top (z_k - \mu_k)

    Titsias and Shi 2022, where :math:`\bar s_{-k}` is the mean derivative of the cost at the other draws. Below another
    site the means differ from draw to draw, so each is met by the slope at the others, not by the mean of all slopes.
    The factor is trained by the variance of the gradient in the site's logits, in the same ``backward()``. Unbiased
    for any of its values; a cost without a derivative leaves plain leave-one-out. Needs two or more i.i.d. draws; the
    costs of each are differentiated, and evaluated once more for it where they have draws above them that are below
    the site. Bernoulli, OneHotCategorical.
    """

    name: ClassVar[str] = "double_cv"
    unbiased: ClassVar[bool] = True
    one_hot: ClassVar[bool] = True
    at_draw: ClassVar[bool] = True
    reference: ClassVar[str] = "Titsias and Shi 2022"
    formula: ClassVar[str] = (
        r"\frac1K \sum_k (h_k - \bar h_{-k}) \nabla_\theta \log p_\theta(z_k) + \alpha \bar s^\top \nabla_\theta \mu, "
        r"\quad h_k = Q(z_k) - \alpha \bar s_{-k}^\top (z_k - \mu)"
    )

    @classmethod
    def supports(cls, site: SiteInfo) -> Support:
        if not issubclass(site.template.cls, (Bernoulli, OneHotCategorical)):
            index = site.family == "Categorical"
            return Support(
                False, site.why_no_one_hot if index else f"{site.family} is neither Bernoulli nor OneHotCategorical"
            )
        return super().supports(site)

    @property
    def learned(self) -> bool:
        return True

    def evaluations(self, site: SiteInfo) -> int:
        return 2 * (self.samples or 1)

    def make_state(self, site: SiteInfo, batch_dims: tuple[int, ...], draws: int) -> nn.Module:
        return ControlVariate(None, True, None)

    def term(self, context: SiteContext) -> Tensor:
        iid = context.iid
        count = math.prod(context.value.shape[axis] for axis in iid)
        if count < 2:
            raise EstimatorError(
                f"%{context.site.name}: {self.name!r} compares i.i.d. draws and needs two or more; give samples=2 to "
                f"scg.compile or to the estimator"
            )
        point, found = context.at_draw()
        assert found.surrogate is not None and isinstance(context.dist, Discrete)
        slope = context.gradient(found.surrogate.sum(), point)  # [*dims | *elements | *event]

        def others(tensor: Tensor) -> Tensor:
            return (tensor.sum(iid, keepdim=True) - tensor) / (count - 1)

        noise, logits = noise_of(context.dist), logits_of(context.dist).expand(context.value.shape)
        mean = noise.soft(logits.detach())
        slope, score = others(slope), context.value - mean
        linear = slope * score
        linear = sum_joined(context, linear.sum(-1) if context.site.event_ndim else linear)
        h = context.signal - context.state.scale * linear
        g = times(h - others(h), score) + context.state.scale * noise.tangent(mean, slope)
        return surrogate_of(context, [g], [logits], over=iid)

"""RODEO: leave-one-out with control variates that a discrete Stein operator makes of surrogate costs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from scg.errors import EstimatorError
from scg.estimators.base import RerunEstimator, SiteContext, SiteInfo, Support
from scg.estimators.control_variate import surrogate_of, times
from scg.estimators.relaxed import Discrete, logits_of
from scg.estimators.rerun import groups, sum_joined


@dataclass(frozen=True)
class Rodeo(RerunEstimator):
    r"""Leave-one-out with Stein control variates, one in the baseline and one beside it.

    .. math::
        \hat g = \frac1K \sum_k \Big(Q(z_k) - \frac{1}{K-1} \sum_{j \ne k} \big(Q(z_j) + \alpha (A h_j)(z_j)\big)\Big)
                 \nabla_\theta \log p_\theta(z_k) + \beta\, (A \tilde h_k)(z_k), \qquad
        (A h)(z) = \frac1D \sum_i \sum_v p_i(v)\, h(z_{-i}, v) - h(z)

    Shi, Zhou, Hwang, Titsias and Mackey 2022, with the Gibbs operator: any ``A h`` has mean zero.
    :math:`h_k(z)` and :math:`\tilde h_k(z) / \nabla_\theta \log p_\theta(z)` are the two outputs of a small network; it
    reads the mean cost at the other draws and the mean of their linear expansions at ``z``. The network and the two
    factors are trained by the variance of the gradient in the site's logits, in the same ``backward()``; all starts as
    plain leave-one-out. Unbiased for any of their values; a cost without a derivative leaves its mean to learn from.
    Needs two or more i.i.d. draws; the costs of each are differentiated, and evaluated once more for it where they have
    draws above them that are below the site. Bernoulli, OneHotCategorical.

    Args:
        hidden: width of the network's hidden layer.
    """

    hidden: int = 32

    name: ClassVar[str] = "rodeo"
    unbiased: ClassVar[bool] = True
    one_hot: ClassVar[bool] = True
    at_draw: ClassVar[bool] = True
    reference: ClassVar[str] = "Shi et al. 2022"
    formula: ClassVar[str] = (
        r"\frac1K \sum_k \Big(Q(z_k) - \frac{1}{K-1} \sum_{j \ne k} (Q(z_j) + \alpha (A h_j)(z_j))\Big) "
        r"\nabla_\theta \log p_\theta(z_k) + \beta (A \tilde h_k)(z_k)"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hidden < 1:
            raise ValueError(f"rodeo: hidden={self.hidden} must be at least 1")

    @classmethod
    def supports(cls, site: SiteInfo) -> Support:
        if site.family == "Categorical":
            return Support(False, site.why_no_one_hot)
        if not issubclass(site.template.cls, Discrete):
            return Support(False, f"{site.family} is neither Bernoulli nor OneHotCategorical")
        return super().supports(site)

    @property
    def learned(self) -> bool:
        return True

    def evaluations(self, site: SiteInfo) -> int:
        return 2 * (self.samples or 1)

    def make_state(self, site: SiteInfo, batch_dims: tuple[int, ...], draws: int) -> nn.Module:
        return Surrogates(self.hidden)

    def term(self, context: SiteContext) -> Tensor:
        iid, event, z = context.iid, context.site.event_ndim, context.value
        count = math.prod(z.shape[axis] for axis in iid)
        if count < 2:
            raise EstimatorError(
                f"%{context.site.name}: {self.name!r} compares i.i.d. draws and needs two or more; give samples=2 to "
                f"scg.compile or to the estimator"
            )
        joined, elements = groups(context), z.shape[: z.dim() - event]

        def group_mean(signal: Tensor) -> Tensor:
            return sum_joined(context, signal.expand(elements)) / joined

        # not of the surrogate: the terms of inner sites have baselines of other draws in them, which h must not see
        point, found = context.at_draw()
        signal = found.signal[0]
        slope = context.gradient(group_mean(signal).sum(), point)  # [*dims | *elements | *event]

        def others(tensor: Tensor) -> Tensor:
            return (tensor.sum(iid, keepdim=True) - tensor) / (count - 1)

        def along(product: Tensor) -> Tensor:
            return product.sum(-1) if event else product

        support = context.site.support
        assert support is not None
        outcomes = support.reshape([len(support), *[1] * (z.dim() - event), *support.shape[1:]])
        steps = outcomes - z  # [S, *dims | *elements | *event]
        mass = context.log_prob_of(outcomes.expand(steps.shape)).detach().exp()  # [S, *dims | *elements]
        tangent, cost = others(slope), others(group_mean(context.signal))
        expansion = sum_joined(context, along(tangent * z)) - others(sum_joined(context, along(slope * z)))
        drawn = context.state(cost, expansion)  # [*dims | *elements, 2], of size 1 along joined dims
        changed = context.state(cost, expansion + along(tangent * steps))  # [S, *dims | *elements, 2]
        gain = (mass.unsqueeze(-1) * changed).sum(0) - drawn
        inner, outer = (sum_joined(context, part) / joined for part in gain.unbind(-1))  # of size 1 along joined dims
        alpha, beta = context.state.factors.to(z.dtype)

        assert isinstance(context.dist, Discrete)
        logits = logits_of(context.dist).expand(z.shape)
        score = z - (torch.softmax(logits, -1) if event else torch.sigmoid(logits)).detach()
        stein = times(outer, score) + times(mass * changed[..., 1], steps).sum(0) / joined  # steps: the score's own
        advantage = context.signal - others(context.signal + alpha * inner)
        return surrogate_of(context, [times(advantage, score) + beta * stein], [logits], over=iid)


class Surrogates(nn.Module):
    """The learned parts: what stands for the cost in the baseline and beside it, and how much of either is taken."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.factors = nn.Parameter(torch.zeros(2))
        self.network = nn.Sequential(nn.Linear(2, hidden), nn.LeakyReLU(0.3), nn.Linear(hidden, 2))

    def forward(self, cost: Tensor, expansion: Tensor) -> Tensor:
        """Both surrogates.  ``[*N, 2]`` of two of ``[*N]``"""
        features = torch.stack(torch.broadcast_tensors(cost, expansion), -1)
        weight = next(self.network.parameters())
        found: Tensor = self.network(features.to(weight.dtype))
        return found.to(features.dtype)

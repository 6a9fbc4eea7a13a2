"""A baseline from the program itself: the cost where the draw is its most likely outcome."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.distributions import Distribution

from scg.estimators.base import SiteContext, SiteInfo, Support
from scg.estimators.baselines import Baseline


@dataclass(frozen=True)
class SelfCritic(Baseline):
    r"""The cost-to-go at the mode of the site, :math:`b = Q(\arg\max_z p_\theta(z))`: one further evaluation.

    All elements are at their mode together, so that it depends on no draw of them. Rennie et al. 2017, eq. 9.
    """

    name: ClassVar[str] = "self_critic"
    evaluations: ClassVar[int] = 1

    def check(self, site: SiteInfo) -> Support:
        if site.replayed:
            return Support(False, "a replayed outcome is one outcome: the cost at the mode was not seen")
        if site.support is None and site.template.cls.mode is Distribution.mode:
            return Support(False, f"PyTorch knows no mode of {site.family}")
        if site.order > 1:
            return Support(False, "the cost at the mode has no second derivative")
        return Support(site.rerun_break is None, site.rerun_break or "")

    def value(self, context: SiteContext) -> Tensor:
        support, value = context.site.support, context.value
        if support is None:
            mode = context.dist.mode
        else:
            lead = value.dim() - context.site.event_ndim
            rows = support.reshape([len(support), *[1] * lead, *support.shape[1:]]).expand([-1, *value.shape])
            likeliest = context.log_prob_of(rows).argmax(0)  # [*dims | *elements]
            mode = support.index_select(0, likeliest.reshape(-1)).reshape([*likeliest.shape, *support.shape[1:]])
        return context.rerun(mode.detach().to(value.dtype).expand(value.shape).unsqueeze(0)).signal[0]

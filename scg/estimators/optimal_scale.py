"""A baseline scaled for least variance, its scale fitted to the other draws."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from scg.estimators.base import Reads, SiteContext, SiteInfo, Support
from scg.estimators.baselines import Baseline
from scg.estimators.rerun import sum_like


@dataclass(frozen=True)
class OptimalScale(Baseline):
    r"""A control variate :math:`a\, h\, \nabla_\theta \log p_\theta(z)` with the scale of least variance.

    .. math:: a_k = \frac{\sum_{j \ne k} Q_j h_j s_j^2}{\sum_{j \ne k} h_j^2 s_j^2},
              \qquad s_j = \nabla \log p_\theta(z_j) \text{ in the distribution's parameters}

    With :math:`h = 1` it is the optimal constant baseline (Weaver and Tao 2001; Ranganath et al. 2014, eq. 8), which
    the mean is not. Fitted leave-one-out over the i.i.d. draws, hence unbiased.

    Args:
        of: the baseline ``h``; None for one.
    """

    of: Baseline | None = None

    name: ClassVar[str] = "optimal_scale"
    draws: ClassVar[int] = 2

    @property
    def learned(self) -> bool:  # type: ignore[override]
        return self.of is not None and self.of.learned

    @property
    def evaluations(self) -> int:  # type: ignore[override]
        return 0 if self.of is None else self.of.evaluations

    @property
    def reads(self) -> Reads:
        return () if self.of is None else self.of.reads

    def check(self, site: SiteInfo) -> Support:
        return super().check(site) if self.of is None else self.of.check(site)

    def make_state(self, site: SiteInfo, batch_dims: tuple[int, ...]) -> nn.Module | None:
        return None if self.of is None else self.of.make_state(site, batch_dims)

    def value(self, context: SiteContext) -> Tensor:
        h: Any = None if self.of is None else self.of.value(context)
        h = 1.0 if h is None else h
        square = self._squared_score(context)
        if isinstance(h, Tensor):
            h = h.expand(torch.broadcast_shapes(h.shape, context.signal.shape))
        square = sum_like(square, context.signal)  # elements that share a signal share the scale
        up, down = context.signal * h * square, h * h * square
        up, down = (part.sum(context.iid, keepdim=True) - part for part in (up, down))
        scale = torch.where(down > 0, up / torch.where(down > 0, down, 1.0), 0.0)
        found: Tensor = scale * h
        return found

    def _squared_score(self, context: SiteContext) -> Tensor:
        """``[*dims | *elements]``"""
        dist, free, _ = context.variables()
        log_p = dist.log_prob(context.value).sum()
        rank = context.value.dim() - context.site.event_ndim
        total: Any = 0.0
        for variable in free:
            squared = context.gradient(log_p, variable) ** 2
            total = total + (squared.flatten(rank).sum(-1) if squared.dim() > rank else squared)
        assert isinstance(total, Tensor)
        return total

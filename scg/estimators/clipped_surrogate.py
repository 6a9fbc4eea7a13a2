"""Proximal policy optimisation: a clipped surrogate for several steps on the same replayed draws."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from scg.estimators.base import SiteContext, SiteInfo, Support
from scg.estimators.baselines import Baseline
from scg.estimators.importance_weighted import log_ratio_of
from scg.estimators.learned import Learned
from scg.estimators.score_function import ScoreFunction
from scg.estimators.targets import target_of


@dataclass(frozen=True)
class ClippedSurrogate(ScoreFunction):
    r"""The likelihood ratio times the advantage, without gradient where it has moved far enough.

    .. math:: S = \max\big(r A,\ \mathrm{clip}(r, 1 - \epsilon, 1 + \epsilon)\, A\big), \qquad
              r = p_\theta(z) / \beta(z), \qquad A = Q - b

    Schulman et al. 2017, eq. 7, for costs, which are minimised. Biased: it leaves out the ratios of earlier draws and
    stops at the clip; at :math:`\beta = p_\theta` it is the score function. With a `Learned` baseline the advantage is
    its target (`TDLambda`: generalised advantage estimation) less its prediction. One evaluation. Replayed sites alone.

    Args:
        baseline: as of ``score_function``, or `Standardised`.
        behaviour: name of the input that holds :math:`\log \beta(z)`, one number for each element.
        clip: :math:`\epsilon`.
    """

    behaviour: str = "behaviour"
    clip: float = 0.2

    name: ClassVar[str] = "clipped_surrogate"
    unbiased: ClassVar[bool] = False
    orders: ClassVar[int] = 1
    bounds: ClassVar[bool] = False
    reference: ClassVar[str] = "Schulman et al. 2017"
    formula: ClassVar[str] = r"\nabla_\theta \max(r A, \mathrm{clip}(r, 1 - \epsilon, 1 + \epsilon) A)"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.clip < 1:
            raise ValueError(f"clipped_surrogate: clip={self.clip} must lie between 0 and 1")

    @property
    def logged(self) -> Mapping[str, bool]:
        return {self.behaviour: True}

    @property
    def biases(self) -> tuple[str, ...]:
        found = ["a clipped ratio, and none of earlier draws"]
        if isinstance(self.baseline, Baseline):
            found += self.baseline.biases
        return tuple(found)

    @classmethod
    def supports(cls, site: SiteInfo) -> Support:
        if not site.replayed:
            return Support(False, "its draw is not replayed: it comes from its own distribution")
        return super().supports(site)

    def term(self, context: SiteContext) -> Tensor:
        return clipped(log_ratio_of(context, self.behaviour), self.advantage(context).detach(), self.clip)

    def advantage(self, context: SiteContext) -> Tensor:
        """``[*dims | *elements]``"""
        baseline = self._baseline(context)
        if isinstance(baseline, Learned):
            predicted = baseline.value(context)
            return target_of(context, baseline, baseline.target) - predicted
        return baseline.advantage(context)


def clipped(log_ratio: Tensor, advantage: Tensor, clip: float) -> Tensor:
    """The surrogate of each element."""
    ratio = log_ratio.exp()
    return torch.maximum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)

"""The score function estimator (REINFORCE, likelihood ratio), with a baseline composed into it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from scg.estimators.base import YES, Predicts, Reads, ScoreEstimator, SiteContext, SiteInfo, Support
from scg.estimators.baseline_names import BASELINES
from scg.estimators.baselines import Baseline, LeaveOneOut, MovingAverage, NoBaseline
from scg.estimators.learned import Learned
from scg.estimators.lookup import near_miss

AUTO = "auto"


@dataclass(frozen=True)
class ScoreFunction(ScoreEstimator):
    r"""Multiplies the score of the draw by the credited cost-to-go, less a baseline.

    .. math:: \hat g = (Q - b) \nabla_\theta \log p_\theta(z)

    Williams 1992; Schulman et al. 2015, theorem 1. Unbiased for every distribution whose support does not move with its
    parameters, also below discontinuous and non-differentiable costs. One evaluation a draw.

    Args:
        baseline: ``None``, ``"moving_average"``, ``"leave_one_out"`` (needs two or more i.i.d. draws), ``"auto"``
            (leave-one-out where there are draws enough, else a moving average), ``"self_critic"`` (the cost at the
            mode), ``"optimal_scale"``, ``"learned"``, ``"input_dependent"``, a `Baseline` object, or an ``nn.Module``
            of the model's tensor inputs (see `Learned`).
    """

    baseline: Any = AUTO

    name: ClassVar[str] = "score_function"
    unbiased: ClassVar[bool] = True
    orders: ClassVar[int] = 2
    bounds: ClassVar[bool] = True
    reference: ClassVar[str] = "Williams 1992; Schulman et al. 2015"
    formula: ClassVar[str] = r"(Q - b)\, \nabla_\theta \log p_\theta(z)"

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.baseline, str) and self.baseline != AUTO and self.baseline not in BASELINES:
            raise ValueError(near_miss("baseline", self.baseline, [*BASELINES, AUTO]))
        if self.unbiased and isinstance(self.baseline, Baseline) and not self.baseline.unbiased:
            raise ValueError(
                f"{self.name}: {self.baseline.name!r} is biased; clipped_surrogate and group_relative take it"
            )

    @classmethod
    def supports(cls, site: SiteInfo) -> Support:
        if site.pathwise_only:
            return Support(False, site.pathwise_only)
        if site.bound:
            return Support(False, f"the support of {site.family} moves with its parameter {site.bound}")
        return YES

    def resolve(self, draws: int) -> Baseline:
        """The baseline in force for a site with ``draws`` i.i.d. draws."""
        if self.baseline is None:
            return NoBaseline()
        if isinstance(self.baseline, Baseline):
            return self.baseline
        if isinstance(self.baseline, nn.Module):
            return Learned(self.baseline)
        if self.baseline == AUTO:
            return LeaveOneOut() if draws >= 2 else MovingAverage()
        return BASELINES[self.baseline]()

    def check(self, site: SiteInfo) -> Support:
        return self.supports(site) and self.resolve(1).check(site)

    def evaluations(self, site: SiteInfo) -> int:
        return (self.samples or 1) * (1 + self.resolve(1).evaluations)

    @property
    def learned(self) -> bool:
        return self.resolve(1).learned

    @property
    def predictor(self) -> Predicts | None:
        baseline = self.resolve(1)
        return baseline if isinstance(baseline, Learned) else None

    def reads(self) -> Reads:
        return self.resolve(self.samples or 1).reads

    def make_state(self, site: SiteInfo, batch_dims: tuple[int, ...], draws: int) -> nn.Module | None:
        return self.resolve(draws).make_state(site, batch_dims)

    def term(self, context: SiteContext) -> Tensor:
        return context.score_times(self._baseline(context).advantage(context))

    def baseline_value(self, context: SiteContext) -> Tensor | None:
        """The baseline by itself, for surrogates of higher order."""
        return self._baseline(context).value(context)

    def _baseline(self, context: SiteContext) -> Baseline:
        return self.resolve(math.prod(context.signal.shape[axis] for axis in context.iid))

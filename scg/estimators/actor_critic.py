"""Actor-critic: the advantage is a bootstrapped target less the value function."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from scg.estimators.base import YES, Predicts, Reads, ScoreEstimator, SiteContext, SiteInfo, Support
from scg.estimators.learned import Learned
from scg.estimators.targets import TDLambda, target_of


@dataclass(frozen=True)
class ActorCritic(ScoreEstimator):
    r"""The score times a bootstrapped cost-to-go less its prediction, which is fitted to the same target.

    .. math:: \hat g = (G - V(C)) \nabla_\theta \log p_\theta(z)

    Schulman et al. 2016 (generalised advantage estimation); on any graph, Weber et al. 2019. :math:`G` takes the costs
    down to a cut as they were drawn and predictions for those behind it. Biased as far as these predictions are wrong;
    unbiased are a target of ``TDLambda(1.0)`` and, with any target, ``score_function`` with the same ``Learned`` as its
    baseline. One evaluation.

    Args:
        value: the value function :math:`V` with its target.
    """

    value: Learned = Learned(target=TDLambda())

    name: ClassVar[str] = "actor_critic"
    unbiased: ClassVar[bool] = False
    reference: ClassVar[str] = "Schulman et al. 2016"
    formula: ClassVar[str] = r"(G - V)\, \nabla_\theta \log p_\theta(z)"

    @classmethod
    def supports(cls, site: SiteInfo) -> Support:
        return scored(site)

    @property
    def learned(self) -> bool:
        return True

    @property
    def predictor(self) -> Predicts:
        return self.value

    def reads(self) -> Reads:
        return self.value.reads

    def make_state(self, site: SiteInfo, batch_dims: tuple[int, ...], draws: int) -> nn.Module | None:
        return self.value.make_state(site, batch_dims)

    def term(self, context: SiteContext) -> Tensor:
        predicted = self.value.value(context)
        return context.score_times(target_of(context, self.value, self.value.target) - predicted)


def scored(site: SiteInfo) -> Support:
    """Whether a score may stand for the derivative."""
    if site.pathwise_only:
        return Support(False, site.pathwise_only)
    if site.bound:
        return Support(False, f"the support of {site.family} moves with its parameter {site.bound}")
    return YES

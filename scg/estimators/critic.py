"""Critics: learned predictions of the cost-to-go that see the draw."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from scg.estimators.actor_critic import scored
from scg.estimators.base import Predicts, Reads, ScoreEstimator, SiteContext, SiteInfo, Support
from scg.estimators.implicit import WITH_CDF, reparameterized
from scg.estimators.rerun import sum_like
from scg.estimators.targets import MonteCarlo, Target, in_units, misfit, target_of
from scg.estimators.value_nets import ValueNet, WithTarget, check_decay


@dataclass(frozen=True)
class LearnedCritic(ScoreEstimator):
    """What all critics share: a prediction ``q(z, C)``, fitted by least squares in the same ``backward()``."""

    module: nn.Module | None = None
    inputs: tuple[str, ...] | None = None
    target: Target = MonteCarlo()
    hidden: int = 32
    slow: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_decay(self.name, self.slow)

    @property
    def learned(self) -> bool:
        return True

    @property
    def predictor(self) -> Predicts:
        return self

    def reads(self) -> Reads:
        return "critic" if self.module is None else self.inputs

    def make_state(self, site: SiteInfo, batch_dims: tuple[int, ...], draws: int) -> nn.Module | None:
        module = self.module or ValueNet(site, batch_dims, self.hidden, sees_outcome=True)
        return module if self.slow is None else WithTarget(module)

    def prediction(self, context: SiteContext) -> Tensor:
        """At the draw, detached; of the slow copy, where there is one.  ``[*dims | *elements]``"""
        key = (context.site.name, "prediction")
        if key not in context.memo:
            context.memo[key] = self.at(context, context.value, slow=True).detach()
        return context.memo[key]  # type: ignore[no-any-return]

    def at_draw(self, context: SiteContext) -> Tensor:
        """As `prediction`, of the critic itself.  ``[*dims | *elements]``"""
        return self.prediction(context) if self.slow is None else self.at(context, context.value).detach()

    def at(self, context: SiteContext, outcome: Tensor, *, slow: bool = False) -> Tensor:
        """The prediction where the site is ``[*dims | *elements | *event]``.  ``[*dims | *elements]``"""
        module = context.state
        if isinstance(module, WithTarget):
            module = module.slow if slow else module.online
        if self.module is None:
            return in_units(context, module(context.read_nodes(module.names), outcome))
        predicted: Tensor = module(outcome, *context.read(self.inputs))
        if predicted.shape[-1:] == (1,) and predicted.dim() > outcome.dim() - context.site.event_ndim:
            predicted = predicted.squeeze(-1)
        return in_units(context, predicted)

    def fit(self, context: SiteContext) -> None:
        """Adds the squared error of the prediction, which reaches its own parameters alone."""
        predicted = self.at(context, context.value)
        context.add(misfit(context, target_of(context, self, self.target).detach(), predicted))
        if self.slow is not None:
            self.prediction(context)  # of the copy as it was, for the sites above
            if context.training:
                context.state.follow(self.slow)

    def expected(self, context: SiteContext) -> Tensor:
        r"""``sum over v of p(v) q(v)``, with the gradient of ``p`` alone.  ``[*dims | *elements]``"""
        support, rank = context.site.support, len(context.site.element_shape)
        assert support is not None
        lead = context.value.dim() - context.site.event_ndim
        rows = support.reshape([len(support), *[1] * lead, *support.shape[1:]]).expand([-1, *context.value.shape])
        q = torch.stack([self.at(context, row) for row in rows.unbind(0)]).detach()
        if q.shape[q.dim() - rank :] != context.value.shape[lead - rank : lead]:
            raise ValueError(
                f"{self.name} at %{context.site.name}: its module returns {list(q.shape[1:])}; summed over outcomes, "
                f"it must return one number for each element, {list(context.value.shape[:lead])}, of that element alone"
            )
        return (context.log_prob_of(rows).exp() * q).sum(0)

    def path(self, context: SiteContext) -> Tensor:
        """``dq/dz`` times the draw, reparameterized through its distribution function.  ``[*dims | *elements]``"""
        point = context.variable(context.value)
        slope = context.gradient(self.at(context, point).sum(), point)
        return slope * reparameterized(context.dist, context.value)


@dataclass(frozen=True)
class Critic(LearnedCritic):
    r"""A critic as control variate: what it predicts is taken from the cost, and its own gradient is put back.

    .. math:: \hat g = (Q - q(z, C))\, \nabla_\theta \log p_\theta(z) + \nabla_\theta E_{p_\theta}[q(z, C)]

    Weber et al. 2019; Gu et al. 2017 (Q-Prop). The expectation is a sum over outcomes where the support is finite, else
    the derivative of the critic at the reparameterized draw. Unbiased for any critic. One evaluation. Any finite
    support; Normal, LogNormal, Laplace, Exponential, Cauchy, Gumbel, Weibull.

    Args:
        module: of the draw and the values it reads, ``module(z, *values)``, one number for each element, of that
            element alone (for continuous draws also one for all elements that share a cost); None for a small network.
        inputs: names of the values a module reads beside the draw; None for all tensor inputs. The small network reads
            the critic's sufficient context (`Graph.context`).
        target: what it is fitted to: `MonteCarlo`, `TD` or `TDLambda`.
        hidden: width of the small network.
        slow: decay of a slowly following copy that targets are made of; None for no copy.
    """

    name: ClassVar[str] = "critic"
    unbiased: ClassVar[bool] = True
    reference: ClassVar[str] = "Weber et al. 2019"
    formula: ClassVar[str] = r"(Q - q(z))\, \nabla_\theta \log p_\theta(z) + \nabla_\theta E[q(z)]"

    @classmethod
    def supports(cls, site: SiteInfo) -> Support:
        fits = _summable(site) or _has_path(site)
        reason = f"{site.family} has neither a finite support nor a distribution function with a derivative"
        return scored(site) and (fits if fits else Support(False, reason))

    def term(self, context: SiteContext) -> Tensor:
        self.fit(context)
        term = context.score_times(context.signal - self.at_draw(context))
        own = self.expected(context) if _summable(context.site) else self.path(context)
        return term + sum_like(own, term)


@dataclass(frozen=True)
class CriticOnly(LearnedCritic):
    r"""A critic in the place of the cost: the score meets no drawn cost at all.

    .. math:: \hat g = q(z, C)\, \nabla_\theta \log p_\theta(z)

    Sutton et al. 2000, theorem 1; Weber et al. 2019. Where the support is finite its mean over outcomes is subtracted.
    Biased as far as the critic is wrong. One evaluation. Options as of `critic`.
    """

    name: ClassVar[str] = "critic_only"
    unbiased: ClassVar[bool] = False
    reference: ClassVar[str] = "Sutton et al. 2000"
    formula: ClassVar[str] = r"q(z)\, \nabla_\theta \log p_\theta(z)"

    @classmethod
    def supports(cls, site: SiteInfo) -> Support:
        return scored(site)

    def term(self, context: SiteContext) -> Tensor:
        self.fit(context)
        predicted = self.at_draw(context)
        if _summable(context.site):
            predicted = predicted - self.expected(context).detach()
        return context.score_times(predicted)


@dataclass(frozen=True)
class GradientCritic(LearnedCritic):
    r"""The derivative of a differentiable critic in the place of the cost's: no path through the cost is needed.

    .. math:: \hat g = \nabla_z q(z, C)\, \nabla_\theta z

    Silver et al. 2014; Heess et al. 2015, SVG(0); Weber et al. 2019. The draw is reparameterized implicitly through its
    distribution function. Biased as far as the critic's derivative is wrong. One evaluation. Normal, LogNormal,
    Laplace, Exponential, Cauchy, Gumbel, Weibull. Options as of `critic`.
    """

    name: ClassVar[str] = "gradient_critic"
    unbiased: ClassVar[bool] = False
    reference: ClassVar[str] = "Heess et al. 2015"
    formula: ClassVar[str] = r"\nabla_z q(z)\, \nabla_\theta z"

    @classmethod
    def supports(cls, site: SiteInfo) -> Support:
        return scored(site) and _has_path(site)

    def term(self, context: SiteContext) -> Tensor:
        self.fit(context)
        return self.path(context)


def _summable(site: SiteInfo) -> Support:
    return Support(site.support is not None, f"{site.family} has no finite support of known size")


def _has_path(site: SiteInfo) -> Support:
    if issubclass(site.template.cls, WITH_CDF):
        return Support(True)
    return Support(False, f"{site.family} has no distribution function with a derivative in torch")

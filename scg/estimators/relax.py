"""REBAR and RELAX: the score function with a relaxed, reparameterized control variate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from scg.estimators.base import RerunEstimator, SiteContext, SiteInfo, Support
from scg.estimators.control_variate import ControlVariate, small_network, surrogate_of, times
from scg.estimators.extremes import finite
from scg.estimators.relaxed import Discrete, logits_of, noise_of


@dataclass(frozen=True)
class Relax(RerunEstimator):
    r"""The score function of the draw, with the cost at a relaxed draw and a network as learned control variate.

    .. math::
        \hat g = (Q(b) - c_\phi(\tilde z))\, \nabla_\theta \log p_\theta(b)
                 + \nabla_\theta c_\phi(z) - \nabla_\theta c_\phi(\tilde z), \qquad
        c_\phi(z) = \eta\, Q(\sigma_\tau(z)) + r_\rho(\sigma_\tau(z))

    Grathwohl et al. 2018, eq. 8 and section 3.2: ``z`` is the perturbed logits that are rounded to the draw ``b``, and
    ``z~`` another draw of them given ``b``, both reparameterized. The temperature, the scale and the network are
    trained by the variance of the gradient in the site's logits, in the same ``backward()``. Unbiased for any values,
    where the cost is continuous and differentiable in the relaxed draw. Two further evaluations, one of them
    differentiated. Bernoulli, OneHotCategorical.

    Args:
        temperature: where :math:`\tau` starts.
        hidden: width of the network's hidden layer.
        through_cost: ``False`` leaves the relaxed cost out and keeps the network alone, for costs that have no
            derivative; then nothing is evaluated again.
    """

    temperature: float = 0.5
    hidden: int = 10
    through_cost: bool = True

    name: ClassVar[str] = "relax"
    unbiased: ClassVar[bool] = True
    one_hot: ClassVar[bool] = True
    reference: ClassVar[str] = "Grathwohl et al. 2018"
    formula: ClassVar[str] = (
        r"(Q(b) - c_\phi(\tilde z))\, \nabla_\theta \log p_\theta(b) + \nabla_\theta c_\phi(z) - "
        r"\nabla_\theta c_\phi(\tilde z)"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.temperature > 0:
            raise ValueError(f"{self.name}: temperature={self.temperature} must be positive")
        if self.hidden < 0:
            raise ValueError(f"{self.name}: hidden={self.hidden} must not be negative")
        if not self.through_cost and self.hidden == 0:
            raise ValueError(f"{self.name}: through_cost=False and hidden=0 leave no control variate")

    @classmethod
    def supports(cls, site: SiteInfo) -> Support:
        if site.pathwise_only:
            return Support(False, site.pathwise_only)
        if site.replayed:
            return Support(False, "a replayed outcome has no relaxed draw behind it")
        if site.family == "Categorical":
            return Support(False, site.why_no_one_hot)
        if not issubclass(site.template.cls, Discrete):
            return Support(False, f"{site.family} has no relaxation here: Bernoulli and OneHotCategorical have")
        return Support(True)

    def check(self, site: SiteInfo) -> Support:
        found = self.supports(site)
        if not found or not self.through_cost:
            return found
        broken = site.rerun_break or site.pathwise_break
        if broken is None:
            return found
        hint = "; Relax(through_cost=False) learns from the draws alone" if self.hidden else ""
        return Support(False, f"{broken}{hint}")

    @property
    def learned(self) -> bool:
        return True

    def evaluations(self, site: SiteInfo) -> int:
        return 3 if self.through_cost else 1

    def make_state(self, site: SiteInfo, batch_dims: tuple[int, ...], draws: int) -> nn.Module:
        network = small_network(site, self.hidden) if self.hidden else None
        return ControlVariate(self.temperature, self.through_cost, network)

    def term(self, context: SiteContext) -> Tensor:
        assert isinstance(context.dist, Discrete)
        state, event = context.state, context.site.event_ndim
        noise, logits = noise_of(context.dist), finite(logits_of(context.dist)).expand(context.value.shape)
        free = context.variable(logits)
        leaf = torch.log_softmax(free, -1) if event else free
        b = context.value.to(leaf.dtype)
        fixed = leaf.detach()
        z = leaf + (noise.given(fixed, b) - fixed)  # its noise given the draw, its derivative unconditional
        relaxed = noise.soft(torch.stack([z, noise.given(leaf, b)]) / state.temperature)
        seen = torch.zeros_like(context.signal)  # c(z~), as each element is credited with it
        moved = torch.zeros_like(context.signal).sum()  # c(z) - c(z~), whose derivative counts
        if self.through_cost:
            found = context.rerun(relaxed.to(context.value.dtype), differentiable=True)
            assert found.surrogate is not None
            seen = seen + state.scale * found.signal[1]
            moved = moved + state.scale * (found.surrogate[0] - found.surrogate[1])
        if self.hidden:
            learnt = state.free(context, 2 * relaxed - 1)
            seen = seen + learnt[1]
            moved = moved + (learnt[0] - learnt[1]).sum()
        score = b - (torch.softmax(fixed, -1) if event else torch.sigmoid(fixed))
        path = context.gradient(moved, free, differentiable=context.training)
        return surrogate_of(context, [times(context.signal - seen, score) + path], [logits])


@dataclass(frozen=True)
class Rebar(Relax):
    r"""The score function of the draw, with the cost at a relaxed draw as control variate.

    .. math::
        \hat g = (Q(b) - \eta\, Q(\sigma_\tau(\tilde z)))\, \nabla_\theta \log p_\theta(b)
                 + \eta\, \nabla_\theta Q(\sigma_\tau(z)) - \eta\, \nabla_\theta Q(\sigma_\tau(\tilde z))

    Tucker et al. 2017, eq. 5, as restated by Grathwohl et al. 2018: `Relax` without the network. The temperature and
    :math:`\eta` are trained by the variance of the gradient, in the same ``backward()``. Unbiased for any of their
    values. Two further evaluations, one of them differentiated. Bernoulli, OneHotCategorical.
    """

    hidden: int = 0

    name: ClassVar[str] = "rebar"
    reference: ClassVar[str] = "Tucker et al. 2017"
    formula: ClassVar[str] = (
        r"(Q(b) - \eta Q(\sigma_\tau(\tilde z)))\, \nabla_\theta \log p_\theta(b) + "
        r"\eta \nabla_\theta Q(\sigma_\tau(z)) - \eta \nabla_\theta Q(\sigma_\tau(\tilde z))"
    )

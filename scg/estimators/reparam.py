"""Pathwise gradients through a reparameterized draw."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.distributions import (
    Cauchy,
    Distribution,
    Laplace,
    MixtureSameFamily,
    Normal,
    OneHotCategoricalStraightThrough,
)

from scg.estimators.base import YES, PathwiseEstimator, SiteInfo, Support
from scg.template import Template

_NO_SECOND_DERIVATIVE = {
    "Gamma", "Chi2", "InverseGamma", "Beta", "Dirichlet", "StudentT", "FisherSnedecor", "LKJCholesky",
    "MixtureSameFamily",
}  # fmt: skip
"""Families whose draws are differentiated by a kernel that cannot be differentiated again."""


@dataclass(frozen=True)
class Reparam(PathwiseEstimator):
    r"""Differentiates through the draw.

    .. math:: \nabla_\theta E[f(z)] = E[\nabla_\theta f(g_\theta(\epsilon))], \quad z = g_\theta(\epsilon)

    Kingma and Welling 2014; implicitly for Gamma, Beta, Dirichlet and for mixtures of Normal, Laplace or Cauchy
    components: Figurnov, Mohamed and Mnih 2018. Unbiased where the whole path from the draw to every credited cost is
    continuous and differentiable. One evaluation.

    Args:
        path_derivative: leave out the part of the derivative of the site's own log density that reaches its parameters
            directly; its mean is zero, and near the optimum of a variational bound the rest has no variance
            ("sticking the landing"; Roeder, Wu and Duvenaud 2017).
    """

    path_derivative: bool = False

    name: ClassVar[str] = "reparam"
    unbiased: ClassVar[bool] = True
    orders: ClassVar[int] = 2
    reference: ClassVar[str] = "Kingma and Welling 2014"
    formula: ClassVar[str] = r"\nabla_\theta f(g_\theta(\epsilon))"

    @classmethod
    def supports(cls, site: SiteInfo) -> Support:
        if site.replayed:
            return Support(False, "a replayed outcome has no path back to its parameters")
        if issubclass(site.template.cls, OneHotCategoricalStraightThrough):
            return Support(
                False, "its rsample is the straight-through estimator, which is biased: ask for that by name"
            )
        if not site.template.has_rsample and not _is_mixture(site.template):
            return Support(False, f"{site.family} has no rsample")
        if site.pathwise_break:
            return Support(False, site.pathwise_break)
        return YES

    def check(self, site: SiteInfo) -> Support:
        found = self.supports(site)
        if found and site.order > 1 and site.family in _NO_SECOND_DERIVATIVE:
            return Support(False, f"the draw of {site.family} has no second derivative")
        if found and site.order > 1 and self.path_derivative:
            return Support(False, "path_derivative stops a derivative whose own derivative has a mean")
        if found and self.path_derivative and site.bound:
            return moving_support(site)
        if found and self.path_derivative and site.score_break:
            return Support(
                False,
                "path_derivative needs costs that are linear in the site's own log density, so that the mean of the "
                f"score is zero; {site.score_break} is not",
            )
        return found

    @property
    def stops_score(self) -> bool:
        return self.path_derivative

    def draw(self, dist: Distribution, shape: torch.Size) -> Tensor:
        return _implicit(dist, shape) if isinstance(dist, MixtureSameFamily) else dist.rsample(shape)


def moving_support(site: SiteInfo) -> Support:
    """The refusal of a support that moves with a parameter: there the mean of the score is not zero."""
    return Support(
        False, f"the support of {site.family} moves with its parameter {site.bound}, so its score has a mean"
    )


def _is_mixture(template: Template) -> bool:
    """A mixture whose distribution function is known and smooth in all its parameters."""
    return template.component in (Normal, Laplace, Cauchy)


def _implicit(dist: Distribution, shape: torch.Size) -> Tensor:
    r"""A draw with :math:`\nabla_\theta z = -\nabla_\theta F_\theta(z) / p_\theta(z)` (Figurnov et al. 2018)."""
    value = dist.sample(shape).detach()
    below = dist.cdf(value)
    return value - (below - below.detach()) / dist.log_prob(value).exp().detach()

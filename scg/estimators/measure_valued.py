"""Measure-valued (weak) derivatives: the derivative of a density as a difference of two densities."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.distributions import (
    Bernoulli,
    Binomial,
    Categorical,
    Distribution,
    Exponential,
    Gamma,
    Geometric,
    Laplace,
    MultivariateNormal,
    Normal,
    OneHotCategorical,
    Poisson,
    Uniform,
    Weibull,
)

from scg.errors import EstimatorError
from scg.estimators.base import RerunEstimator, SiteContext, SiteInfo, Support
from scg.estimators.local_expectation import LocalExpectation


@dataclass(frozen=True)
class Triple:
    r"""One parameter's weak derivative, :math:`\partial_\theta E f = c\,(E f(z^+) - E f(z^-))`."""

    parameter: str
    c: Tensor | float
    plus: Tensor
    """Drawn together with the site's draw ``z``.  ``[*dims | *elements]``"""
    minus: Tensor
    known: Tensor | float | None = None
    """Where one of the two is ``z`` itself: 1 if it is ``minus``, -1 if it is ``plus``."""

    @property
    def other(self) -> Tensor:
        """The one of the two that is not ``z``."""
        if isinstance(self.known, Tensor):
            return torch.where(self.known > 0, self.plus, self.minus)
        return self.plus if self.known == 1 else self.minus


def _exponential_like(z: Tensor) -> Tensor:
    return torch.empty_like(z).exponential_()


def _normal(dist: Any, z: Tensor) -> Iterator[Triple]:
    loc, scale = dist.loc.detach(), dist.scale.detach()
    weibull = scale * (2 * _exponential_like(z)).sqrt()  # density w exp(-w^2 / 2)
    yield Triple("loc", 1 / (scale * math.sqrt(2 * math.pi)), loc + weibull, loc - weibull)
    n = (z - loc) / scale
    maxwell = torch.copysign((n**2 + 2 * _exponential_like(z)).sqrt(), n)  # double-sided; n is it times a uniform
    yield Triple("scale", 1 / scale, loc + scale * maxwell, z, known=1.0)


def _laplace(dist: Any, z: Tensor) -> Iterator[Triple]:
    loc, scale = dist.loc.detach(), dist.scale.detach()
    mirrored = 2 * loc - z
    above = torch.where(z > loc, -1.0, 1.0)
    yield Triple("loc", 1 / (2 * scale), torch.maximum(z, mirrored), torch.minimum(z, mirrored), known=above)
    yield Triple("scale", 1 / scale, z + torch.copysign(scale * _exponential_like(z), z - loc), z, known=1.0)


def _uniform(dist: Any, z: Tensor) -> Iterator[Triple]:
    low, high = dist.low.detach(), dist.high.detach()
    yield Triple("low", 1 / (high - low), z, low.expand_as(z), known=-1.0)
    yield Triple("high", 1 / (high - low), high.expand_as(z), z, known=1.0)


def _exponential(dist: Any, z: Tensor) -> Iterator[Triple]:
    rate = dist.rate.detach()
    yield Triple("rate", 1 / rate, z, z + _exponential_like(z) / rate, known=-1.0)


def _gamma(dist: Any, z: Tensor) -> Iterator[Triple]:
    rate = dist.rate.detach()
    yield Triple("rate", dist.concentration.detach() / rate, z, z + _exponential_like(z) / rate, known=-1.0)


def _weibull(dist: Any, z: Tensor) -> Iterator[Triple]:
    scale, k = dist.scale.detach(), dist.concentration.detach()
    longer = scale * ((z / scale) ** k + _exponential_like(z)) ** (1 / k)
    yield Triple("scale", k / scale, longer, z, known=1.0)


def _poisson(dist: Any, z: Tensor) -> Iterator[Triple]:
    yield Triple("rate", 1.0, z + 1, z, known=1.0)


def _binomial(dist: Any, z: Tensor) -> Iterator[Triple]:
    count = dist.total_count.detach()
    success = torch.bernoulli((z / count.clamp(min=1)).expand_as(z))  # of one trial picked at random
    rest = z - success  # the others: Binomial(n - 1)
    yield Triple("probs", count, rest + 1, rest, known=1 - 2 * success)


def _geometric(dist: Any, z: Tensor) -> Iterator[Triple]:
    p = dist.probs.detach()
    more = torch.floor(_exponential_like(z) / -torch.log1p(-p))  # Geometric(p)
    yield Triple("probs", 1 / p, z, z + more + 1, known=-1.0)


TRIPLES: dict[type[Distribution], Callable[[Any, Tensor], Iterator[Triple]]] = {
    Normal: _normal,
    Laplace: _laplace,
    Uniform: _uniform,
    Exponential: _exponential,
    Gamma: _gamma,
    Weibull: _weibull,
    Poisson: _poisson,
    Binomial: _binomial,
    Geometric: _geometric,
}
"""Weak derivatives by distribution; those of Bernoulli and the categoricals are sums over single outcomes."""

_SUMMED = (Bernoulli, Categorical, OneHotCategorical)
_WITHOUT = {Gamma: ("concentration",), Weibull: ("concentration",)}
"""Parameters without a triple."""


@dataclass(frozen=True)
class MeasureValued(RerunEstimator):
    r"""The difference of the cost-to-go at two outcomes of each element, for each parameter.

    .. math:: \hat g = \sum_i c_i\,(Q_i(z_{-i}, z_i^+) - Q_i(z_{-i}, z_i^-))\,\nabla_\theta \theta_i

    Pflug 1989; Heidergott et al. 2010; Mohamed et al. 2020, section 6 and table 1. Unbiased, also below costs that are
    not differentiable. Each of the ``D`` elements that one cost may see takes one or two evaluations a parameter (three
    for both parameters of a Normal, three a dimension for a multivariate one); where one outcome of a pair can be the
    draw itself, it is not evaluated again. Normal, MultivariateNormal, Laplace, Uniform, Exponential, Poisson,
    Binomial, Geometric, Bernoulli, Categorical, OneHotCategorical; of Gamma the rate and of Weibull the scale.

    Args:
        coupled: draw the two outcomes together (lower variance); else independently.
    """

    coupled: bool = True

    name: ClassVar[str] = "measure_valued"
    unbiased: ClassVar[bool] = True
    reference: ClassVar[str] = "Pflug 1989; Mohamed et al. 2020"
    formula: ClassVar[str] = r"\sum_i c_i\,(Q_i(z_i^+) - Q_i(z_i^-))\,\nabla_\theta \theta_i"

    @classmethod
    def supports(cls, site: SiteInfo) -> Support:
        family = site.template.cls
        if family is not MultivariateNormal and family not in TRIPLES and not issubclass(family, _SUMMED):
            return Support(False, f"no weak derivative is known for {site.family}")
        return super().supports(site)

    def evaluations(self, site: SiteInfo) -> int:
        family = site.template.cls
        if issubclass(family, _SUMMED):
            return LocalExpectation().evaluations(site)
        if family is MultivariateNormal:
            return 1 + 3 * site.shape[-1] * site.flips
        return 1 + (3 if family is Normal else 2 if family in (Laplace, Uniform) else 1) * site.flips

    def term(self, context: SiteContext) -> Tensor:
        family = context.site.template.cls
        if issubclass(family, _SUMMED):
            return LocalExpectation().term(context)
        if family is MultivariateNormal:
            return _multivariate(context)
        self._refuse_others(context)
        triples = [t for t in TRIPLES[family](context.dist, context.value) if _learned(context, t.parameter)]
        if not self.coupled:
            fresh = context.dist.expand(context.value.shape).sample().detach()
            apart = {t.parameter: t.minus for t in TRIPLES[family](context.dist, fresh)}
            triples = [Triple(t.parameter, t.c, t.plus, apart[t.parameter]) for t in triples]
        rows: list[Tensor] = []
        for t in triples:
            rows += [t.plus, t.minus] if t.known is None else [t.other]
        at = iter(context.change_one(torch.stack(rows)).unbind(0))
        total: Tensor | None = None
        for t in triples:
            gain = next(at) - next(at) if t.known is None else t.known * (next(at) - context.signal)
            part = getattr(context.dist, t.parameter) * (t.c * gain).detach()
            total = part if total is None else total + part
        assert total is not None
        return total

    def _refuse_others(self, context: SiteContext) -> None:
        for name in _WITHOUT.get(context.site.template.cls, ()):
            if _learned(context, name):
                raise EstimatorError(
                    f"%{context.site.name}: {self.name!r} has no weak derivative for {name!r} of "
                    f"{context.site.family}; use 'reparam' or 'score_function', or detach {name!r}"
                )


def _learned(context: SiteContext, parameter: str) -> bool:
    return bool(getattr(context.dist, parameter).requires_grad)


def _multivariate(context: SiteContext) -> Tensor:
    r"""Mean and triangular scale: in whitened coordinates, one normal each.

    With :math:`z = \mu + L \epsilon`, :math:`A = L^{-1}` and ``shift[k]``, ``spread[k]`` the derivatives in the mean
    and the scale of :math:`\epsilon_k`, a change of the parameters moves :math:`\epsilon` by
    :math:`A\,d\mu + A\,dL\,\epsilon`, of which the diagonal of :math:`A\,dL` scales.
    """
    dist: Any = context.dist
    value, size = context.value, context.value.shape[-1]
    loc, tril = dist.loc, dist.scale_tril
    fixed = tril.detach()
    whitened = torch.linalg.solve_triangular(fixed, (value - loc.detach()).unsqueeze(-1), upper=False).squeeze(-1)
    weibull = (2 * _exponential_like(whitened)).sqrt()
    maxwell = torch.copysign((whitened**2 + 2 * _exponential_like(whitened)).sqrt(), whitened)
    one = torch.eye(size, dtype=torch.bool, device=value.device)  # [k, E]
    one = one.reshape([size, *[1] * (whitened.dim() - 1), size])
    kinds = [weibull, -weibull, *([maxwell] if tril.requires_grad else [])]
    moved = torch.cat([torch.where(one, kind, whitened) for kind in kinds])  # [2 or 3 times E, *dims | *elements | E]
    outcomes = loc.detach() + (fixed @ moved.unsqueeze(-1)).squeeze(-1)
    at = context.change_one(outcomes).movedim(0, -1).split(size, -1)  # each [*dims | *elements, E]
    shift = (at[0] - at[1]) / math.sqrt(2 * math.pi)
    moves = torch.linalg.solve_triangular(fixed, loc.unsqueeze(-1), upper=False).squeeze(-1)
    term: Tensor = (moves * shift).sum(-1)
    if not tril.requires_grad:
        return term
    spread = at[2] - context.signal.unsqueeze(-1)
    change = torch.linalg.solve_triangular(fixed, tril, upper=False)
    sheared = (change.tril(-1) @ whitened.unsqueeze(-1)).squeeze(-1)
    term = term + (sheared * shift + change.diagonal(dim1=-2, dim2=-1) * spread).sum(-1)
    return term


__all__ = ["TRIPLES", "MeasureValued", "Triple"]

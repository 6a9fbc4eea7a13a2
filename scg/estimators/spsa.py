"""Simultaneous perturbation: finite differences of the distribution's parameters, with common random numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.distributions import (
    Bernoulli,
    Categorical,
    Cauchy,
    Exponential,
    Geometric,
    HalfNormal,
    Laplace,
    LogNormal,
    Normal,
    OneHotCategorical,
    Uniform,
    biject_to,
)
from torch.distributions.constraints import Constraint, real_vector, simplex
from torch.distributions.transforms import Transform, identity_transform

from scg.estimators.base import RerunEstimator, SiteContext, SiteInfo, Support
from scg.estimators.extremes import finite

_CONTINUOUS = (Cauchy, Exponential, HalfNormal, Laplace, LogNormal, Normal, Uniform)
_DISCRETE = (Bernoulli, Categorical, Geometric, OneHotCategorical)


@dataclass(frozen=True)
class SPSA(RerunEstimator):
    r"""Shifts all parameters of the site at once, up and down by a random sign each, under the same random numbers.

    .. math::
        \hat g = \frac{1}{M} \sum_{m=1}^M \frac{Q(z(\phi + c \Delta_m, u_m)) - Q(z(\phi - c \Delta_m, u_m))}{2 c}\,
        \Delta_m \nabla_\theta \phi, \quad \Delta_m \in \{-1, 1\}^P

    Spall 1992, with common random numbers u through the inverse of the distribution function. The parameters are
    shifted where they are free: of a positive one the logarithm, of a probability the logit, of probabilities their
    stick breaking. Biased, by order c squared: of a single parameter the mean is the central difference of the expected
    loss. The variance of a draw that jumps grows as 1 / c, of one above other sites, which are drawn afresh, as its
    square. For what nothing else fits, and as a reference. 2 M further evaluations, for any number of elements. Normal,
    LogNormal, HalfNormal, Laplace, Cauchy, Exponential, Uniform, Geometric, Bernoulli, Categorical, OneHotCategorical.

    Args:
        c: the step.
        directions: M, how many random directions.
    """

    c: float = 0.1
    directions: int = 1

    name: ClassVar[str] = "spsa"
    unbiased: ClassVar[bool] = False
    reference: ClassVar[str] = "Spall 1992"
    formula: ClassVar[str] = (
        r"\frac{Q(z(\phi + c \Delta, u)) - Q(z(\phi - c \Delta, u))}{2 c}\, \Delta\, \nabla_\theta \phi"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.c > 0 or self.directions < 1:
            raise ValueError(f"spsa: c={self.c} must be positive and directions={self.directions} at least 1")

    @classmethod
    def supports(cls, site: SiteInfo) -> Support:
        if not issubclass(site.template.cls, _CONTINUOUS + _DISCRETE):
            return Support(False, f"the inverse distribution function of {site.family} is not known here")
        return super().supports(site)

    def evaluations(self, site: SiteInfo) -> int:
        return 1 + 2 * self.directions

    def term(self, context: SiteContext) -> Tensor:
        slots = context.parameters()
        constraints = {slot: context.site.template.constraints[slot] for slot in slots}
        maps = {slot: _free(constraint) for slot, constraint in constraints.items()}
        free = {  # [*dims | *elements | *slot]
            slot: maps[slot].inv(_inside(constraints[slot], value)) for slot, value in slots.items()
        }
        u = [self.uniform(context) for _ in range(self.directions)]
        signs = [{slot: self.signs(phi) for slot, phi in free.items()} for _ in range(self.directions)]

        def shifted(m: int, step: float) -> Tensor:
            moved = {slot: maps[slot](phi.detach() + step * signs[m][slot]) for slot, phi in free.items()}
            return quantile(context.distribution(moved), u[m]).to(context.value.dtype)

        rows = [shifted(m, step) for step in (self.c, -self.c) for m in range(self.directions)]
        up, down = context.rerun(torch.stack(rows)).signal.detach().chunk(2)  # [M, *dims | *elements]
        slope = (up - down) / (2 * self.c * self.directions)
        terms = [
            slope[m] * _sum_last(signs[m][slot] * phi, context.site.template.event_dims[slot])
            for m in range(self.directions)
            for slot, phi in free.items()
        ]
        return torch.stack(torch.broadcast_tensors(*terms)).sum(0)

    def uniform(self, context: SiteContext) -> Tensor:
        """The common random numbers of one direction.  ``[*dims | *elements]``"""
        value, event = context.value, context.site.event_ndim
        dtype = value.dtype if value.is_floating_point() else None
        return torch.rand(value.shape[: value.dim() - event], dtype=dtype, device=value.device)

    def signs(self, free: Tensor) -> Tensor:
        """Independent signs of the shape of ``free``."""
        return 2 * torch.bernoulli(torch.full_like(free, 0.5)) - 1


def quantile(dist: Any, u: Tensor) -> Tensor:
    """The smallest outcome whose distribution function reaches ``u``."""
    if isinstance(dist, Bernoulli):
        return (u > 1 - dist.probs).to(u.dtype)
    if isinstance(dist, (Categorical, OneHotCategorical)):
        below = dist.probs.cumsum(-1)[..., :-1]
        index = (u.unsqueeze(-1) > below).sum(-1)  # [*dims | *elements]
        if isinstance(dist, Categorical):
            return index
        return torch.nn.functional.one_hot(index, dist.probs.shape[-1])
    if isinstance(dist, Geometric):
        return torch.floor(torch.log1p(-u) / torch.log1p(-dist.probs))
    tiny = torch.finfo(u.dtype).eps  # the inverse is infinite at the ends
    return dist.icdf(u.clamp(tiny, 1 - tiny))  # type: ignore[no-any-return]


def _free(constraint: Constraint | None) -> Transform:
    """From free numbers to those that satisfy ``constraint``."""
    try:
        return identity_transform if constraint is None else biject_to(constraint)
    except NotImplementedError:  # it depends on other parameters, as the bounds of Uniform do
        return identity_transform


def _inside(constraint: Constraint | None, value: Tensor) -> Tensor:
    """``value`` where its free numbers are finite: an impossible category stays next to impossible."""
    if constraint is simplex:
        return value.clamp(min=torch.finfo(value.dtype).eps)
    return finite(value) if constraint is real_vector else value


def _sum_last(tensor: Tensor, count: int) -> Tensor:
    return tensor.sum(tuple(range(-count, 0))) if count else tensor

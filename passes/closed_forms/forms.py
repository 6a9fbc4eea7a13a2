"""Expectations that are functions of distributions alone: what `Expected` nodes compute.

Means, variances, entropies and divergences are torch's own. Central moments of order 3 and more come from Stein's
identity of a Pearson family, whose kernel t is at most quadratic:

    E[t(z) f'(z)] = E[(z - m) f(z)],  t(m + e) = t0 + t1 e + t2 e^2
    f(z) = e^k  gives  (1 - k t2) mu_{k+1} = k (t0 mu_{k-1} + t1 mu_k)

(Diaconis and Zabell 1991), from a recursion over orders (Poisson), or from the two outcomes (Bernoulli).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import comb, factorial

import torch
from torch import Tensor
from torch.distributions import (
    Bernoulli,
    Beta,
    Binomial,
    Dirichlet,
    Distribution,
    Exponential,
    Gamma,
    Geometric,
    Gumbel,
    HalfNormal,
    Kumaraswamy,
    Laplace,
    LogNormal,
    LowRankMultivariateNormal,
    Multinomial,
    MultivariateNormal,
    NegativeBinomial,
    Normal,
    OneHotCategorical,
    Poisson,
    Uniform,
    Weibull,
)
from torch.distributions import kl as registry
from torch.distributions.exp_family import ExponentialFamily

MOMENTS = (
    Bernoulli, Beta, Binomial, Dirichlet, Exponential, Gamma, Geometric, Gumbel, HalfNormal, Kumaraswamy, Laplace,
    LogNormal, LowRankMultivariateNormal, Multinomial, MultivariateNormal, NegativeBinomial, Normal, OneHotCategorical,
    Poisson, Uniform, Weibull,
)  # fmt: skip
"""Families whose mean and variance are finite for all parameters, and differentiable where torch says what they are."""

ORDERS = 8
"""Highest power of a draw that is taken in closed form."""


def mean(dist: Distribution) -> Tensor:
    """``[*B | *E]``"""
    return dist.mean


def entropy(dist: Distribution) -> Tensor:
    """``E[-log q(z)]``  ``[*B]``"""
    return dist.entropy()


def negative_entropy(dist: Distribution) -> Tensor:
    """``E[log q(z)]``  ``[*B]``"""
    return -entropy(dist)


def kl_divergence(q: Distribution, p: Distribution) -> Tensor:
    """``E_q[log q(z) - log p(z)]`` by torch's registry, some of whose formulas want equal batch shapes.  ``[*B]``"""
    return registry.kl_divergence(*_broadcast(q, p))


def expected_log_prob(q: Distribution, p: Distribution) -> Tensor:
    """``E_q[log p(z)]``, of which the divergence from p is known: minus entropy and divergence.  ``[*B]``"""
    q, p = _broadcast(q, p)
    return -(entropy(q) + registry.kl_divergence(q, p))


def _broadcast(q: Distribution, p: Distribution) -> tuple[Distribution, Distribution]:
    shape = torch.broadcast_shapes(q.batch_shape, p.batch_shape)
    return tuple(dist if dist.batch_shape == shape else dist.expand(shape) for dist in (q, p))  # type: ignore[return-value]


@dataclass(frozen=True)
class CentralMoment:
    """``E[(z - E z)^k]`` of each element of a draw.  ``[*B | *E]``"""

    order: int

    @property
    def __name__(self) -> str:
        return "variance" if self.order == 2 else f"central_moment_{self.order}"

    def __call__(self, dist: Distribution) -> Tensor:
        if self.order == 2:
            return dist.variance
        return next(rule for family, rule in _HIGHER.items() if isinstance(dist, family))(dist, self.order)

    def known(self, family: type[Distribution]) -> bool:
        """Whether draws of ``family`` have it."""
        families = MOMENTS if self.order == 2 else tuple(_HIGHER)
        return _is_torchs(family) and issubclass(family, families) and self.order <= ORDERS


# -- central moments of higher order -----------------------------------------------------------------------------------
def _pearson(t0: Tensor, t1: Tensor | float, t2: Tensor | float, order: int) -> Tensor:
    """The recursion of a Pearson family up to ``order``."""
    before, last = torch.ones_like(t0), torch.zeros_like(t0)  # orders 0 and 1
    for k in range(1, order):
        before, last = last, k * (t0 * before + t1 * last) / (1 - k * t2)
    return last


def _of_normal(dist: Normal, order: int) -> Tensor:
    return _pearson(dist.scale**2, 0.0, 0.0, order)


def _of_gamma(dist: Gamma, order: int) -> Tensor:
    return _pearson(dist.concentration / dist.rate**2, 1 / dist.rate, 0.0, order)


def _of_exponential(dist: Exponential, order: int) -> Tensor:
    return _pearson(dist.rate**-2, 1 / dist.rate, 0.0, order)


def _of_uniform(dist: Uniform, order: int) -> Tensor:
    return _pearson((dist.high - dist.low) ** 2 / 8, 0.0, -0.5, order)


def _of_beta(dist: Beta, order: int) -> Tensor:
    total = dist.concentration1 + dist.concentration0
    return _of_share(dist.mean, total, order)


def _of_dirichlet(dist: Dirichlet, order: int) -> Tensor:
    return _of_share(dist.mean, dist.concentration.sum(-1, keepdim=True), order)


def _of_share(m: Tensor, total: Tensor, order: int) -> Tensor:
    """Of a Beta draw, or of an element of a Dirichlet draw, which is one."""
    return _pearson(m * (1 - m) / total, (1 - 2 * m) / total, -1 / total, order)


def _of_bernoulli(dist: Bernoulli | OneHotCategorical, order: int) -> Tensor:
    p = dist.mean
    return p * (1 - p) ** order + (1 - p) * (-p) ** order


def _of_poisson(dist: Poisson, order: int) -> Tensor:
    """``mu_{k+1} = rate * sum_{i<k} C(k, i) mu_i`` (Stein and Chen)."""
    rate = dist.rate
    moments = [torch.ones_like(rate), torch.zeros_like(rate)]
    for k in range(1, order):
        parts = [comb(k, i) * moments[i] for i in range(k)]
        moments.append(rate * torch.stack(parts).sum(0))
    return moments[order]


def _of_laplace(dist: Laplace, order: int) -> Tensor:
    return torch.zeros_like(dist.scale) if order % 2 else factorial(order) * dist.scale**order


_HIGHER: dict[type[Distribution], Callable[..., Tensor]] = {
    Normal: _of_normal,
    Gamma: _of_gamma,
    Exponential: _of_exponential,
    Uniform: _of_uniform,
    Beta: _of_beta,
    Dirichlet: _of_dirichlet,
    Bernoulli: _of_bernoulli,
    OneHotCategorical: _of_bernoulli,
    Poisson: _of_poisson,
    Laplace: _of_laplace,
}
"""Families with central moments of every order."""


# -- what is known of which families ---------------------------------------------------------------------------------
def _is_torchs(family: type[Distribution]) -> bool:
    """Whether torch itself wrote the class: what a subclass of the user's inherits need not be true of it."""
    return family.__module__.startswith("torch.distributions.")


def has_entropy(family: type[Distribution]) -> bool:
    """Whether the class says what the entropy is; that of a general exponential family has no gradient."""
    if not _is_torchs(family):
        return "entropy" in vars(family)
    return family.entropy not in (Distribution.entropy, ExponentialFamily.entropy)


def has_divergence(q: type[Distribution], p: type[Distribution]) -> bool:
    """Whether the divergence of the pair is registered, by a formula of its own."""
    if not (_is_torchs(q) and _is_torchs(p)):
        return (q, p) in registry._KL_REGISTRY
    found = registry._dispatch_kl(q, p)
    return found is not NotImplemented and found is not registry._kl_expfamily_expfamily

"""ARMS: any number of mutually antithetic Bernoulli draws."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.distributions import Distribution

from scg.estimators.antithetic import Antithetic, dtype_of, logit, probability, wide
from scg.estimators.base import Draw, SiteContext

_COPULAS = ("dirichlet", "gaussian")


@dataclass(frozen=True)
class ARMS(Antithetic):
    r"""Leave-one-out over ``n`` negatively dependent draws, corrected for their dependence.

    .. math::
        \hat g = \frac{1}{n - 1} \sum_i (f(b_i) - \bar f)\, b_i\, \frac{p (1 - p)}{P(b_i = 1, b_j = 0)}\, \nabla \theta

    Dimitriev and Zhou 2021 (ARMS); their :math:`1 / (1 - \rho)` is the fraction. The thresholds are taken at the
    smaller of ``p`` and ``1 - p``, where the Dirichlet copula is more antithetic. Unbiased; DisARM for ``n = 2``.
    ``n`` evaluations. For Bernoulli.

    Args:
        samples: ``n``, four unless given.
        copula: ``"dirichlet"`` or ``"gaussian"``: the law of the uniforms.
    """

    copula: str = "dirichlet"

    name: ClassVar[str] = "arms"
    unbiased: ClassVar[bool] = True
    reference: ClassVar[str] = "Dimitriev and Zhou 2021"
    formula: ClassVar[str] = r"\frac{1}{n - 1} \sum_i (f(b_i) - \bar f)\, b_i\, \nabla \theta / (1 - \rho)"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.samples == 1:
            raise ValueError("arms: one draw has no other to be antithetic to; give samples=2 or more")
        if self.copula not in _COPULAS:
            raise ValueError(f"arms: copula={self.copula!r} must be one of {', '.join(_COPULAS)}")

    @property
    def rows(self) -> int:
        return self.samples or 4

    def draw_rows(self, dist: Distribution, shape: torch.Size, support: Tensor | None, joined: tuple[int, ...]) -> Draw:
        p = probability(dist, shape)
        return Draw(self.bits(p).to(dtype_of(dist)))

    def bits(self, p: Tensor) -> Tensor:
        """Exchangeable rows, each true with probability ``p``.  ``[n, *p]``"""
        m = torch.minimum(p, 1 - p)
        noise = torch.rand([self.rows, *p.shape], dtype=p.dtype, device=p.device)
        if self.copula == "dirichlet":
            gaps = -torch.log1p(-noise)  # exponential: shares of their sum are Dirichlet(1, …, 1)
            low = (1 - gaps / gaps.sum(0)) ** (self.rows - 1) < m
        else:
            normal = torch.special.ndtri(noise.clamp_min(torch.finfo(p.dtype).tiny))
            even = (normal - normal.mean(0)) * math.sqrt(self.rows / (self.rows - 1))
            low = even < torch.special.ndtri(m)
        return torch.where(p < 0.5, low, ~low)

    def term(self, context: SiteContext) -> Tensor:
        assert context.row_axis is not None
        theta, signal, n = logit(context), context.signal, self.rows
        centred = signal - signal.mean(context.row_axis, keepdim=True)
        covariance = (centred * context.value).sum(context.row_axis, keepdim=True) / (n - 1)
        return covariance * self.correction(theta.detach()) * theta

    def correction(self, theta: Tensor) -> Tensor:
        """``p (1 - p) / P(b_i = 1, b_j = 0)`` of two rows.  The shape of ``theta``"""
        n = self.rows
        m = (-wide(theta).abs()).sigmoid().clamp_min(torch.finfo(torch.float32).tiny)  # the rarer outcome
        if n == 2:
            return 1 - m
        if self.copula == "dirichlet":  # P(b_i = 1, b_j = 0) = m - both
            both = (2 * m ** (1 / (n - 1)) - 1).clamp_min(0) ** (n - 1)
            return (1 - m) / (1 - both / m)
        return m * (1 - m) / (m * (1 - m) + _minus_normal_covariance(m, -1 / (n - 1)))


def _minus_normal_covariance(m: Tensor, correlation: float, nodes: int = 24) -> Tensor:
    r"""Minus the covariance of :math:`1[x < h], 1[y < h]` of standard normals, ``h`` at probability ``m``.

    .. math:: \frac{1}{2\pi} \int_{\arcsin r}^0 \exp\left(-\frac{h^2}{1 + \sin\phi}\right) d\phi

    Drezner and Wesolowsky 1990, by Gauss-Legendre quadrature: to rounding for ``r >= -1/2``.
    """
    points, weights = gauss_legendre(nodes)
    low = math.asin(correlation)
    places = torch.tensor([1 + math.sin(0.5 * low * (1 - x)) for x in points], dtype=m.dtype, device=m.device)
    parts = torch.tensor([-0.5 * low * w / (2 * math.pi) for w in weights], dtype=m.dtype, device=m.device)
    h = torch.special.ndtri(m).unsqueeze(-1)
    return (torch.exp(-h.square() / places) * parts).sum(-1)


def gauss_legendre(nodes: int) -> tuple[list[float], list[float]]:
    """Nodes and weights on ``[-1, 1]``, by Newton's method on the Legendre polynomial."""
    points, weights = [], []
    for i in range(nodes):
        x = math.cos(math.pi * (i + 0.75) / (nodes + 0.5))
        for _ in range(100):
            before, value = 1.0, x
            for k in range(2, nodes + 1):
                before, value = value, ((2 * k - 1) * x * value - (k - 1) * before) / k
            slope = nodes * (x * value - before) / (x * x - 1)
            x, last = x - value / slope, x
            if abs(x - last) < 1e-15:
                break
        points.append(x)
        weights.append(2 / ((1 - x * x) * slope * slope))
    return points, weights

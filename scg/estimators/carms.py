"""CARMS: any number of mutually antithetic categorical draws."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.distributions import Distribution

from scg.estimators.antithetic import Antithetic
from scg.estimators.base import Draw, SiteContext
from scg.estimators.categorical import log_probabilities


@dataclass(frozen=True)
class CARMS(Antithetic):
    r"""Leave-one-out over ``n`` negatively dependent categorical draws, each pair corrected for its dependence.

    .. math::
        \hat g = \frac{1}{n (n - 1)} \sum_i \sum_{j \ne i} (f(z_i) - f(z_j))\,
                 \frac{p(z_i)\, p(z_j)}{P(z_i, z_j)}\, \nabla \log p(z_i)

    Dimitriev and Zhou 2021 (CARMS). The draws are the inverse distribution function at uniforms
    :math:`u_i = (1 - d_i)^{n - 1}`, ``d`` Dirichlet(1, …, 1). The categories stand in a random order, the same for all
    draws: two of them, picked at random, at its ends, the rarer one first. So every pair of categories can be
    drawn together, and no correction is above ``C (C - 1) / 2``. Unbiased, also below costs that are not
    differentiable; `arms` for two categories, `disarm` when there are also two draws. ``n`` evaluations. Categorical,
    OneHotCategorical.

    Args:
        samples: ``n``, four unless given.
    """

    name: ClassVar[str] = "carms"
    unbiased: ClassVar[bool] = True
    reference: ClassVar[str] = "Dimitriev and Zhou 2021"
    formula: ClassVar[str] = (
        r"\frac{1}{n (n - 1)} \sum_{i \ne j} (f(z_i) - f(z_j)) \frac{p(z_i) p(z_j)}{P(z_i, z_j)} \nabla \log p(z_i)"
    )
    families: ClassVar[tuple[str, ...]] = ("Categorical", "OneHotCategorical")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.samples == 1:
            raise ValueError("carms: one draw has no other to be antithetic to; give samples=2 or more")

    @property
    def rows(self) -> int:
        return self.samples or 4

    def draw_rows(self, dist: Distribution, shape: torch.Size, support: Tensor | None, joined: tuple[int, ...]) -> Draw:
        assert support is not None
        p = log_probabilities(dist).detach().double().softmax(-1)  # differences of distribution functions cancel
        p = p.expand(torch.Size([*shape, *dist.batch_shape, p.shape[-1]]))
        orders = end_orders(p)
        category = self.categories(p, orders)  # [n, *shape | *B]
        return Draw(support[category], extra=(self.corrections(p, orders, category),))

    def categories(self, p: Tensor, orders: Tensor) -> Tensor:
        """Exchangeable rows of categories, each of law ``p``.  ``[n, *N]``

        Args:
            p: ``[*N, C]``.
            orders: ``[*N, O, C]``.
        """
        picked = torch.randint(orders.shape[-2], p.shape[:-1], device=p.device)
        order = orders.gather(-2, picked[..., None, None].expand([*picked.shape, 1, p.shape[-1]])).squeeze(-2)
        edges = p.gather(-1, order).cumsum(-1)[..., :-1]  # [*N, C - 1]
        gaps = -torch.log1p(-torch.rand([self.rows, *p.shape[:-1]], dtype=p.dtype, device=p.device))
        uniform = (1 - gaps / gaps.sum(0)) ** (self.rows - 1)  # shares of exponentials are Dirichlet
        place = (uniform.unsqueeze(-1) >= edges).sum(-1)  # [n, *N]
        return order.expand([self.rows, *order.shape]).gather(-1, place.unsqueeze(-1)).squeeze(-1)

    def corrections(self, p: Tensor, orders: Tensor, category: Tensor) -> Tensor:
        """``p(z_i) p(z_j) / P(z_i, z_j)`` of two rows, zero where they are equal.  ``[n (i), *N, n (j)]``"""
        count, n = p.shape[-1], self.rows
        ends = p.unsqueeze(-2).expand(orders.shape).gather(-1, orders).cumsum(-1)
        rank = orders.argsort(-1)  # where each category stands
        high = ends.gather(-1, rank)  # [*N, O, C]
        low = torch.where(rank > 0, ends.gather(-1, (rank - 1).clamp_min(0)), 0.0)
        drawn = category.movedim(0, -1)  # [*N, n]
        at = drawn.unsqueeze(-2).expand([*orders.shape[:-1], n])
        high, low = high.gather(-1, at), low.gather(-1, at)  # [*N, O, n]
        joint = self.rectangle(low, high).mean(-3)  # [*N, n, n]
        chosen = p.gather(-1, drawn)
        product = chosen.unsqueeze(-1) * chosen.unsqueeze(-2)
        most = count * (count - 1) / 2  # draws are negatively dependent: at the ends they meet at least so often
        ratio = (product / joint.clamp_min(torch.finfo(p.dtype).tiny)).clamp_max(most)
        apart = drawn.unsqueeze(-1) != drawn.unsqueeze(-2)
        return torch.where(apart, ratio, 0.0).movedim(-2, 0)

    def rectangle(self, low: Tensor, high: Tensor) -> Tensor:
        """``P(low_i <= u_i < high_i, low_j <= u_j < high_j)`` for all pairs.  ``[*N, n, n]`` of ``[*N, n]``"""

        def below(x: Tensor, y: Tensor) -> Tensor:
            root = 1 / (self.rows - 1)
            return (x.unsqueeze(-1) ** root + y.unsqueeze(-2) ** root - 1).clamp_min(0) ** (self.rows - 1)

        return below(high, high) - below(low, high) - below(high, low) + below(low, low)

    def term(self, context: SiteContext) -> Tensor:
        assert context.row_axis is not None
        (ratio,) = context.extra  # [*dims | *elements, n]
        axis, signal, n = context.row_axis, context.signal, self.rows
        others = signal.movedim(axis, -1).unsqueeze(axis)  # [*dims, 1 row | *elements, n]
        gaps = (ratio.to(signal.dtype) * (signal.unsqueeze(-1) - others)).sum(-1) / (n * (n - 1))
        drawn = ratio.sum(-1) > 0
        return (gaps * torch.where(drawn, context.log_prob, 0.0)).sum(axis, keepdim=True)


def end_orders(p: Tensor) -> Tensor:
    """An order of the categories for each two of them: these at the ends, the rarer one first.  ``[*N, O, C]``"""
    count = p.shape[-1]
    if count == 1:
        return torch.zeros([*p.shape[:-1], 1, 1], dtype=torch.int64, device=p.device)
    pairs = list(itertools.combinations(range(count), 2))
    between = [[i for i in range(count) if i not in pair] for pair in pairs]
    up = [[pair[0], *rest, pair[1]] for pair, rest in zip(pairs, between, strict=True)]
    down = [[pair[1], *rest, pair[0]] for pair, rest in zip(pairs, between, strict=True)]
    ends = torch.tensor(pairs, device=p.device)
    rarer = (p[..., ends[:, 0]] <= p[..., ends[:, 1]]).unsqueeze(-1)  # [*N, O, 1]
    return torch.where(rarer, torch.tensor(up, device=p.device), torch.tensor(down, device=p.device))

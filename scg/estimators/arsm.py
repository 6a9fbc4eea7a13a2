"""ARSM: augment, REINFORCE, swap, merge."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from scg.estimators.base import RerunEstimator, SiteContext, SiteInfo, Support
from scg.estimators.categorical import categorical, drawn_category, log_probabilities


@dataclass(frozen=True)
class ARSM(RerunEstimator):
    r"""The score function in the Dirichlet noise of a categorical draw, with every pair of its components swapped.

    .. math::
        \hat g = \sum_c \sum_j \Big(Q(z^{c \rightleftharpoons j}) - \frac1C \sum_m Q(z^{m \rightleftharpoons j})\Big)
                 \Big(\frac1C - \pi_j\Big) \nabla \phi_c, \qquad
        z = \arg\min_i \pi_i e^{-\phi_i}, \quad \pi \sim \mathrm{Dirichlet}(1, \dots, 1)

    Yin, Yue and Zhou 2019: :math:`\phi` are the logits, and :math:`z^{c \rightleftharpoons j}` is what would be
    drawn had :math:`\pi_c` and :math:`\pi_j` changed places. Elements that meet in a cost swap theirs at once.
    Unbiased, also below costs that are not differentiable; ARM for two categories. ``C (C - 1) / 2`` further
    evaluations, whatever the number of elements. Categorical, OneHotCategorical.
    """

    name: ClassVar[str] = "arsm"
    unbiased: ClassVar[bool] = True
    reference: ClassVar[str] = "Yin, Yue and Zhou 2019"
    formula: ClassVar[str] = (
        r"\sum_{c, j} \big(Q(z^{c \rightleftharpoons j}) - \tfrac1C \sum_m Q(z^{m \rightleftharpoons j})\big) "
        r"(\tfrac1C - \pi_j) \nabla \phi_c"
    )

    @classmethod
    def supports(cls, site: SiteInfo) -> Support:
        return super().supports(site) and categorical(site)

    def evaluations(self, site: SiteInfo) -> int:
        count = len(site.support) if site.support is not None else 2
        return (self.samples or 1) * (1 + count * (count - 1) // 2)

    def term(self, context: SiteContext) -> Tensor:
        support = context.site.support
        assert support is not None
        phi, count = log_probabilities(context.dist), len(support)
        if count == 1:
            return 0 * phi.sum(-1)
        pi = self.noise(phi.detach(), drawn_category(context))  # [*dims | *elements, C]
        pairs, place = _swaps(count)
        order = torch.tensor(pairs, device=pi.device)  # [P, C]
        swapped = (pi[..., order].log() - phi.detach().unsqueeze(-2)).argmin(-1)  # [*dims | *elements, P]
        found = context.rerun(support[swapped.movedim(-1, 0)])
        gain = found.signal - context.signal  # a constant in the cost is gone
        gain = torch.cat([torch.zeros_like(gain[:1]), gain])
        gain = gain[torch.tensor(place, device=pi.device)]  # [C, C, *dims | *elements]
        shares = (1 / count - pi).movedim(-1, 0)  # [C, *dims | *elements]
        slope = ((gain - gain.mean(0)) * shares).sum(1)  # [C, *dims | *elements]
        return (slope.movedim(0, -1) * phi).sum(-1)

    def noise(self, log_p: Tensor, category: Tensor) -> Tensor:
        """The Dirichlet noise given the category it leads to.  ``[*category, C]``

        With :math:`\\pi_i \\propto e_i`, the first of exponential arrivals at the times :math:`e_i / p_i` is the draw;
        given it and its time, the others have longer waited for, and are exponential from then on.
        """
        waits = self.exponential(log_p, torch.Size([*category.shape, log_p.shape[-1] + 1]))
        first, later = waits[..., :1], waits[..., 1:]
        own = torch.arange(log_p.shape[-1], device=category.device) == category.unsqueeze(-1)
        arrivals = log_p.exp() * first + torch.where(own, 0.0, later)
        return arrivals / arrivals.sum(-1, keepdim=True)

    def exponential(self, like: Tensor, shape: torch.Size) -> Tensor:
        """Standard exponential draws, above zero."""
        uniform = torch.rand(shape, dtype=like.dtype, device=like.device)
        return -torch.log1p(-uniform).clamp_max(-torch.finfo(like.dtype).tiny)


def _swaps(count: int) -> tuple[list[list[int]], list[list[int]]]:
    """All orders with two of ``count`` swapped, and where the swap of each pair stands, counted from one.

    >>> _swaps(3)
    ([[1, 0, 2], [2, 1, 0], [0, 2, 1]], [[0, 1, 2], [1, 0, 3], [2, 3, 0]])
    """
    pairs = list(itertools.combinations(range(count), 2))
    orders = [[b if i == a else a if i == b else i for i in range(count)] for a, b in pairs]
    at = {pair: index for index, pair in enumerate(pairs, 1)}
    place = [[at.get((min(i, j), max(i, j)), 0) for j in range(count)] for i in range(count)]
    return orders, place

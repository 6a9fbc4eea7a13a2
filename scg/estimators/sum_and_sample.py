"""The most probable outcomes exactly, the rest sampled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.distributions import Distribution

from scg.estimators.base import Draw, SiteContext
from scg.estimators.subsets import Outcomes, SubsetEstimator, weighted_score


@dataclass(frozen=True)
class SumAndSample(SubsetEstimator):
    r"""Sums over the ``k`` most probable outcomes and samples ``m`` of the rest.

    .. math::
        \hat g = \sum_{s \in \mathrm{top}} (f_s - \bar b)\, \nabla p_s
               + \frac{1 - P_\mathrm{top}}{m} \sum_{j=1}^m (f_{z_j} - b_j) \nabla \log p_{z_j}, \qquad
        z_j \sim p(\cdot \mid \text{not top})

    with :math:`b_j = \sum_\mathrm{top} p_s f_s + (1 - P_\mathrm{top}) \bar f_{-j}`, the mean over the other sampled
    ones, and :math:`\bar b` the mean over all; for ``m = 1`` both are the mean over the top alone. Liu, Regier,
    Tripuraneni, Jordan and McAuliffe 2019; the baseline is shared by all terms: with one drawn afresh for each, some
    variance would be left when everything is summed. Ties go to the outcome that comes first in the support. Unbiased.
    ``k + m`` evaluations. For finite supports.

    Args:
        samples: ``m``, one unless given.
        top: ``k``.
    """

    top: int = 1

    name: ClassVar[str] = "sum_and_sample"
    unbiased: ClassVar[bool] = True
    reference: ClassVar[str] = "Liu et al. 2019"
    formula: ClassVar[str] = (
        r"\sum_{s \in \mathrm{top}} (f_s - b)\, \nabla p_s + (1 - P_\mathrm{top}) (f_z - b) \nabla \log p_z"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.top < 0:
            raise ValueError(f"sum_and_sample: top={self.top} must be at least 0")

    @property
    def rows(self) -> int:
        return self.top + self.draws

    @property
    def draws(self) -> int:
        """How many outcomes are sampled."""
        return self.samples or 1

    def draw_rows(self, dist: Distribution, shape: torch.Size, support: Tensor | None, joined: tuple[int, ...]) -> Draw:
        assert support is not None
        outcomes = Outcomes(dist, shape, support, joined)
        log_p = outcomes.log_p  # [*N, outcomes]
        order = log_p.sort(stable=True, dim=-1, descending=True).indices
        top, rest = order[..., : self.top], order[..., self.top :]
        others = log_p.gather(-1, rest)
        place = torch.multinomial(others.softmax(-1).reshape(-1, others.shape[-1]), self.draws, replacement=True)
        sampled = rest.gather(-1, place.reshape([*rest.shape[:-1], self.draws]))
        mass = others.logsumexp(-1, keepdim=True).exp() / self.draws
        weight = torch.cat([log_p.gather(-1, top).exp(), mass.expand(sampled.shape)], -1)  # [*N, k + m]
        index = torch.cat([top, sampled], -1)
        weight = outcomes.weights(weight)
        return Draw(outcomes.rows(index), weight, (weight,))

    def term(self, context: SiteContext) -> Tensor:
        assert context.row_axis is not None
        (weight,) = context.extra  # [*dims | *elements]
        signal = torch.where(weight > 0, context.signal, 0.0)
        return weighted_score(context, weight, signal - self.baseline(weight, signal, context.row_axis))

    def baseline(self, weight: Tensor, signal: Tensor, axis: int) -> Tensor:
        """What is subtracted in each row: of a sampled one, nothing that depends on its own draw."""
        k, m = self.top, self.draws
        parts = weight * signal
        top = parts.narrow(axis, 0, k).sum(axis, keepdim=True)
        if m > 1:
            sampled = parts.narrow(axis, k, m)
            total = sampled.sum(axis, keepdim=True)
            others = (total - sampled) * (m / (m - 1))
            return torch.cat([(top + total).expand_as(parts.narrow(axis, 0, k)), top + others], axis)
        if k == 0:
            return torch.zeros_like(signal)
        return (top / weight.narrow(axis, 0, k).sum(axis, keepdim=True)).expand_as(signal)

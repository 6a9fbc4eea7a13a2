"""BitFlip: one element, picked at random, changed to another outcome."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from scg.estimators.base import RerunEstimator, SiteContext, SiteInfo, Support
from scg.estimators.local_expectation import finite
from scg.estimators.rerun import groups, joined_sizes, other_outcomes


@dataclass(frozen=True)
class BitFlip(RerunEstimator):
    r"""Local expectation of one random element, for all elements' sake.

    .. math:: \hat g = D \sum_v \nabla_\theta p_i(v)\, (Q_i(z_{-i}, v) - Q_i(z)), \quad i \sim U\{1, \dots, D\}

    Kunes et al. 2023 (BitFlip-1). Unbiased, also below costs that are not differentiable. ``S - 1`` further evaluations
    for any number ``D`` of elements that one cost may see. Any finite support.
    """

    name: ClassVar[str] = "bitflip"
    unbiased: ClassVar[bool] = True
    reference: ClassVar[str] = "Kunes et al. 2023"
    formula: ClassVar[str] = r"D \sum_v \nabla_\theta p_i(v)\, (Q_i(z_{-i}, v) - Q_i(z)), \quad i \sim U\{1..D\}"

    @classmethod
    def supports(cls, site: SiteInfo) -> Support:
        return super().supports(site) and finite(site)

    def evaluations(self, site: SiteInfo) -> int:
        return 1 + (len(site.support) - 1 if site.support is not None else 1)

    def term(self, context: SiteContext) -> Tensor:
        outcomes = other_outcomes(context)  # [S-1, *dims | *elements | *event]
        chosen = pick(context, torch.ones_like(context.log_prob.detach()))
        wide = chosen.reshape([*chosen.shape, *[1] * context.site.event_ndim])
        found = context.rerun(torch.where(wide, outcomes, context.value))
        p = context.log_prob_of(outcomes).exp()
        gain = torch.where(torch.logical_and(chosen, p > 0), found.signal - context.signal, 0.0)
        return (p * gain).sum(0) * groups(context)


def pick(context: SiteContext, weights: Tensor) -> Tensor:
    """One of the joined elements, with probability proportional to ``weights [*dims | *elements]``; as a mask."""
    if not context.joined:
        return torch.ones_like(weights, dtype=torch.bool)
    lead = weights.dim() - len(context.site.element_shape)
    joined = [lead + dim for dim in context.joined]
    alone = [axis for axis in range(weights.dim()) if axis not in joined]
    table = weights.permute([*alone, *joined]).reshape([-1, groups(context)])
    index = torch.multinomial(table, 1).squeeze(-1)
    mask = index.unsqueeze(-1) == torch.arange(groups(context), device=index.device)
    mask = mask.reshape([*(weights.shape[axis] for axis in alone), *joined_sizes(context)])
    order = [*alone, *joined]
    return mask.permute([order.index(axis) for axis in range(weights.dim())])

"""Straight-through: the derivative of the probability in the place of that of the draw."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from scg.estimators.relaxed import Discrete, Relaxation, outcomes, straight_through


@dataclass(frozen=True)
class StraightThrough(Relaxation):
    r"""Draws the discrete outcome and differentiates as if it were its probability.

    .. math:: \hat g = \nabla f(D)^\top \nabla_\theta p_\theta, \quad D \sim p_\theta

    Bengio, Léonard and Courville 2013. Biased: exact for costs linear in the draw; of first order in the
    sense of Liu et al. 2023. One evaluation, at outcomes only. Bernoulli, OneHotCategorical.
    """

    name: ClassVar[str] = "straight_through"
    reference: ClassVar[str] = "Bengio, Léonard and Courville 2013"
    formula: ClassVar[str] = r"\nabla f(D)^\top \nabla_\theta p_\theta"

    def relax(self, dist: Discrete, shape: torch.Size) -> Tensor:
        return straight_through(outcomes(dist, shape), dist.probs)

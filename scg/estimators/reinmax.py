"""ReinMax: straight-through of second order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from scg.estimators.relaxed import (
    Discrete,
    Relaxation,
    check_temperature,
    logits_of,
    noise_of,
    outcomes,
    straight_through,
)


@dataclass(frozen=True)
class ReinMax(Relaxation):
    r"""Differentiates the draw by Heun's method where straight-through uses Euler's.

    .. math::
        \hat g = \left(2 J(\pi_D) - \tfrac{1}{2} J(p)\right) \nabla f(D), \quad
        \pi_D = \tfrac{1}{2} (\mathrm{softmax}(\ell / \tau) + D), \quad J(s) = \mathrm{diag}(s) - s s^\top

    with respect to the logits. Liu et al. 2023. Biased in general; at temperature 1 exact for costs that
    are quadratic in the draw, cross terms of several independent draws included. One evaluation, at outcomes only.
    Bernoulli (two categories), OneHotCategorical.

    Args:
        temperature: a number, or a tensor of one element that is read anew at every step.
    """

    temperature: float | Tensor = 1.0

    name: ClassVar[str] = "reinmax"
    reference: ClassVar[str] = "Liu et al. 2023"
    formula: ClassVar[str] = r"(2 J(\pi_D) - \tfrac{1}{2} J(p))\, \nabla f(D)"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_temperature(self.name, self.temperature)

    def relax(self, dist: Discrete, shape: torch.Size) -> Tensor:
        noise, logits = noise_of(dist), logits_of(dist)
        hard = outcomes(dist, shape)
        fixed = logits.detach()
        middle = (noise.soft(fixed / self.temperature) + hard) / 2  # [*shape | *B | *E]
        return straight_through(hard, noise.heun_tangent(middle, noise.soft(fixed), logits))

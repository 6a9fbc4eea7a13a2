"""The Gumbel-softmax relaxation, soft or straight-through."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from scg.estimators.relaxed import (
    Discrete,
    Relaxation,
    check_temperature,
    full_shape,
    logits_of,
    noise_of,
    straight_through,
)


@dataclass(frozen=True)
class GumbelSoftmax(Relaxation):
    r"""Draws from the concrete distribution in the place of the discrete one, and differentiates through it.

    .. math:: s = \mathrm{softmax}((\ell + G) / \tau), \quad \hat g = \nabla_\ell f(s)

    with Gumbel noise G; of a Bernoulli the sigmoid with logistic noise. Jang, Gu and Poole 2017; Maddison, Mnih and Teh
    2017. Biased: the derivative is that of the relaxed objective, whose value is reported too. The bias falls and the
    variance grows as the temperature goes to zero. One evaluation, at points between the outcomes; with
    ``straight_through`` at the outcome itself, with the relaxation's derivative. Bernoulli, OneHotCategorical.

    Args:
        temperature: a number, or a tensor of one element that is read anew at every step, to be annealed in place.
        straight_through: round the draw in the forward pass.
    """

    temperature: float | Tensor = 0.5
    straight_through: bool = False

    name: ClassVar[str] = "gumbel_softmax"
    reference: ClassVar[str] = "Jang, Gu and Poole 2017; Maddison, Mnih and Teh 2017"
    formula: ClassVar[str] = r"\nabla_\ell f(\mathrm{softmax}((\ell + G) / \tau))"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_temperature(self.name, self.temperature)

    def relax(self, dist: Discrete, shape: torch.Size) -> Tensor:
        noise, logits = noise_of(dist), logits_of(dist)
        perturbed = noise.perturb(logits, full_shape(dist, shape))
        soft = noise.soft(perturbed / self.temperature)
        return straight_through(noise.hard(perturbed.detach()), soft) if self.straight_through else soft

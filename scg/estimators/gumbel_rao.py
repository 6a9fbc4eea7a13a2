"""Gumbel-Rao: the straight-through Gumbel-softmax averaged over the noise behind one outcome."""

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
class GumbelRao(Relaxation):
    r"""Straight-through Gumbel-softmax with its noise averaged out, given the outcome.

    .. math::
        \hat g = \frac{1}{\tau M} \sum_{m=1}^M J(s_m) \nabla f(D), \quad
        s_m = \mathrm{softmax}((\ell + G_m) / \tau), \quad G_m \sim p(G \mid D)

    Paulus, Maddison and Krause 2021. Biased: the mean is that of the straight-through Gumbel-softmax
    at the same temperature, the variance never higher. One evaluation of the costs; the noise costs M softmaxes.
    Bernoulli (two categories, logistic noise), OneHotCategorical.

    Args:
        temperature: a number, or a tensor of one element that is read anew at every step.
        copies: M, how many draws of the noise are averaged.
    """

    temperature: float | Tensor = 0.5
    copies: int = 10

    name: ClassVar[str] = "gumbel_rao"
    reference: ClassVar[str] = "Paulus, Maddison and Krause 2021"
    formula: ClassVar[str] = r"\frac{1}{\tau} E[J(\mathrm{softmax}((\ell + G) / \tau)) \mid D]\, \nabla f(D)"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_temperature(self.name, self.temperature)
        if self.copies < 1:
            raise ValueError(f"{self.name}: copies={self.copies} must be at least 1")

    def relax(self, dist: Discrete, shape: torch.Size) -> Tensor:
        noise, logits = noise_of(dist), logits_of(dist)
        hard = outcomes(dist, shape)
        fixed = logits.detach()
        noisy = noise.given(fixed, hard.to(fixed.dtype), (self.copies,))  # [M, *shape | *B | *E]
        soft = noise.soft(noisy / self.temperature)
        return straight_through(hard, noise.mean_tangent(soft, logits) / self.temperature)

"""Straight-through with one temperature for the draw and another for the derivative."""

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
    straight_through,
)


@dataclass(frozen=True)
class DecoupledST(Relaxation):
    r"""Straight-through whose exploration and whose spread of the gradient are set apart.

    .. math::
        \hat g = \nabla f(D)^\top \nabla_\ell\, \mathrm{softmax}(\ell / \tau_b), \quad
        D \sim \mathrm{softmax}(\ell / \tau_f)

    Shah, Yan, Mozer and Liu 2024. Biased; unless ``forward`` is 1 the value is biased too, as the outcome is drawn from
    a sharper or flatter law. Both at 1: plain straight-through. One evaluation, at outcomes only. Bernoulli,
    OneHotCategorical.

    Args:
        forward: temperature of the draw; a number, or a tensor of one element that is read anew at every step.
        backward: temperature of the derivative, likewise.
    """

    forward: float | Tensor = 1.0
    backward: float | Tensor = 2.0

    name: ClassVar[str] = "decoupled_st"
    reference: ClassVar[str] = "Shah, Yan, Mozer and Liu 2024"
    formula: ClassVar[str] = r"\nabla f(D)^\top \nabla_\ell\, \mathrm{softmax}(\ell / \tau_b)"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_temperature(self.name, self.forward)
        check_temperature(self.name, self.backward)

    def relax(self, dist: Discrete, shape: torch.Size) -> Tensor:
        noise, logits = noise_of(dist), logits_of(dist)
        hard = noise.sample(logits.detach() / self.forward, shape)
        return straight_through(hard, noise.soft(logits / self.backward))

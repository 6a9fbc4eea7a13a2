"""Liu et al. 2023, theorem 3.1: ReinMax is of second order, so exact for quadratic costs; straight-through is not.

Theirs are exact sums over the nine outcomes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import OneHotCategorical

import scg
from benchmarks.papers.setting import Figure
from scg.estimators import ESTIMATORS


class Codes(nn.Module):
    """A polynomial of two one-hot codes; of degree three, with small third derivatives."""

    def __init__(self, degree: int) -> None:
        super().__init__()
        rng = torch.Generator().manual_seed(0)
        self.degree = degree
        self.theta = nn.Parameter(torch.randn(2, 3, generator=rng, dtype=torch.float64))
        self.register_buffer("weights", torch.randn(6, generator=rng, dtype=torch.float64))
        self.weights: Tensor

    def forward(self) -> Tensor:
        z = OneHotCategorical(logits=self.theta).sample().flatten()
        sums = 1 + 0.3 * torch.stack([(self.weights * z).sum(), (self.weights.flip(0) * z).sum()])
        return (sums**self.degree).sum()


def bias(model: Codes, estimator: Any, draws: int) -> float:
    """Length of the difference between the mean gradient and the exact one, over the exact one's length."""
    (exact,) = scg.exact(model)[1].values()
    found = scg.gradient_samples(scg.compile(model, estimator=estimator), n=draws)["theta"].mean(0)
    return float((found - exact).norm() / exact.norm())


def run(quick: bool = False) -> Iterator[Figure]:
    draws = 30 if quick else 20_000
    quadratic, cubic = Codes(2), Codes(3)
    reinmax, through = ESTIMATORS["reinmax"](temperature=1.0), "straight_through"
    found = bias(quadratic, reinmax, draws)
    yield Figure("quadratic cost: relative bias of ReinMax (draws alone differ)", 0.0, found, found < 0.03 or quick)
    found = bias(quadratic, through, draws)
    yield Figure("quadratic cost: relative bias of straight-through", 0.124, found, found > 0.1 or quick)
    found, worse = bias(cubic, reinmax, draws), bias(cubic, through, draws)
    yield Figure("cubic cost: ReinMax against straight-through", 0.126, found / worse, found < worse / 3 or quick)

"""Titsias and Shi 2022, section 4.1: E[mean_i (b_i - 0.499)^2] of 200 Bernoullis, two draws.

The variances at the start are closed forms. Cost splitting leaves each unit its own cost, and the exact sum over its
two outcomes then has no variance: that is what the compiler does by itself.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli

import scg
from benchmarks.papers.setting import Figure, near

UNITS, GOAL = 200, 0.499


class Units(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.zeros(UNITS, dtype=torch.float64))

    def forward(self) -> Tensor:
        return -((Bernoulli(logits=self.theta).sample() - GOAL) ** 2).mean()


def variance(draws: int, **options: object) -> float:
    """Mean over the units."""
    loss_fn = scg.compile(Units(), **options)  # type: ignore[arg-type]
    return float(scg.gradient_samples(loss_fn, n=draws)["theta"].var(0).mean())


def run(quick: bool = False) -> Iterator[Figure]:
    draws, within = (20, 3.0) if quick else (3000, 0.05)
    whole = {"credit": "none", "samples": 2}
    yield near("variance of leave-one-out, the global cost", 1.25e-9,
               variance(draws, estimator="score_function", **whole), within)  # fmt: skip
    yield near("variance of DisARM, the global cost", 1.2438e-9,
               variance(draws, estimator="disarm", credit="none"), within)  # fmt: skip
    yield near("variance with the costs split and units summed over", 0.0, variance(draws), 0, 1e-25)
    model = Units()
    loss_fn = scg.compile(model)
    optimizer = torch.optim.RMSprop(model.parameters(), lr=0.01)
    for _ in range(5 if quick else 2000):
        optimizer.zero_grad()
        loss_fn().backward()
        optimizer.step()
    reached = float(-scg.compile(model)().detach())
    yield Figure("objective reached in 2000 steps", 0.251, reached, abs(reached - 0.251001) < 1e-4 or quick)

"""Grathwohl et al. 2018, section 5.1: min E[(b - 0.499)^2], a gradient too small for REINFORCE to see.

One draw a step, Adam at 0.01 for the logit and for what RELAX learns, 5000 steps; the minimum is at probability zero.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli

import scg
from benchmarks.papers.setting import Figure
from scg.estimators import ESTIMATORS


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.zeros(1))

    def forward(self) -> Tensor:
        return ((Bernoulli(logits=self.theta).sample() - 0.499) ** 2).mean()


def final_probability(estimator: object, seed: int, steps: int) -> float:
    torch.manual_seed(seed)
    model = Toy()
    loss_fn = scg.compile(model, estimator=estimator, example_inputs=())
    optimizer = torch.optim.Adam(loss_fn.parameters(), lr=0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        loss_fn().backward()
        optimizer.step()
    return float(torch.sigmoid(model.theta.detach()))


def run(quick: bool = False) -> Iterator[Figure]:
    steps, seeds = (20, 1) if quick else (5000, 3)
    plain = ESTIMATORS["score_function"](baseline=None)
    reinforce = [final_probability(plain, seed, steps) for seed in range(1, seeds + 1)]
    relax = [final_probability(ESTIMATORS["relax"](), seed, steps) for seed in range(1, seeds + 1)]
    yield Figure("REINFORCE: final probability, median of the seeds", 0.62, statistics.median(reinforce), True)
    highest, lowest = max(relax), min(reinforce)
    yield Figure("RELAX: final probability, highest of the seeds", 0.17, highest, highest < 0.3 or quick)
    yield Figure("RELAX's highest against REINFORCE's lowest", 0.31, highest / lowest, highest < lowest or quick)

"""The toy of Liu et al. 2019 and Kool et al. 2019, 2020: three coins of one bias as one draw of eight outcomes."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributions import Bernoulli, Categorical

P0 = torch.tensor([0.6, 0.51, 0.48], dtype=torch.float64)
CORNERS = torch.tensor(list(itertools.product([0.0, 1.0], repeat=3)), dtype=torch.float64)
COSTS = (CORNERS - P0).square().sum(-1)  # [8]


def log_probabilities(eta: Tensor) -> Tensor:
    """Of the eight outcomes.  ``[8]``"""
    return Bernoulli(logits=eta).log_prob(CORNERS).sum(-1)


def coins(eta: Tensor) -> Callable[[], Tensor]:
    """The model: the cost of one of the eight outcomes."""

    def loss() -> Tensor:
        return COSTS[Categorical(logits=log_probabilities(eta)).sample()]

    return loss


def score(eta: float) -> tuple[Tensor, Tensor]:
    """Log probabilities and their derivatives."""
    value = torch.tensor(eta, dtype=torch.float64)
    return log_probabilities(value), (CORNERS - torch.sigmoid(value)).sum(-1)

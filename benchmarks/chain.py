"""A long unrolled chain, a site and a cost each step: the reward-to-go that scg finds in the graph, and by hand."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Bernoulli


class Chain(nn.Module):
    """A hidden state driven by binary choices towards zero."""

    def __init__(self, steps: int, width: int = 8) -> None:
        super().__init__()
        self.steps = steps
        self.policy = nn.Linear(width, width)
        self.dynamics = nn.Linear(width, width)

    def forward(self, state: Tensor) -> Tensor:
        loss = torch.zeros(())
        for _ in range(self.steps):
            z = Bernoulli(logits=self.policy(state)).sample()
            state = torch.tanh(self.dynamics(state + z - 0.5))
            loss = loss + (state**2).sum(-1).mean()
        return loss


def by_hand(model: Chain, state: Tensor, K: int) -> Tensor:
    """Reward-to-go as a reversed cumulative sum, leave-one-out over K draws."""
    state = state.expand(K, *state.shape)
    costs, log_probs = [], []
    for _ in range(model.steps):
        logits = model.policy(state)
        z = torch.bernoulli(torch.sigmoid(logits).detach())
        log_probs.append(-F.binary_cross_entropy_with_logits(logits, z, reduction="none"))
        state = torch.tanh(model.dynamics(state + z - 0.5))
        costs.append((state**2).sum(-1))
    cost, log_prob = torch.stack(costs), torch.stack(log_probs)  # [T, K, B], [T, K, B, D]
    to_go = cost.detach().flip(0).cumsum(0).flip(0)
    advantage = (to_go - to_go.mean(1, keepdim=True)) / ((K - 1) * state.shape[1])
    return cost.sum(0).mean() + (advantage.unsqueeze(-1) * log_prob).sum()

"""A two-layer Bernoulli VAE, 784-200-200: for scg as anybody would write it, and by hand with its gradient estimator.

Both use the score function with leave-one-out over K draws and credit element by element, so that with the same draws
their gradients are equal.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Bernoulli


class VAE(nn.Module):
    """The model: nothing in it knows of gradient estimators."""

    def __init__(self, pixels: int = 784, lower: int = 200, upper: int = 200) -> None:
        super().__init__()
        self.infer_lower = nn.Linear(pixels, lower)
        self.infer_upper = nn.Linear(lower, upper)
        self.prior = nn.Parameter(torch.zeros(upper))
        self.generate_lower = nn.Linear(upper, lower)
        self.generate_pixels = nn.Linear(lower, pixels)

    def forward(self, x: Tensor) -> Tensor:
        q1 = Bernoulli(logits=self.infer_lower(x))
        z1 = q1.sample()
        q2 = Bernoulli(logits=self.infer_upper(z1))
        z2 = q2.sample()
        nll = -Bernoulli(logits=self.generate_pixels(z1)).log_prob(x).sum(-1)
        lower = (q1.log_prob(z1) - Bernoulli(logits=self.generate_lower(z2)).log_prob(z1)).sum(-1)
        upper = (q2.log_prob(z2) - Bernoulli(logits=self.prior.expand_as(z2)).log_prob(z2)).sum(-1)
        return (nll + lower + upper).mean()


def by_hand(model: VAE, x: Tensor, K: int) -> Tensor:
    """A loss whose gradient is the estimate, as a careful engineer would write it."""
    logits1 = model.infer_lower(x)  # [B, D]
    z1 = torch.bernoulli(torch.sigmoid(logits1).detach().expand(K, *logits1.shape))  # [K, B, D]
    logits2 = model.infer_upper(z1)  # [K, B, D]
    z2 = torch.bernoulli(torch.sigmoid(logits2).detach())

    log_q1 = -F.binary_cross_entropy_with_logits(logits1.expand_as(z1), z1, reduction="none")
    log_q2 = -F.binary_cross_entropy_with_logits(logits2, z2, reduction="none")
    log_p1 = -F.binary_cross_entropy_with_logits(model.generate_lower(z2), z1, reduction="none")
    log_p2 = -F.binary_cross_entropy_with_logits(model.prior.expand_as(z2), z2, reduction="none")
    logits = model.generate_pixels(z1)
    nll = F.binary_cross_entropy_with_logits(logits, x.expand_as(logits), reduction="none").sum(-1)  # [K, B]
    objective = (nll + (log_q1 - log_p1).sum(-1) + (log_q2 - log_p2).sum(-1)).mean()

    with torch.no_grad():  # what each element of z1 and of z2 influences
        tied = log_q2 - log_p2
        shared = -log_p1.sum(-1)
        signal1 = (nll + shared + tied.sum(-1)).unsqueeze(-1) + log_q1
        signal2 = shared.unsqueeze(-1) + tied
        scale = 1 / ((K - 1) * x.shape[0])  # K / (K - 1) of leave-one-out, 1 / (K B) of the mean
        advantage1 = (signal1 - signal1.mean(0)) * scale
        advantage2 = (signal2 - signal2.mean(0)) * scale
    return objective + (advantage1 * log_q1).sum() + (advantage2 * log_q2).sum()

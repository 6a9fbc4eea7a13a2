"""Layered Bernoulli networks, for scg as anybody would write them: one hidden layer as a VAE, three as a classifier."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Bernoulli, kl_divergence

import scg


class OneLayerVAE(nn.Module):
    """784-200-784, the divergence in closed form."""

    def __init__(self, pixels: int = 784, units: int = 200) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(pixels, units), nn.Linear(units, pixels)
        self.prior = nn.Parameter(torch.zeros(units))

    def forward(self, x: Tensor) -> Tensor:
        q: Any = Bernoulli(logits=self.encoder(x))
        z = q.sample()
        nll = -Bernoulli(logits=self.decoder(z)).log_prob(x).sum(-1)
        prior = Bernoulli(logits=self.prior.expand_as(z))
        return (nll + kl_divergence(q, prior).sum(-1)).mean()


class Network(nn.Module):
    """Three stochastic layers below a softmax of ten classes."""

    def __init__(self, pixels: int = 784, units: int = 64) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(pixels if i == 0 else units, units) for i in range(3)])
        self.last = nn.Linear(units, 10)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        for layer in self.layers:
            x = scg.sample(Bernoulli(logits=layer(x)))
        return F.cross_entropy(self.last(x), y, reduction="none").mean()

    def deterministic(self, x: Tensor, y: Tensor) -> Tensor:
        """The same network with sigmoids in the place of the draws: what backpropagation costs."""
        for layer in self.layers:
            x = torch.sigmoid(layer(x))
        return F.cross_entropy(self.last(x), y)


def digits() -> tuple[Tensor, Tensor]:
    """Scikit-learn's 8 by 8 digits, blown up to 28 by 28 and made binary, and their classes.  ``[1797, 784]``"""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1)
    large = F.interpolate(images, size=(28, 28), mode="bilinear")
    return (large >= 8).float().flatten(1), torch.tensor(data.target)


def train(model: nn.Module, data: tuple[Tensor, ...], steps: int, **options: Any) -> None:
    """Adam on random batches of 50."""
    compiled = scg.compile(model, **options)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for _ in range(steps):
        rows = torch.randint(len(data[0]), (50,))
        optimizer.zero_grad()
        compiled(*(part[rows] for part in data)).backward()
        optimizer.step()


def total_variance(samples: Mapping[str, Tensor], only: str = "") -> float:
    """Of the gradient, summed over all coordinates of the parameters whose names begin so."""
    return sum(float(grad.var(0).sum()) for name, grad in samples.items() if name.startswith(only))

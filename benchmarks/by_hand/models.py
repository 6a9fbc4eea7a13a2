"""The models: nothing in them knows of gradient estimators."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Bernoulli, Categorical, Normal

import scg
from benchmarks.tokens import Policy


class Bits(nn.Module):
    """A VAE with a layer of bits."""

    def __init__(self, pixels: int = 784, bits: int = 200, hidden: int = 200) -> None:
        super().__init__()
        self.encoder = nn.Linear(pixels, bits)
        self.decoder = nn.Sequential(nn.Linear(bits, hidden), nn.Tanh(), nn.Linear(hidden, pixels))

    def costs(self, x: Tensor) -> Tensor:
        """Of each image."""
        q = Bernoulli(logits=self.encoder(x))
        z = q.sample()
        nll = -Bernoulli(logits=self.decoder(z)).log_prob(x).sum(-1)
        return nll + q.log_prob(z).sum(-1)

    def forward(self, x: Tensor) -> Tensor:
        return self.costs(x).mean()


class BitsBound(Bits):
    """Its importance-weighted bound."""

    def forward(self, x: Tensor) -> Tensor:
        return scg.multisample(self.costs(x)).mean()


class FewBits(Bits):
    """Eight of them, for estimators that evaluate the decoder once for each."""

    def __init__(self, pixels: int = 784, bits: int = 8, hidden: int = 200) -> None:
        super().__init__(pixels, bits, hidden)


class Mixture(nn.Module):
    """A decoder with a component drawn for each example."""

    def __init__(self, pixels: int = 784, components: int = 8, hidden: int = 200) -> None:
        super().__init__()
        self.gate, self.skip = nn.Linear(pixels, components), nn.Linear(pixels, hidden)
        self.table = nn.Parameter(torch.randn(components, hidden))
        self.out = nn.Linear(hidden, pixels)

    def forward(self, x: Tensor) -> Tensor:
        q = Categorical(logits=self.gate(x))
        z = q.sample()
        logits = self.out(torch.tanh(self.table[z] + self.skip(x)))
        nll = -Bernoulli(logits=logits).log_prob(x).sum(-1)
        return (nll + q.log_prob(z)).mean()


class Gaussian(nn.Module):
    """A VAE with a few normal latents."""

    def __init__(self, pixels: int = 784, latents: int = 4, hidden: int = 200) -> None:
        super().__init__()
        self.loc, self.scale = nn.Linear(pixels, latents), nn.Linear(pixels, latents)
        self.decoder = nn.Sequential(nn.Linear(latents, hidden), nn.Tanh(), nn.Linear(hidden, pixels))

    def costs(self, x: Tensor) -> Tensor:
        """Of each image."""
        q = Normal(self.loc(x), F.softplus(self.scale(x)))
        z = q.sample()
        nll = -Bernoulli(logits=self.decoder(z)).log_prob(x).sum(-1)
        prior = Normal(torch.zeros_like(z), torch.ones_like(z))
        return nll + (q.log_prob(z) - prior.log_prob(z)).sum(-1)

    def forward(self, x: Tensor) -> Tensor:
        return self.costs(x).mean()


class GaussianBound(Gaussian):
    """Its importance-weighted bound."""

    def forward(self, x: Tensor) -> Tensor:
        return scg.multisample(self.costs(x)).mean()


class Layers(nn.Module):
    """An autoencoder with two layers of bits."""

    def __init__(self, pixels: int = 784, lower: int = 16, upper: int = 16) -> None:
        super().__init__()
        self.lower, self.upper, self.out = nn.Linear(pixels, lower), nn.Linear(lower, upper), nn.Linear(upper, pixels)

    def forward(self, x: Tensor) -> Tensor:
        z = Bernoulli(logits=self.lower(x)).sample()
        y = Bernoulli(logits=self.upper(z)).sample()
        return -Bernoulli(logits=self.out(y)).log_prob(x).sum(-1).mean()


class Tokens(Policy):
    """The token policy with what was logged when its answers were drawn, which estimators read by name."""

    def forward(  # type: ignore[override]
        self, prompt: Tensor, tokens: Tensor, mask: Tensor, reward: Tensor, behaviour: Tensor, lengths: Tensor
    ) -> Tensor:
        return super().forward(prompt, tokens, mask, reward)

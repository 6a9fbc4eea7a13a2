"""One model an estimator: for scg as anybody would write it, and by hand with the estimator in its loss.

The hand-written losses draw as scg draws, so that with one seed the gradients are equal; a constant in their value that
has no gradient is left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Bernoulli, Categorical, Normal


class Bits(nn.Module):
    """A VAE with a layer of bits."""

    def __init__(self, pixels: int = 784, bits: int = 200, hidden: int = 200) -> None:
        super().__init__()
        self.encoder = nn.Linear(pixels, bits)
        self.decoder = nn.Sequential(nn.Linear(bits, hidden), nn.Tanh(), nn.Linear(hidden, pixels))

    def forward(self, x: Tensor) -> Tensor:
        q = Bernoulli(logits=self.encoder(x))
        z = q.sample()
        nll = -Bernoulli(logits=self.decoder(z)).log_prob(x).sum(-1)
        return (nll + q.log_prob(z).sum(-1)).mean()


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

    def forward(self, x: Tensor) -> Tensor:
        q = Normal(self.loc(x), F.softplus(self.scale(x)))
        z = q.sample()
        nll = -Bernoulli(logits=self.decoder(z)).log_prob(x).sum(-1)
        prior = Normal(torch.zeros_like(z), torch.ones_like(z))
        return (nll + (q.log_prob(z) - prior.log_prob(z)).sum(-1)).mean()


# -- by hand ----------------------------------------------------------------------------------------------------------
def _bits(logits: Tensor, z: Tensor) -> Tensor:
    """Log probability of each bit."""
    return -F.binary_cross_entropy_with_logits(logits.expand_as(z), z, reduction="none")


def _nll(logits: Tensor, x: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits, x.expand_as(logits), reduction="none").sum(-1)


def gumbel_softmax(model: Bits, x: Tensor, state: Any) -> Tensor:
    logits = model.encoder(x)
    u = torch.rand_like(logits).clamp(min=torch.finfo(logits.dtype).tiny)
    z = torch.sigmoid((logits + torch.log(u) - torch.log1p(-u)) / 0.5)
    return (_nll(model.decoder(z), x) + _bits(logits, z).sum(-1)).mean()


def disarm(model: Bits, x: Tensor, state: Any) -> Tensor:
    logits = model.encoder(x)
    with torch.no_grad():
        p = torch.sigmoid(logits)
        u = torch.rand_like(p)
        z = torch.stack([u < p, u >= 1 - p]).to(p.dtype)  # [2, B, D]
    nll, log_q = _nll(model.decoder(z), x), _bits(logits, z)
    with torch.no_grad():
        signal = nll.unsqueeze(-1) + log_q
        weight = (signal[0] - signal[1]) * (z[0] - z[1]) * torch.sigmoid(logits.abs()) * (0.5 / len(x))
    return (nll + log_q.sum(-1)).mean() + (weight * logits).sum()


def relax(model: Bits, x: Tensor, state: Any) -> Tensor:
    """``state`` holds the logarithm of the temperature, the scale and, for RELAX, the network."""
    logits = model.encoder(x)
    with torch.no_grad():
        b = torch.bernoulli(torch.sigmoid(logits))
        sign = 2 * b - 1

    def conditional(logits: Tensor) -> Tensor:
        u = torch.rand_like(b).clamp(min=torch.finfo(b.dtype).tiny)
        return sign * F.softplus(torch.log(u) - torch.log1p(-u) + F.softplus(sign * logits))

    nll, log_q = _nll(model.decoder(b), x), _bits(logits, b)
    fixed = logits.detach()
    free = fixed.clone().requires_grad_()
    z = free + (conditional(fixed) - fixed)
    soft = torch.sigmoid(torch.stack([z, conditional(free)]) / state.log_temperature.exp())  # [2, B, D]
    first, _, last = (layer for layer in model.decoder)
    assert isinstance(first, nn.Linear) and isinstance(last, nn.Linear)
    hidden = torch.tanh(F.linear(soft, first.weight.detach(), first.bias.detach()))
    relaxed = _nll(F.linear(hidden, last.weight.detach(), last.bias.detach()), x)  # [2, B]
    log_relaxed = _bits(fixed, soft)
    total = relaxed.sum(-1) + log_relaxed.sum((-2, -1))
    moved = state.scale * (total[0] - total[1])
    seen = state.scale * (relaxed[1].unsqueeze(-1) + log_relaxed[1])
    if state.network is not None:
        learnt = state.network(2 * soft - 1)  # [2, B, 1]
        moved = moved + (learnt[0] - learnt[1]).sum()
        seen = seen + learnt[1]
    (path,) = torch.autograd.grad(moved, free, create_graph=True)
    signal = (nll.unsqueeze(-1) + log_q).detach()
    g = (signal - seen) * (b - torch.sigmoid(fixed)) + path
    return (nll + log_q.sum(-1)).mean() + (g.detach() * logits + g**2).sum() / len(x)


def local_expectation(model: Bits, x: Tensor, state: Any) -> Tensor:
    logits = model.encoder(x)
    z = torch.bernoulli(torch.sigmoid(logits).detach())
    nll, log_q = _nll(model.decoder(z), x), _bits(logits, z)
    other = 1 - z
    log_other = _bits(logits, other)
    with torch.no_grad():
        one = torch.eye(z.shape[-1], dtype=torch.bool).unsqueeze(1)  # [D, 1, D]
        flipped = _nll(model.decoder(torch.where(one, other, z)), x)  # [D, B]
        gain = (flipped.T - nll.unsqueeze(-1) + log_other - log_q) / len(x)
    return (nll + log_q.sum(-1)).mean() + (log_other.exp() * gain).sum()


def enumerate_(model: Mixture, x: Tensor, state: Any) -> Tensor:
    log_p = torch.log_softmax(model.gate(x), -1).T  # [C, B]
    logits = model.out(torch.tanh(model.table.unsqueeze(1) + model.skip(x)))  # [C, B, pixels]
    return (log_p.exp() * (_nll(logits, x) + log_p)).sum(0).mean()


def unordered_set(model: Mixture, x: Tensor, state: Any) -> Tensor:
    """For sets of two the weights have closed forms, and so has the built-in baseline."""
    log_p = torch.log_softmax(model.gate(x), -1)
    with torch.no_grad():
        u = torch.rand(log_p.shape[::-1], dtype=log_p.dtype).T.clamp(min=torch.finfo(log_p.dtype).tiny)
        index = (torch.log(-torch.log1p(-u)) - log_p).sort(-1).indices[..., :2].T  # [2, B]
    log_s = log_p.gather(-1, index.T).T  # [2, B]
    logits = model.out(torch.tanh(model.table[index] + model.skip(x)))
    f = _nll(logits, x) + log_s  # [2, B]
    with torch.no_grad():
        p = log_s.exp()
        later = p.flip(0) / (1 - p)  # of the other one, once this one is drawn
        weight = p * later
        weight = weight / weight.sum(0) / len(x)
        advantage = weight * (1 - p) * (f - f.flip(0))
    return (weight * f).sum() + (advantage * log_s).sum()


def measure_valued(model: Gaussian, x: Tensor, state: Any) -> Tensor:
    loc, scale = model.loc(x), F.softplus(model.scale(x))
    with torch.no_grad():
        z = torch.normal(loc, scale)
        weibull = scale * (2 * torch.empty_like(z).exponential_()).sqrt()
        n = (z - loc) / scale
        maxwell = torch.copysign((n**2 + 2 * torch.empty_like(z).exponential_()).sqrt(), n)
        moved = torch.stack([loc + weibull, loc - weibull, loc + scale * maxwell])  # [3, B, D]
        one = torch.eye(z.shape[-1], dtype=torch.bool).unsqueeze(1)  # [D, 1, D]
        rows = torch.where(one, moved.unsqueeze(1), z).flatten(0, 1)  # [3 D, B, D]

    def ratio(z: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
        return 0.5 * (z**2 - ((z - loc) / scale) ** 2) - scale.log()

    nll, own = _nll(model.decoder(z), x), ratio(z, loc, scale)
    with torch.no_grad():
        at = _nll(model.decoder(rows), x).unflatten(0, (3, -1)).transpose(1, 2) + ratio(moved, loc, scale)  # [3, B, D]
        for_loc = (at[0] - at[1]) / (scale * math.sqrt(2 * math.pi) * len(x))
        for_scale = (at[2] - nll.unsqueeze(-1) - own) / (scale * len(x))
    return (nll + own.sum(-1)).mean() + (for_loc * loc + for_scale * scale).sum()


@dataclass(frozen=True)
class Case:
    """An estimator's name is its key in `CASES`."""

    model: Callable[..., nn.Module]
    by_hand: Callable[[Any, Tensor, Any], Tensor]
    """The loss, given model, images and the learned parts of the estimator."""


CASES: dict[str, Case] = {
    "gumbel_softmax": Case(Bits, gumbel_softmax),
    "disarm": Case(Bits, disarm),
    "rebar": Case(Bits, relax),
    "relax": Case(Bits, relax),
    "enumerate": Case(Mixture, enumerate_),
    "unordered_set": Case(Mixture, unordered_set),
    "local_expectation": Case(FewBits, local_expectation),
    "measure_valued": Case(Gaussian, measure_valued),
}

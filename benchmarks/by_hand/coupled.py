"""Several coupled draws."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from benchmarks.by_hand.densities import bits, pixels
from benchmarks.by_hand.models import Bits, Mixture


def _pair(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Uniforms and two antithetic draws of them.  ``[B, D]``, ``[2, B, D]``"""
    with torch.no_grad():
        p = torch.sigmoid(logits)
        u = torch.rand_like(p)
        return u, torch.stack([u < p, u >= 1 - p]).to(p.dtype)


def arm(model: Bits, x: Tensor, state: Any) -> Tensor:
    logits = model.encoder(x)
    u, z = _pair(logits)
    nll, log_q = pixels(model.decoder(z), x), bits(logits, z)
    with torch.no_grad():
        signal = nll.unsqueeze(-1) + log_q
        weight = (signal[0] - signal[1]) * (0.5 - u) / len(x)
    return (nll + log_q.sum(-1)).mean() + (weight * logits).sum()


def disarm(model: Bits, x: Tensor, state: Any) -> Tensor:
    logits = model.encoder(x)
    _, z = _pair(logits)
    nll, log_q = pixels(model.decoder(z), x), bits(logits, z)
    with torch.no_grad():
        signal = nll.unsqueeze(-1) + log_q
        weight = (signal[0] - signal[1]) * (z[0] - z[1]) * torch.sigmoid(logits.abs()) * (0.5 / len(x))
    return (nll + log_q.sum(-1)).mean() + (weight * logits).sum()


def arms(model: Bits, x: Tensor, state: Any) -> Tensor:
    """Four draws, their uniforms from a Dirichlet distribution."""
    logits = model.encoder(x)
    with torch.no_grad():
        p = torch.sigmoid(logits)
        rare = torch.minimum(p, 1 - p)
        gaps = -torch.log1p(-torch.rand((4, *p.shape), dtype=p.dtype))
        low = (1 - gaps / gaps.sum(0)) ** 3 < rare
        z = torch.where(p < 0.5, low, ~low).to(p.dtype)  # [4, B, D]
    nll, log_q = pixels(model.decoder(z), x), bits(logits, z)
    with torch.no_grad():
        signal = nll.unsqueeze(-1) + log_q
        covariance = ((signal - signal.mean(0)) * z).sum(0) / (3 * len(x))
        both = (2 * rare ** (1 / 3) - 1).clamp_min(0) ** 3  # P(two of them are the rarer outcome)
        weight = covariance * (1 - rare) / (1 - both / rare)
    return (nll + log_q.sum(-1)).mean() + (weight * logits).sum()


def carms(model: Mixture, x: Tensor, state: Any) -> Tensor:
    """Four draws, the categories in a random order with two of them at its ends."""
    log_p = torch.log_softmax(model.gate(x), -1)
    with torch.no_grad():
        p = log_p.double().softmax(-1)  # differences of distribution functions cancel
        index, ratio = _carms_draws(p)
    log_s = log_p.gather(-1, index.T).T  # [4, B]
    f = pixels(model.out(torch.tanh(model.table[index] + model.skip(x))), x) + log_s
    with torch.no_grad():
        advantage = (ratio.to(f.dtype) * (f.unsqueeze(1) - f)).sum(1) / (12 * len(x))
    return f.mean() + (advantage * log_s).sum()


def _carms_draws(p: Tensor) -> tuple[Tensor, Tensor]:
    """Four draws and ``p(z_i) p(z_j) / P(z_i, z_j)`` of each two.  ``[4, B]``, ``[4, 4, B]``"""
    count = p.shape[-1]
    pairs = list(itertools.combinations(range(count), 2))
    inner = [[i for i in range(count) if i not in pair] for pair in pairs]
    ends = torch.tensor(pairs)  # [O, 2]
    up = torch.tensor([[pair[0], *rest, pair[1]] for pair, rest in zip(pairs, inner, strict=True)])  # [O, C]
    down = torch.tensor([[pair[1], *rest, pair[0]] for pair, rest in zip(pairs, inner, strict=True)])
    order = torch.where((p[:, ends[:, 0]] <= p[:, ends[:, 1]]).unsqueeze(-1), up, down)  # [B, O, C]
    picked = order[torch.arange(len(p)), torch.randint(len(ends), (len(p),))]  # [B, C]
    edges = p.gather(-1, picked).cumsum(-1)[:, :-1]
    gaps = -torch.log1p(-torch.rand((4, len(p)), dtype=p.dtype))
    u = (1 - gaps / gaps.sum(0)) ** 3
    place = (u.unsqueeze(-1) >= edges).sum(-1)
    index = picked.gather(-1, place.T)  # [B, 4]

    drawn = index.unsqueeze(1)  # [B, 1, 4]
    upper = p.unsqueeze(1).expand(order.shape).gather(-1, order).cumsum(-1)  # [B, O, C]
    rank = order.argsort(-1).gather(-1, drawn.expand(-1, len(ends), -1))  # [B, O, 4]
    roots = torch.cat([torch.zeros_like(upper[..., :1]), upper], -1) ** (1 / 3)
    low, high = roots.gather(-1, rank), roots.gather(-1, rank + 1)

    def below(left: Tensor, right: Tensor) -> Tensor:
        return (left.unsqueeze(-1) + right.unsqueeze(-2) - 1).clamp_min(0) ** 3  # [B, O, 4, 4]

    mixed = below(low, high)
    joint = (below(high, high) - mixed - mixed.mT + below(low, low)).mean(1)  # [B, 4, 4]
    own = p.gather(-1, index)
    ratio = own.unsqueeze(-1) * own.unsqueeze(-2) / joint.clamp_min(torch.finfo(p.dtype).tiny)
    ratio = ratio.clamp_max(len(ends)).masked_fill(index.unsqueeze(-1) == drawn, 0.0)
    return index.T, ratio.permute(1, 2, 0)


def arsm(model: Mixture, x: Tensor, state: Any) -> Tensor:
    """The noise of each two categories swapped."""
    log_p = torch.log_softmax(model.gate(x), -1)
    with torch.no_grad():
        z = torch.multinomial(log_p.exp(), 1, replacement=True)  # [B, 1]
    log_q = log_p.gather(-1, z).squeeze(-1)
    skip = model.skip(x)
    f = pixels(model.out(torch.tanh(model.table[z.squeeze(-1)] + skip)), x) + log_q
    with torch.no_grad():
        count = log_p.shape[-1]
        waits = -torch.log1p(-torch.rand((len(x), count + 1), dtype=log_p.dtype))
        arrivals = log_p.exp() * waits[:, :1] + waits[:, 1:].scatter(-1, z, 0.0)
        pi = arrivals / arrivals.sum(-1, keepdim=True)
        a, b = torch.triu_indices(count, count, 1)
        order = (
            torch.arange(count)
            .repeat(len(a), 1)
            .scatter(-1, a[:, None], b[:, None])
            .scatter(-1, b[:, None], a[:, None])
        )
        index = (pi[:, order].log() - log_p.unsqueeze(1)).argmin(-1).T  # [P, B]
        swapped = pixels(model.out(torch.tanh(model.table[index] + skip)), x) + log_p.gather(-1, index.T).T
        gain = torch.zeros((count, count, len(x)), dtype=x.dtype)
        gain[a, b] = gain[b, a] = (swapped - f) / len(x)
        slope = ((gain - gain.mean(0)) * (1 / count - pi).T).sum(1).T  # [B, C]
    return f.mean() + (slope * log_p).sum()

"""Control variates: the score function of what an approximation of the cost leaves over."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.by_hand.densities import bits, frozen, pixels
from benchmarks.by_hand.models import Bits


def relax(model: Bits, x: Tensor, state: Any) -> Tensor:
    """``state`` holds the logarithm of the temperature, the scale and, for RELAX, the network."""
    logits = model.encoder(x)
    with torch.no_grad():
        b = torch.bernoulli(torch.sigmoid(logits))
        sign = 2 * b - 1

    def conditional(logits: Tensor) -> Tensor:
        u = torch.rand_like(b).clamp(min=torch.finfo(b.dtype).tiny)
        return sign * F.softplus(torch.log(u) - torch.log1p(-u) + F.softplus(sign * logits))

    nll, log_q = pixels(model.decoder(b), x), bits(logits, b)
    fixed = logits.detach()
    free = fixed.clone().requires_grad_()
    z = free + (conditional(fixed) - fixed)
    soft = torch.sigmoid(torch.stack([z, conditional(free)]) / state.log_temperature.exp())  # [2, B, D]
    relaxed = pixels(frozen(model.decoder, soft), x)  # [2, B]
    log_relaxed = bits(fixed, soft)
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


def muprop(model: Bits, x: Tensor, state: Any) -> Tensor:
    logits = model.encoder(x)
    p = torch.sigmoid(logits)
    mean = p.detach().requires_grad_()
    z = torch.bernoulli(mean.detach())
    nll, log_q = pixels(model.decoder(z), x), bits(logits, z)
    at_mean, log_at_mean = pixels(frozen(model.decoder, mean), x), bits(logits.detach(), mean)
    (slope,) = torch.autograd.grad(at_mean.sum() + log_at_mean.sum(), mean)
    with torch.no_grad():
        linear = at_mean + (slope * (z - mean)).sum(-1)
        advantage = (nll - linear).unsqueeze(-1) + log_q - log_at_mean
    return (nll + log_q.sum(-1)).mean() + (advantage * log_q + slope * p).sum() / len(x)

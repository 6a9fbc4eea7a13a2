"""Control variates: the score function of what an approximation of the cost leaves over."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.by_hand.densities import bits, frozen, pixels
from benchmarks.by_hand.models import Bits, FewBits, Gaussian


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


def _others(values: Tensor) -> Tensor:
    """The mean over the other draws."""
    return (values.sum(0, keepdim=True) - values) / (len(values) - 1)


def double_cv(model: Bits, x: Tensor, state: Any) -> Tensor:
    """Two draws; ``state`` holds the scale."""
    logits = model.encoder(x)
    p = torch.sigmoid(logits.detach())
    z = torch.bernoulli(p.expand(2, *p.shape)).requires_grad_()  # [2, B, D]
    nll, log_q = pixels(model.decoder(z), x), bits(logits, z)
    (slope,) = torch.autograd.grad(nll.sum() + log_q.sum(), z, retain_graph=True)
    slope, step = _others(slope), z.detach() - p
    h = (nll.unsqueeze(-1) + log_q).detach() - state.scale * (slope * step).sum(-1, keepdim=True)
    g = (h - _others(h)) * step + state.scale * (slope * p * (1 - p))
    return (nll + log_q.sum(-1)).mean() + ((g.detach() * logits).mean(0) + g.mean(0) ** 2).sum() / len(x)


def rodeo(model: FewBits, x: Tensor, state: Any) -> Tensor:
    """Two draws; ``state`` holds the network and the two factors."""
    logits = model.encoder(x)
    p = torch.sigmoid(logits.detach())
    z = torch.bernoulli(p.expand(2, *p.shape)).requires_grad_()  # [2, B, D]
    nll, log_q = pixels(model.decoder(z), x), bits(logits, z)
    (slope,) = torch.autograd.grad(nll.sum() + log_q.sum() / z.shape[-1], z, retain_graph=True)
    with torch.no_grad():
        signal = nll.unsqueeze(-1) + log_q
        cost, tangent = _others(signal.mean(-1, keepdim=True)), _others(slope)
        at = (tangent * z).sum(-1, keepdim=True) - _others((slope * z).sum(-1, keepdim=True))  # [2, B, 1]
        steps = torch.stack([-z, 1 - z])  # [2, 2, B, D]
        mass = torch.stack([1 - p, p]).unsqueeze(1)  # [2, 1, B, D]
        moved = at + tangent * steps
    drawn = state.network(torch.stack([cost, at], -1))  # [2, B, 1, 2]
    changed = state.network(torch.stack([cost.expand_as(moved), moved], -1))  # [2, 2, B, D, 2]
    inner, outer = ((mass.unsqueeze(-1) * changed).sum(0) - drawn).mean(-2, keepdim=True).unbind(-1)
    score = z.detach() - p
    stein = outer * score + (mass * changed[..., 1] * steps).sum(0) / z.shape[-1]
    advantage = signal - _others(signal + state.factors[0] * inner)
    g = advantage * score + state.factors[1] * stein
    return (nll + log_q.sum(-1)).mean() + ((g.detach() * logits).mean(0) + g.mean(0) ** 2).sum() / len(x)


def lax(model: Gaussian, x: Tensor, state: Any) -> Tensor:
    """``state`` holds the network."""
    loc, scale = model.loc(x), F.softplus(model.scale(x))
    with torch.no_grad():
        z = torch.normal(loc, scale)
        n = (z - loc) / scale
    log_ratio = 0.5 * (z**2 - ((z - loc) / scale) ** 2) - scale.log()  # of q to the prior
    nll = pixels(model.decoder(z), x)
    free_loc, free_scale = loc.detach().requires_grad_(), scale.detach().requires_grad_()
    learnt = state.network(free_loc + free_scale * n)  # [B, 1]
    paths = torch.autograd.grad(learnt.sum(), (free_loc, free_scale), create_graph=True)
    rest = (nll.unsqueeze(-1) + log_ratio).detach() - learnt
    total = (nll + log_ratio.sum(-1)).mean()
    for parameter, score, path in zip((loc, scale), (n, n**2 - 1), paths, strict=True):
        g = rest * (score / scale.detach()) + path
        total = total + (g.detach() * parameter + g**2).sum() / len(x)
    return total

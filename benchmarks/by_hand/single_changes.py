"""The cost evaluated again where one element of the draw is changed."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.by_hand.densities import bits, pixels
from benchmarks.by_hand.models import Bits, FewBits, Gaussian, Layers


def local_expectation(model: FewBits, x: Tensor, state: Any) -> Tensor:
    logits = model.encoder(x)
    z = torch.bernoulli(torch.sigmoid(logits).detach())
    nll, log_q = pixels(model.decoder(z), x), bits(logits, z)
    other = 1 - z
    log_other = bits(logits, other)
    with torch.no_grad():
        one = torch.eye(z.shape[-1], dtype=torch.bool).unsqueeze(1)  # [D, 1, D]
        flipped = pixels(model.decoder(torch.where(one, other, z)), x)  # [D, B]
        gain = (flipped.T - nll.unsqueeze(-1) + log_other - log_q) / len(x)
    return (nll + log_q.sum(-1)).mean() + (log_other.exp() * gain).sum()


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

    nll, own = pixels(model.decoder(z), x), ratio(z, loc, scale)
    with torch.no_grad():
        at = pixels(model.decoder(rows), x).unflatten(0, (3, -1)).transpose(1, 2) + ratio(
            moved, loc, scale
        )  # [3, B, D]
        for_loc = (at[0] - at[1]) / (scale * math.sqrt(2 * math.pi) * len(x))
        for_scale = (at[2] - nll.unsqueeze(-1) - own) / (scale * len(x))
    return (nll + own.sum(-1)).mean() + (for_loc * loc + for_scale * scale).sum()


def bitflip(model: Bits, x: Tensor, state: Any) -> Tensor:
    logits = model.encoder(x)
    z = torch.bernoulli(torch.sigmoid(logits).detach())
    nll, log_q = pixels(model.decoder(z), x), bits(logits, z)
    with torch.no_grad():
        index = torch.multinomial(torch.ones_like(z), 1)
        other = 1 - z.gather(-1, index)
        flipped = pixels(model.decoder(z.scatter(-1, index, other)), x).unsqueeze(-1)
    log_other = bits(logits.gather(-1, index), other)
    with torch.no_grad():
        gain = flipped - nll.unsqueeze(-1) + log_other - log_q.gather(-1, index)
    return (nll + log_q.sum(-1)).mean() + (log_other.exp() * gain).sum() * (z.shape[-1] / len(x))


def indecater(model: FewBits, x: Tensor, state: Any) -> Tensor:
    logits = model.encoder(x)
    p = torch.sigmoid(logits)
    with torch.no_grad():
        z = torch.bernoulli(p)
        one = torch.eye(z.shape[-1], dtype=torch.bool).unsqueeze(1)  # [D, 1, D]
        others = torch.bernoulli(p.expand(z.shape[-1], *p.shape))  # [D, B, D]
        rows = torch.stack([others.masked_fill(one, 0.0), others.masked_fill(one, 1.0)])
        at = pixels(model.decoder(rows), x)  # [2, D, B]
        gain = (at[1] - at[0]).T + logits  # log q(1) - log q(0)
    nll, log_q = pixels(model.decoder(z), x), bits(logits, z)
    return (nll + log_q.sum(-1)).mean() + (p * gain).sum() / len(x)


def stochastic_ad(model: Bits, x: Tensor, state: Any) -> Tensor:
    logits = model.encoder(x)
    p = torch.sigmoid(logits)
    z = torch.bernoulli(p.detach())
    nll, log_q = pixels(model.decoder(z), x), bits(logits, z)
    with torch.no_grad():
        rate = (1 - z) / (1 - p)
        total = rate.sum(-1, keepdim=True)
        index = torch.multinomial(torch.where(total > 0, rate, 1.0), 1)
        raised = pixels(model.decoder(z.scatter(-1, index, 1.0)), x)
        gain = (raised - nll).unsqueeze(-1) + logits.gather(-1, index)  # log q(1) - log q(0)
        weight = total * gain / len(x)
    return (nll + log_q.sum(-1)).mean() + (weight * p.gather(-1, index)).sum()


def go_gradient(model: FewBits, x: Tensor, state: Any) -> Tensor:
    logits = model.encoder(x)
    p = torch.sigmoid(logits)
    z = torch.bernoulli(p.detach())
    nll, log_q = pixels(model.decoder(z), x), bits(logits, z)
    with torch.no_grad():
        one = torch.eye(z.shape[-1], dtype=torch.bool).unsqueeze(1)  # [D, 1, D]
        raised = pixels(model.decoder(z.masked_fill(one, 1.0)), x)  # [D, B]
        gain = raised.T - nll.unsqueeze(-1) + logits  # log q(1) - log q(0)
        weight = (1 - z) / (1 - p) * gain / len(x)
    return (nll + log_q.sum(-1)).mean() + (weight * p).sum()


def spsa(model: Bits, x: Tensor, state: Any) -> Tensor:
    """All logits moved by 0.1 up or down, with the same uniforms."""
    logits = model.encoder(x)
    z = torch.bernoulli(torch.sigmoid(logits).detach())
    nll, log_q = pixels(model.decoder(z), x), bits(logits, z)
    with torch.no_grad():
        u = torch.rand_like(z)
        sign = 2 * torch.bernoulli(torch.full_like(z, 0.5)) - 1
        moved = (u > 1 - torch.sigmoid(torch.stack([logits + 0.1 * sign, logits - 0.1 * sign]))).to(z.dtype)
        at = pixels(model.decoder(moved), x).unsqueeze(-1) + bits(logits, moved)  # [2, B, D]
        slope = (at[0] - at[1]) * sign / (0.2 * len(x))
    return (nll + log_q.sum(-1)).mean() + (slope * logits).sum()


def hnca(model: Layers, x: Tensor, state: Any) -> Tensor:
    """The lower layer by hindsight, the upper one by local expectation; ``state`` is a running mean."""
    logits = model.lower(x)
    z = torch.bernoulli(torch.sigmoid(logits).detach())
    upper = model.upper(z)
    y = torch.bernoulli(torch.sigmoid(upper).detach())
    logits_x = model.out(y)
    nll = pixels(logits_x, x)
    log_q = bits(logits, torch.stack([z, 1 - z]))  # [2, B, D]
    with torch.no_grad():
        flipped = torch.addcmul(logits_x, (1 - 2 * y).T.unsqueeze(-1), model.out.weight.T.unsqueeze(1))
        gain = (pixels(flipped, x).T - nll.unsqueeze(-1)) / len(x)  # [B, U]
        moved = torch.addcmul(upper, (1 - 2 * z).T.unsqueeze(-1), model.upper.weight.T.unsqueeze(1))  # [D, B, U]
        ratio = (bits(moved, y.expand_as(moved)).sum(-1) - bits(upper, y).sum(-1)).T  # [B, D]
        posterior = torch.stack([log_q[0], log_q[1] + ratio]).softmax(0)
        advantage = nll.unsqueeze(-1) - state.total / state.weight.clamp(min=1e-30)
        state.total.mul_(0.9).add_(nll.mean(), alpha=0.1)
        state.weight.mul_(0.9).add_(0.1)
        weight = posterior * advantage / len(x)
    return nll.mean() + (weight * log_q).sum() + (gain * bits(upper, 1 - y).exp()).sum()

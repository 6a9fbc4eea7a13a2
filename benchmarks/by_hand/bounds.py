"""Importance-weighted bounds of four draws."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.by_hand.densities import bits, pixels
from benchmarks.by_hand.models import Bits, Gaussian


def _bound(log_w: Tensor) -> Tensor:
    """Minus the log of the mean weight of the draws ``[K, *B]``."""
    return math.log(len(log_w)) - log_w.logsumexp(0)


def vimco(model: Bits, x: Tensor, state: Any) -> Tensor:
    logits = model.encoder(x)
    z = torch.bernoulli(torch.sigmoid(logits).detach().expand(4, *logits.shape))  # [4, B, D]
    log_q = bits(logits, z).sum(-1)
    log_w = -(pixels(model.decoder(z), x) + log_q)  # [4, B]
    bound = _bound(log_w)
    with torch.no_grad():
        others = (log_w.sum(0) - log_w) / 3
        own = torch.eye(4, dtype=torch.bool).unsqueeze(-1)  # [4, 4, 1]
        advantage = (bound - _bound(torch.where(own, others, log_w.unsqueeze(1)))) / len(x)
    return bound.mean() + (advantage * log_q).sum()


def iwae(model: Gaussian, x: Tensor, state: Any) -> Tensor:
    loc, scale = model.loc(x), F.softplus(model.scale(x))
    n = torch.randn((4, *loc.shape), dtype=loc.dtype)
    z = loc + scale * n
    log_ratio = 0.5 * (z**2 - ((z - loc) / scale) ** 2) - scale.log()  # of q to the prior
    return _bound(-(pixels(model.decoder(z), x) + log_ratio.sum(-1))).mean()


def dreg(model: Gaussian, x: Tensor, state: Any) -> Tensor:
    loc, scale = model.loc(x), F.softplus(model.scale(x))
    n = torch.randn((4, *loc.shape), dtype=loc.dtype)
    z = loc + scale * n
    log_ratio = 0.5 * (z**2 - ((z - loc.detach()) / scale.detach()) ** 2) - scale.detach().log()
    log_w = -(pixels(model.decoder(z), x) + log_ratio.sum(-1))  # [4, B]
    share = log_w.detach().softmax(0).unsqueeze(-1)
    z.register_hook(lambda gradient: gradient * share)  # share**2 in all
    return _bound(log_w).mean()

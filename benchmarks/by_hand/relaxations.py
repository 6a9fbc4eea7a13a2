"""Relaxations: a continuous stand-in for a layer of bits, or its derivative in their place."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.by_hand.densities import bits, pixels
from benchmarks.by_hand.models import Bits


def gumbel_softmax(model: Bits, x: Tensor, state: Any) -> Tensor:
    logits = model.encoder(x)
    u = torch.rand_like(logits).clamp(min=torch.finfo(logits.dtype).tiny)
    z = torch.sigmoid((logits + torch.log(u) - torch.log1p(-u)) / 0.5)
    return (pixels(model.decoder(z), x) + bits(logits, z).sum(-1)).mean()


def _objective(model: Bits, x: Tensor, logits: Tensor, z: Tensor) -> Tensor:
    return (pixels(model.decoder(z), x) + bits(logits, z).sum(-1)).mean()


def straight_through(model: Bits, x: Tensor, state: Any) -> Tensor:
    logits = model.encoder(x)
    p = torch.sigmoid(logits)
    fixed = p.detach()
    return _objective(model, x, logits, torch.bernoulli(fixed) + (p - fixed))


def reinmax(model: Bits, x: Tensor, state: Any) -> Tensor:
    logits = model.encoder(x)
    fixed = logits.detach()
    p = torch.sigmoid(fixed)
    z = torch.bernoulli(p)
    middle = (p + z) / 2
    slope = 2 * middle * (1 - middle) - p * (1 - p) / 2
    return _objective(model, x, logits, z + slope * (logits - fixed))


def gumbel_rao(model: Bits, x: Tensor, state: Any) -> Tensor:
    """Temperature 0.5, ten copies of the noise."""
    logits = model.encoder(x)
    fixed = logits.detach()
    z = torch.bernoulli(torch.sigmoid(fixed))
    sign = 2 * z - 1
    u = torch.rand((10, *z.shape), dtype=z.dtype).clamp(min=torch.finfo(z.dtype).tiny)
    noisy = sign * F.softplus(torch.log(u) - torch.log1p(-u) + F.softplus(sign * fixed))  # [10, B, D]
    soft = torch.sigmoid(noisy / 0.5)
    slope = (soft * (1 - soft)).mean(0) / 0.5
    return _objective(model, x, logits, z + slope * (logits - fixed))


def decoupled_st(model: Bits, x: Tensor, state: Any) -> Tensor:
    """Drawn at temperature 1, differentiated at 2."""
    logits = model.encoder(x)
    z = torch.bernoulli(torch.sigmoid(logits.detach()))
    soft = torch.sigmoid(logits / 2)
    return _objective(model, x, logits, z + (soft - soft.detach()))

"""Several coupled draws of a layer of bits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.by_hand.densities import bits, pixels
from benchmarks.by_hand.models import Bits


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

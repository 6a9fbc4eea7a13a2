"""The score function and the pathwise derivative."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.by_hand.densities import bits, pixels
from benchmarks.by_hand.models import Bits, Gaussian


def score_function(model: Bits, x: Tensor, state: Any) -> Tensor:
    """Leave-one-out over four draws."""
    logits = model.encoder(x)
    z = torch.bernoulli(torch.sigmoid(logits).detach().expand(4, *logits.shape))  # [4, B, D]
    nll, log_q = pixels(model.decoder(z), x), bits(logits, z)
    with torch.no_grad():
        signal = nll.unsqueeze(-1) + log_q
        advantage = (signal - signal.mean(0)) / (3 * len(x))  # 4 / 3 of leave-one-out, 1 / 4 of the mean
    return (nll + log_q.sum(-1)).mean() + (advantage * log_q).sum()


def reparam(model: Gaussian, x: Tensor, state: Any) -> Tensor:
    loc, scale = model.loc(x), F.softplus(model.scale(x))
    z = loc + scale * torch.randn_like(loc)
    log_ratio = 0.5 * (z**2 - ((z - loc) / scale) ** 2) - scale.log()  # of q to the prior
    return (pixels(model.decoder(z), x) + log_ratio.sum(-1)).mean()

"""Densities that several of the losses use."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


def bits(logits: Tensor, z: Tensor) -> Tensor:
    """Log probability of each bit."""
    return -F.binary_cross_entropy_with_logits(logits.expand_as(z), z, reduction="none")


def pixels(logits: Tensor, x: Tensor) -> Tensor:
    """Minus the log probability of an image, its pixels summed."""
    return F.binary_cross_entropy_with_logits(logits, x.expand_as(logits), reduction="none").sum(-1)


def frozen(decoder: nn.Sequential, z: Tensor) -> Tensor:
    """The decoder's output with gradients in its input alone."""
    first, _, last = decoder
    assert isinstance(first, nn.Linear) and isinstance(last, nn.Linear)
    hidden = F.linear(z, first.weight.detach(), first.bias.detach()).tanh()
    return F.linear(hidden, last.weight.detach(), last.bias.detach())

"""Impossible outcomes: parameters that are infinite where a probability is zero."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def finite(logits: Tensor) -> Tensor:
    """``logits`` whose impossible categories are large numbers, not infinite: zero times them is zero.

    Their probability stays exactly zero, and the root of the largest number leaves room to divide by a temperature.
    """
    limit = math.sqrt(torch.finfo(logits.dtype).max)
    return F.hardtanh(logits, -limit, limit)  # a clamp whose backward is one kernel

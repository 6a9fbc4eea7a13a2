"""Multi-sample bounds and the credit of each draw in them."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def multisample_bound(cost: Tensor, axis: int, alpha: float) -> Tensor:
    r"""``-1/(1 - alpha) log mean_k exp(-(1 - alpha) cost_k)`` along ``axis``: Burda 2016; Li and Turner 2016, eq. 7."""
    order = 1.0 - alpha
    return (torch.logsumexp(-order * cost, axis) - math.log(cost.shape[axis])) / -order


def leave_one_out_gain(cost: Tensor, axis: int, alpha: float) -> Tensor:
    """For each draw, the bound less the bound in which its log weight is the mean of the others' (VIMCO).

    Mnih and Rezende 2016, eq. 10, with the geometric mean. Of the shape of ``cost``.
    """
    count = cost.shape[axis]
    rows = cost.movedim(axis, 0)  # [K, …]
    others = (rows.sum(0) - rows) / (count - 1)
    own = torch.eye(count, dtype=torch.bool, device=cost.device).reshape([count, count] + [1] * (rows.dim() - 1))
    replaced = torch.where(own, others.unsqueeze(1), rows.unsqueeze(0))  # [K (left out), K, …]
    gain = multisample_bound(rows, 0, alpha) - multisample_bound(replaced, 1, alpha)
    return gain.movedim(0, axis)

"""What a reproduction prints, and how gradients of many replicas are drawn in one step."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import scg


@dataclass(frozen=True)
class Figure:
    """One line of a reproduction."""

    what: str
    theirs: float
    ours: float
    holds: bool

    def __str__(self) -> str:
        return f"| {self.what} | {self.theirs:.5g} | {self.ours:.5g} | {'yes' if self.holds else 'NO'} |"


def near(what: str, theirs: float, ours: float, within: float, floor: float = 1e-20) -> Figure:
    """A figure that must be met up to a relative difference; ``floor`` is what counts as zero."""
    return Figure(what, theirs, ours, math.isclose(theirs, ours, rel_tol=within, abs_tol=floor))


def gradients(cost: Callable[[Tensor], Tensor], theta: float, replicas: int, steps: int = 1, **options: Any) -> Tensor:
    """Independent estimates of d E[cost] / d theta.

    Args:
        cost: from ``[replicas]`` parameters to ``[replicas]`` costs, each of its own parameter alone.
        theta: the parameter's value.
        replicas: estimates a step: credit keeps them apart.
        steps: how many steps.
        **options: of `scg.compile`.

    Returns:
        ``[steps * replicas]``
    """
    parameter = nn.Parameter(torch.full((replicas,), theta, dtype=torch.float64))
    loss_fn = scg.compile(lambda: cost(parameter).sum(), **options)
    found = []
    for _ in range(steps):
        (gradient,) = torch.autograd.grad(loss_fn(), parameter)
        found.append(gradient)
    return torch.cat(found)

"""Baselines: what may be subtracted from a score-type signal without changing its expectation.

A baseline ``b`` of an element is legal when it does not depend on that element's own draw (Schulman et al. 2015).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from scg.estimators.base import YES, Reads, SiteContext, SiteInfo, Support


@dataclass(frozen=True)
class Baseline:
    """Base of the built-in baselines."""

    name: ClassVar[str] = ""
    unbiased: ClassVar[bool] = True
    learned: ClassVar[bool] = False
    """Whether it brings parameters of its own."""
    evaluations: ClassVar[int] = 0
    """Further evaluations of what lies below the site."""
    draws: ClassVar[int] = 1
    """How many i.i.d. draws of the site it needs."""

    @property
    def biases(self) -> tuple[str, ...]:
        """As `Estimator.biases`."""
        return ()

    @property
    def reads(self) -> Reads:
        """What it reads beside the signal."""
        return ()

    def check(self, site: SiteInfo) -> Support:
        """Whether it fits the site."""
        return YES

    def make_state(self, site: SiteInfo, batch_dims: tuple[int, ...]) -> nn.Module | None:
        """Running or learned parts, owned by the compiled module."""
        return None

    def value(self, context: SiteContext) -> Tensor | None:
        """What to subtract, broadcastable to ``context.signal``; None for nothing."""
        raise NotImplementedError

    def advantage(self, context: SiteContext) -> Tensor:
        """The signal less the baseline.  ``[*dims | *elements]``"""
        value = self.value(context)
        return context.signal if value is None else context.signal - value


@dataclass(frozen=True)
class NoBaseline(Baseline):
    """Nothing is subtracted."""

    name: ClassVar[str] = "none"

    def value(self, context: SiteContext) -> None:
        return None


@dataclass(frozen=True)
class Constant(Baseline):
    """A number, in the units of the costs before the objective's common coefficient (a mean's ``1 / B``)."""

    constant: float = 0.0

    name: ClassVar[str] = "constant"

    def value(self, context: SiteContext) -> Tensor:
        return torch.full_like(context.signal, self.constant)


@dataclass(frozen=True)
class LeaveOneOut(Baseline):
    r"""The mean signal of the other draws, :math:`b_k = \frac{1}{K-1} \sum_{j \ne k} Q_j`.

    Over the i.i.d. sample dims, or, with ``group``, over an element dim whose draws are independent of each other: the
    several answers to one prompt of a replayed site. Mnih and Rezende 2016; Kool, van Hoof and Welling 2019, eq. 8.

    Args:
        group: element dim of the group; every credited cost must be tied to it.
    """

    group: int | None = None

    name: ClassVar[str] = "leave_one_out"

    @property
    def draws(self) -> int:  # type: ignore[override]
        return 2 if self.group is None else 1

    def check(self, site: SiteInfo) -> Support:
        return YES if self.group is None else group_fits(site, self.group)

    def value(self, context: SiteContext) -> Tensor:
        over, count = group_of(context, self.group)
        total = context.signal.sum(over, keepdim=True)
        return (total - context.signal) / (count - 1)

    def advantage(self, context: SiteContext) -> Tensor:
        # Q_k - b_k = (Q_k - mean) K / (K - 1): one pass less over the signal
        over, count = group_of(context, self.group)
        return (context.signal - context.signal.mean(over, keepdim=True)) * (count / (count - 1))


def group_fits(site: SiteInfo, group: int) -> Support:
    """Whether the draws along element dim ``group`` share no cost."""
    sizes = site.element_shape
    if not 0 <= group < len(sizes) or sizes[group] < 2:
        return Support(False, f"group={group} is no element dim of two or more of its elements {list(sizes)}")
    if site.links and site.links[group] != {"tied"}:
        return Support(False, f"dim {group} is no group of independent draws: a cost sees several of them")
    return YES


def group_of(context: SiteContext, group: int | None) -> tuple[tuple[int, ...], int]:
    """Axes of the signal that run over draws of one law, and how many draws they hold."""
    if group is None:
        return context.iid, math.prod(context.signal.shape[axis] for axis in context.iid)
    axis = context.signal.dim() - len(context.site.element_shape) + group
    return (axis,), context.signal.shape[axis]


@dataclass(frozen=True)
class MovingAverage(Baseline):
    r"""An exponential moving average of earlier steps' signals, :math:`m \leftarrow \gamma m + (1 - \gamma) \bar Q`.

    Divided by the weight it has gathered (``1 - gamma^n``), so that it starts unshrunk. Only earlier steps are used:
    the present signal would see the draw. Moves in train mode with gradients enabled alone.

    Args:
        decay: ``gamma`` in ``[0, 1)``.
        per: ``"element"`` keeps one average an element of the site, means over its data batch; ``"scalar"`` keeps one.
    """

    decay: float = 0.9
    per: str = "element"

    name: ClassVar[str] = "moving_average"

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise ValueError(f"moving_average: decay={self.decay} must lie in [0, 1)")
        if self.per not in ("element", "scalar"):
            raise ValueError(f"moving_average: per={self.per!r} must be 'element' or 'scalar'")

    def make_state(self, site: SiteInfo, batch_dims: tuple[int, ...]) -> nn.Module:
        elements = site.element_shape
        kept = [1 if i in batch_dims or self.per == "scalar" else size for i, size in enumerate(elements)]
        return RunningMean(tuple(kept), self.decay)

    def value(self, context: SiteContext) -> Tensor:
        state = context.state
        assert isinstance(state, RunningMean)
        old = state.read()  # before the update: earlier steps only
        if context.training:
            state.update(context.signal)
        return old


class RunningMean(nn.Module):
    """The state of `MovingAverage`: a decayed sum and the weight it has gathered."""

    total: Tensor
    weight: Tensor

    def __init__(self, shape: tuple[int, ...], decay: float) -> None:
        super().__init__()
        self.shape, self.decay = shape, decay
        self.register_buffer("total", torch.zeros(shape))
        self.register_buffer("weight", torch.zeros(()))

    def read(self) -> Tensor:
        """The mean of earlier steps, zero before the first.  ``[*elements]`` with size 1 along the data batch"""
        return self.total / self.weight.clamp_min(torch.finfo(self.weight.dtype).tiny)

    def update(self, cost: Tensor) -> None:
        """Takes in one step's signal ``[*dims | *elements]``."""
        keep = len(self.shape)
        lead = cost.dim() - keep
        over = [*range(lead), *(lead + i for i in range(keep) if self.shape[i] == 1)]
        mean = cost.mean(over, keepdim=True) if over else cost
        mean = mean.reshape(mean.shape[lead:])  # of size 1 along elements where the signal does not vary
        self.total.lerp_(mean.to(self.total.dtype), 1 - self.decay)
        self.weight.lerp_(torch.ones_like(self.weight), 1 - self.decay)

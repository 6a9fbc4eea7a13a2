"""What the antithetic estimators of a Bernoulli site share: dependent rows whose thresholds are at its probability."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.distributions import Bernoulli, Distribution

from scg.estimators.base import YES, Draw, RowEstimator, SiteContext, SiteInfo, Support


@dataclass(frozen=True)
class Antithetic(RowEstimator):
    """Base of estimators with dependent Bernoulli rows, each marginally a draw of the site.

    All elements of the site are drawn anew in every row, as in the papers; each element uses its own credited signal.
    The rows stand in the objective with equal weights, so that what lies below the site gets the mean gradient.
    """

    families: ClassVar[tuple[str, ...]] = ("Bernoulli",)

    @classmethod
    def supports(cls, site: SiteInfo) -> Support:
        if site.replayed:
            return Support(False, "a replayed outcome has no antithetic ones")
        if site.pathwise_only:
            return Support(False, site.pathwise_only)
        if site.rerun_break:
            return Support(False, site.rerun_break)
        if site.family not in cls.families:
            known = " or ".join(cls.families)
            return Support(False, f"its rows are thresholds of dependent uniforms, and {site.family} is not {known}")
        return YES


@dataclass(frozen=True)
class AntitheticPair(Antithetic):
    """Base of estimators with one antithetic pair: ``u`` and ``1 - u``, each below the probability or not."""

    @property
    def rows(self) -> int:
        return 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.samples not in (None, 2):
            raise ValueError(f"{self.name}: a pair is two draws, not samples={self.samples}; scg.compile's samples=K "
                             f"draws K pairs, and 'arms' takes any number")  # fmt: skip

    def uniform(self, p: Tensor) -> Tensor:
        """The noise of a pair, of the shape of ``p``."""
        return torch.rand_like(p)

    def draw_rows(self, dist: Distribution, shape: torch.Size, support: Tensor | None, joined: tuple[int, ...]) -> Draw:
        p = probability(dist, shape)
        u = self.uniform(p)
        bits = torch.stack([u < p, u >= 1 - p])  # [2, *shape | *B]; never wrong at p = 0 and 1
        return Draw(bits.to(dtype_of(dist)), extra=(torch.stack([u, 1 - u]),))


def probability(dist: Distribution, shape: torch.Size) -> Tensor:
    """Of a one, at least in float32: noise in half precision is too coarse for small ones.  ``[*shape | *B]``"""
    assert isinstance(dist, Bernoulli)
    if "probs" in dist.__dict__:  # as it was given, not through its clamped logit
        p = wide(dist.probs.detach())
    else:
        p = wide(dist.logits.detach()).sigmoid()
    return p.expand(torch.Size([*shape, *dist.batch_shape]))


def logit(context: SiteContext) -> Tensor:
    """The log odds of a one, with gradient.  ``[*dims | *elements]`` up to broadcasting"""
    assert isinstance(context.dist, Bernoulli)
    return context.dist.logits


def dtype_of(dist: Distribution) -> torch.dtype:
    """The floating type of the distribution's parameters."""
    assert isinstance(dist, Bernoulli)
    return dist.probs.dtype if "probs" in dist.__dict__ else dist.logits.dtype


def wide(tensor: Tensor) -> Tensor:
    """At least float32."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def row_difference(values: Tensor, axis: int) -> Tensor:
    """First row less the second, with size 1 along ``axis``."""
    return values.narrow(axis, 0, 1) - values.narrow(axis, 1, 1)

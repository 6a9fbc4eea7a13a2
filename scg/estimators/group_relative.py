"""Group-relative policy optimisation: advantages standardised among the answers to one prompt."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from scg.estimators.base import SiteContext, SiteInfo, Support
from scg.estimators.baselines import Baseline, group_fits, group_of
from scg.estimators.clipped_surrogate import clipped
from scg.estimators.importance_weighted import log_ratio_of
from scg.estimators.score_function import ScoreFunction


@dataclass(frozen=True)
class Standardised(Baseline):
    """The signal less the mean of its group, over the standard deviation of its group.

    Biased: the mean counts the draw itself, and groups that vary little are scaled up.

    Args:
        group: element dim of the group.
        floor: added to the standard deviation.
        scale: False leaves the division out.
    """

    group: int = 0
    floor: float = 1e-4
    scale: bool = True

    name: ClassVar[str] = "standardised"
    unbiased: ClassVar[bool] = False

    @property
    def biases(self) -> tuple[str, ...]:
        own = "the group's mean counts the draw itself"
        return (own, "divided by the group's standard deviation") if self.scale else (own,)

    def check(self, site: SiteInfo) -> Support:
        return group_fits(site, self.group)

    def value(self, context: SiteContext) -> Tensor:
        return context.signal.mean(group_of(context, self.group)[0], keepdim=True)

    def advantage(self, context: SiteContext) -> Tensor:
        centred = context.signal - self.value(context)
        if not self.scale:
            return centred
        over, _ = group_of(context, self.group)
        return centred / (context.signal.std(over, keepdim=True) + self.floor)


@dataclass(frozen=True)
class GroupRelative(ScoreFunction):
    r"""The score function with advantages standardised in a group of replayed draws.

    .. math:: \hat g = \frac{1}{|z|} \frac{Q - \mathrm{mean}(Q)}{\mathrm{std}(Q)} \nabla_\theta \log p_\theta(z)

    Shao et al. 2024. Biased in three ways (Liu et al. 2025), each of which may be left out: the group's mean counts the
    draw itself (a factor :math:`(G - 1) / G`), the division by its standard deviation weighs prompts by how much their
    answers vary, and that by an answer's length favours short good ones and long bad ones. Without any of them it is
    ``score_function`` with ``LeaveOneOut(group=…)``. One evaluation. Replayed sites alone.

    Args:
        baseline: a `Standardised`, which names the group.
        lengths: name of the input with the length of each answer, one number for each along the leading element dims;
            None for no division.
        behaviour: name of the input that holds the log probability when drawn; None for no clipped surrogate.
        clip: of the clipped surrogate.
    """

    baseline: Any = Standardised()
    lengths: str | None = None
    behaviour: str | None = None
    clip: float = 0.2

    name: ClassVar[str] = "group_relative"
    unbiased: ClassVar[bool] = False
    orders: ClassVar[int] = 1
    bounds: ClassVar[bool] = False
    reference: ClassVar[str] = "Shao et al. 2024"
    formula: ClassVar[str] = r"\frac{Q - \mathrm{mean}(Q)}{|z|\, \mathrm{std}(Q)}\, \nabla_\theta \log p_\theta(z)"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.baseline, Standardised):
            raise ValueError(f"group_relative: baseline={self.baseline!r} must be a Standardised")

    @property
    def logged(self) -> Mapping[str, bool]:
        given = {self.lengths: False, self.behaviour: True}
        return {name: each for name, each in given.items() if name is not None}

    @property
    def biases(self) -> tuple[str, ...]:
        found = list(self.baseline.biases)
        if self.lengths is not None:
            found.append("divided by the length")
        if self.behaviour is not None:
            found.append("a clipped ratio, and none of earlier draws")
        return tuple(found)

    @classmethod
    def supports(cls, site: SiteInfo) -> Support:
        if not site.replayed:
            return Support(False, "its draw is not replayed: give samples and the leave_one_out baseline")
        return super().supports(site)

    def term(self, context: SiteContext) -> Tensor:
        advantage = self.baseline.advantage(context)
        if self.lengths is not None:
            (lengths,) = context.read((self.lengths,))
            rank = len(context.site.element_shape)
            advantage = advantage / lengths.reshape([*lengths.shape, *[1] * (rank - lengths.dim())])
        if self.behaviour is None:
            return context.score_times(advantage)
        return clipped(log_ratio_of(context, self.behaviour), advantage.detach(), self.clip)

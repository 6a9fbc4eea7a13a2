"""What an estimator is: how a site is drawn, and what it adds to the surrogate so that its gradient is right.

Every estimator is a frozen dataclass whose fields are its hyperparameters. There are four ways to take part:

* *pathwise*: the draw is differentiable, nothing is added (`PathwiseEstimator`);
* *score-type*: the draw is detached, and a term of value zero carries the gradient (`ScoreEstimator`);
* *enumerating*: every outcome becomes a row of an enumerated sample dim (`EnumeratingEstimator`);
* *rerun-type*: as score-type, and the costs below the site are evaluated at further outcomes (`RerunEstimator`).

The backend dispatches on these four, never on a name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

if TYPE_CHECKING:
    from scg.template import Template


@dataclass(frozen=True)
class Support:
    """Whether an estimator fits a site; false with the reason when it does not."""

    ok: bool
    reason: str = ""

    def __bool__(self) -> bool:
        return self.ok


YES = Support(True)


@dataclass(frozen=True)
class SiteInfo:
    """What an estimator may know about a site before anything is drawn."""

    name: str
    template: Template
    shape: tuple[int, ...]
    """Shape of one draw, no sample dims."""
    event_ndim: int
    support: Tensor | None = None
    """The finite support of one element ``[S, *event]``, where it is known."""
    rows: int | None = None
    """Rows that exact enumeration needs, where the support is finite: support size to the power of joined elements."""
    replayed: bool = False
    bound: str | None = None
    """Parameter that moves the support's bounds and asks for a gradient, as in ``Uniform(0, theta)``."""
    pathwise_break: str | None = None
    """Why the pathwise derivative is wrong or missing, with the place; None when the path is smooth."""
    pathwise_only: str | None = None
    """Why only pathwise estimators are legal here (an ``rsample`` with both stopped and open paths into one cost)."""

    @property
    def family(self) -> str:
        return self.template.family

    @property
    def element_shape(self) -> tuple[int, ...]:
        """Shape of the site's elements: batch dims and those an ``Independent`` reinterpreted."""
        return self.shape[: len(self.shape) - self.event_ndim]


@dataclass(frozen=True)
class Estimator:
    """Base of all estimators: hyperparameters are fields, facts are class attributes."""

    samples: int | None = field(default=None, kw_only=True)
    """The site's own i.i.d. draws, on top of those of the whole program; None for one."""

    name: ClassVar[str] = ""
    """The name users write, the same in code, docs and tests."""
    unbiased: ClassVar[bool] = True
    reference: ClassVar[str] = ""
    formula: ClassVar[str] = ""
    """LaTeX of the gradient estimate."""

    def __post_init__(self) -> None:
        if self.samples is not None and self.samples < 1:
            raise ValueError(f"{self.name}: samples={self.samples} must be at least 1")

    @classmethod
    def supports(cls, site: SiteInfo) -> Support:
        """Whether the estimator fits the site, with the reason when it does not."""
        raise NotImplementedError

    def check(self, site: SiteInfo) -> Support:
        """`supports` for this instance, where hyperparameters matter."""
        return self.supports(site)

    def evaluations(self, site: SiteInfo) -> int:
        """How many rows of downstream costs one draw of the program needs for this site."""
        return self.samples or 1

    def make_state(self, site: SiteInfo, batch_dims: tuple[int, ...], draws: int) -> nn.Module | None:
        """Learned or running parts, owned by the compiled module; None for an estimator without state.

        Args:
            site: what is known of the site.
            batch_dims: element dims that run over the data batch; state is averaged over them.
            draws: how many i.i.d. draws the site has.
        """
        return None


class PathwiseEstimator(Estimator):
    """The draw carries the derivative."""

    def draw(self, dist: Distribution, shape: torch.Size) -> Tensor:
        """Draws, differentiable in the parameters.  ``[*shape | *B | *E]``"""
        raise NotImplementedError


@dataclass(frozen=True)
class Signal:
    """The credited cost-to-go of a score-type site and what its estimator may know about it."""

    cost: Tensor
    """Detached cost-to-go, ``[*dims | *elements]``, of size 1 where it does not vary."""
    iid: tuple[int, ...]
    """Positions of the i.i.d. sample dims of the site in ``cost``."""
    state: Any = None
    """What `Estimator.make_state` made, to be called under the recorder."""
    training: bool = True
    """Whether running statistics may move."""


class ScoreEstimator(Estimator):
    """The draw is detached and a term of value zero carries the gradient."""

    def draw(self, dist: Distribution, shape: torch.Size) -> Tensor:
        """Detached draws.  ``[*shape | *B | *E]``"""
        return dist.sample(shape).detach()

    def multiplier(self, signal: Signal) -> Tensor:
        """What the score is multiplied by: the signal less its baseline.  ``[*dims | *elements]``"""
        raise NotImplementedError


class EnumeratingEstimator(Estimator):
    """Every outcome becomes a row, weighted by its probability."""


class RerunEstimator(ScoreEstimator):
    """Also evaluates the costs below the site at outcomes of its own choosing."""

    def estimate(self, context: Any) -> Tensor:
        """The surrogate term, given rows of downstream cost."""
        raise NotImplementedError


Rows = Callable[[Tensor], Tensor]


def detach_all(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Each tensor without its gradient."""
    return tuple(torch.Tensor.detach(tensor) for tensor in tensors)

"""What an estimator is: how a site is drawn, and what it adds to the surrogate so that its gradient is right.

Every estimator is a frozen dataclass whose fields are its hyperparameters. There are four ways to take part:

* *pathwise*: the draw is differentiable, nothing is added (`PathwiseEstimator`);
* *score-type*: the draw is detached, and a term of value zero carries the gradient (`ScoreEstimator`); it may evaluate
  the costs below the site at further outcomes (`SiteContext.rerun`);
* *row-type*: score-type, with several dependent or weighted outcomes a draw (`RowEstimator`);
* *enumerating*: every outcome becomes a row of an enumerated sample dim (`EnumeratingEstimator`).

The backend dispatches on these four, never on a name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

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


Reads = tuple[str, ...] | Literal["baseline", "critic"] | None
"""Names of graph values, the sufficient context of a baseline or of a critic, or None for all tensor inputs."""


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
    multisample: bool = False
    """Whether it stands below a bound that joins the draws of the whole program."""
    order: int = 1
    """The highest derivative that was asked for."""
    bound: str | None = None
    """Parameter that moves the support's bounds and asks for a gradient, as in ``Uniform(0, theta)``."""
    pathwise_break: str | None = None
    """Why the pathwise derivative is wrong or missing, with the place; None when the path is smooth."""
    score_break: str | None = None
    """Where the site's own log density meets more than sums on its way to the costs; None for nowhere."""
    pathwise_only: str | None = None
    """Why only pathwise estimators are legal here (an ``rsample`` with both stopped and open paths into one cost)."""
    joined: tuple[int, ...] = ()
    """Element dims of which one cost may see several indices."""
    length: int = 0
    """Of the first site of a sequence: how many joined elements all its sites have."""
    index_use: str | None = None
    """Of a Categorical: the use of its index that stands against writing it as a one-hot, with the place."""
    doubly_break: str | None = None
    """Why its score terms in a multi-sample bound cannot be reparameterized, with the place; None where they can."""
    rerun_break: str | None = None
    """Why what lies below the site cannot be evaluated at other outcomes, with the place."""
    context: tuple[tuple[str, tuple[int, ...]], ...] = ()
    """Of a site whose estimator reads its sufficient context: names and shapes of the values, the site left out."""
    links: tuple[frozenset[str], ...] = ()
    """How credited costs meet each element dim: the words of their credit edges, none for a dim of size 1."""
    shares_costs: bool = False
    """Whether a credited cost depends on another site as well."""

    @property
    def family(self) -> str:
        return self.template.family

    @property
    def why_no_one_hot(self) -> str:
        """Of a Categorical: why its index has no relaxation."""
        found = f": {self.index_use}" if self.index_use else ""
        return f"Categorical draws an index, which has no relaxation{found}; draw from OneHotCategorical"

    @property
    def flips(self) -> int:
        """How many elements one cost may see."""
        return math.prod(self.element_shape[dim] for dim in self.joined)

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
    one_hot: ClassVar[bool] = False
    """Whether a Categorical's index is written as its one-hot for it, where the uses of the index allow."""
    bounds: ClassVar[bool] = False
    """Whether it may stand below a multi-sample bound."""
    orders: ClassVar[int] = 1
    """Derivatives that its surrogate gets right: 2 means all of them."""
    reference: ClassVar[str] = ""
    formula: ClassVar[str] = ""
    """LaTeX of the gradient estimate."""

    if TYPE_CHECKING:  # a class out of the registry takes the settings of its own; each dataclass has its own signature

        def __init__(self, **settings: Any) -> None: ...

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

    @property
    def learned(self) -> bool:
        """Whether it brings parameters of its own."""
        return False

    @property
    def predictor(self) -> Predicts | None:
        """What predicts the cost-to-go for the targets of sites above, if anything."""
        return None

    def reads(self) -> Reads:
        """What learned parts read beside the draw."""
        return ()

    @property
    def logged(self) -> Mapping[str, bool]:
        """Names of the inputs that hold what was logged with a replayed draw: a number for each of its elements?

        False for those that have one along leading element dims.
        """
        return {}

    @property
    def biases(self) -> tuple[str, ...]:
        """What makes a biased estimator so, where its settings decide: short phrases for reports."""
        return ()

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

    bounds: ClassVar[bool] = True
    weighs_bound: ClassVar[bool] = False
    """Whether what reaches the draw by way of a multi-sample bound is multiplied by `bound_factor`."""

    @property
    def stops_score(self) -> bool:
        """Whether the site's own log density, where it stands in the costs, is differentiated by the draw alone."""
        return False

    def bound_factor(self, share: Tensor, alpha: float) -> Tensor:
        """What the derivative of a multi-sample bound in each draw is multiplied by, if `weighs_bound`.

        Args:
            share: detached shares of the draws in the bound, over which they sum to one.  The shape of the log weights
            alpha: order of the bound.
        """
        raise NotImplementedError

    def draw(self, dist: Distribution, shape: torch.Size) -> Tensor:
        """Draws, differentiable in the parameters.  ``[*shape | *B | *E]``"""
        raise NotImplementedError


@dataclass(frozen=True)
class Rerun:
    """The costs below a site at further outcomes of it."""

    signal: Tensor
    """Credited cost-to-go of each row, ``[R, *dims | *elements]``, in the units of `SiteContext.signal`.

    Detached, but of a differentiable rerun, where it follows the rows along paths that pass no other draw.
    """
    surrogate: Tensor | None = None
    """Of a differentiable rerun: the sum over draws, whose gradient reaches the rows alone.  ``[R]``

    Costs and the terms of inner sites included: its derivative in each row is that of the row's expected cost-to-go.
    """


class Predicts(Protocol):
    """A baseline or an estimator that predicts the cost-to-go."""

    def prediction(self, context: SiteContext) -> Tensor:
        """For targets, detached.  ``[*dims | *elements]``"""


class NextSite(Protocol):
    """A site in the cut below another."""

    @property
    def context(self) -> SiteContext:
        """What the estimator there sees."""

    @property
    def predictor(self) -> Predicts:
        """What predicts there."""

    def gather(self, tensor: Tensor) -> Tensor:
        """Sums ``[*its dims | *its elements]`` into the elements above that influence it.  ``[*dims | *elements]``"""


@dataclass(frozen=True)
class Hindsight:
    """What single changes do where all draws below stay as drawn; ``R`` outcomes of each element."""

    alone: Tensor | None
    """By how much the costs that no next draw moves would change.  ``[R, *dims | *elements]``"""
    later: Tensor | None = None
    """The signal as drawn of the costs that some next draw moves; None if there are none.  ``[*dims | *elements]``"""
    gain: Tensor | None = None
    """By how much these would change, the draws kept; None where they would not.  ``[R, *dims | *elements]``"""
    log_ratio: Tensor | None = None
    """Log likelihood of the next draws, less that at the draw.  ``[R, *dims | *elements]``"""


class SiteContext(Protocol):
    """What a score-type estimator sees of its site when the surrogate is built.

    ``dims`` are the sample dims of the draw; all tensors are laid out ``[*dims | *elements | *event]``.
    """

    site: SiteInfo
    dist: Distribution
    """Of batch shape ``[*dims | *elements]`` up to broadcasting, its parameters with gradient."""
    value: Tensor
    """The draw, detached.  ``[*dims | *elements | *event]``"""
    extra: tuple[Tensor, ...]
    """What `RowEstimator.draw_rows` kept, laid out ``[*dims | …]``."""
    iid: tuple[int, ...]
    """Positions of the i.i.d. sample dims."""
    row_axis: int | None
    """Position of the site's own rows, for a `RowEstimator`."""
    joined: tuple[int, ...]
    """Element dims of which one cost may see several indices: elements along all others may change in the same row."""
    state: Any
    """What `Estimator.make_state` made, to be called as it is."""
    training: bool
    """Whether running statistics may move."""
    memo: dict[Any, Any]
    """What estimators keep of one run of the program, shared by its sites."""

    @property
    def unit(self) -> Tensor | None:
        """What predictions are in units of: the largest coefficient of the costs that each element is credited with.

        None for one all over. As a discount along an element dim has it.  ``[*elements]``, of size 1 where it does not
        vary
        """

    @property
    def log_prob(self) -> Tensor:
        """Of the draw, with the gradient of the parameters.  ``[*dims | *elements]``"""

    @property
    def signal(self) -> Tensor:
        """Detached credited cost-to-go, of size 1 along elements where it does not vary.  ``[*dims | *elements]``"""

    def score_times(self, multiplier: Tensor) -> Tensor:
        """A term with the gradient of ``multiplier * log_prob``, summed along elements where that does not vary.

        Its value is not that of the product where another has the same gradient and costs less.
        """

    def score_mix(self, outcomes: Tensor, weights: Tensor, of_draw: Tensor | None = None) -> Tensor:
        """A term with the gradient of ``of_draw * log_prob + sum_r weights * (log p(outcomes) - log_prob)``.

        Args:
            outcomes: ``[R, *dims | *elements | *event]``.
            weights: ``[R, *dims | *elements]``, zero for what is impossible.
            of_draw: broadcastable to ``[*dims | *elements]``; one if not given.
        """

    def log_odds(self, outcomes: Tensor) -> Tensor:
        """Log probability of other outcomes less that of the draw, detached.  ``[R, *dims | *elements]``"""

    def log_prob_of(self, values: Tensor) -> Tensor:
        """Of other outcomes ``[R, *dims | *elements | *event]``.  ``[R, *dims | *elements]``"""

    def rerun(self, values: Tensor, *, differentiable: bool = False) -> Rerun:
        """Evaluates what lies below the site at rows of other outcomes, and nothing else.

        Args:
            values: ``[R, *dims | *elements | *event]``.
            differentiable: also give a surrogate through which the gradient reaches ``values``.
        """

    def at_draw(self) -> tuple[Tensor, Rerun]:
        """The draw as an independent variable, and a differentiable rerun of one row there.

        Asked for by estimators that say `RerunEstimator.at_draw`: where nothing is drawn below the site, the costs of
        the draw itself are differentiated, and not evaluated again.
        """

    def change_one(self, outcomes: Tensor, rest: Tensor | None = None) -> Tensor:
        """The signal of each element where it alone, of the elements that one cost may see, takes an outcome.

        Only what a change moves is evaluated for it: by rank-one updates where operations are linear.

        Args:
            outcomes: ``[R, *dims | *elements | *event]``.
            rest: what the other elements are in the row of each of the ``G`` joined ones,
                ``[G, *dims | *elements | *event]``; the draw if not given.

        Returns:
            ``[R, *dims | *elements]``, of size 1 along elements that are not joined where it does not vary.
        """

    def hindsight(self, outcomes: Tensor) -> Hindsight:
        """Costs, and the likelihood of the draws below, where each element alone takes an outcome.

        Only what lies between the site and the next draws is evaluated.

        Args:
            outcomes: ``[R, *dims | *elements | *event]``.

        Raises:
            EstimatorError: where a next draw does not follow its density, with the place.
        """

    def add(self, surrogate: Tensor) -> None:
        """Adds a scalar (already a mean over draws) to the surrogate, in the units of ``signal``."""

    def constant(self, make: Callable[[], Tensor]) -> Tensor:
        """A tensor made once, before the program runs."""

    def variable(self, value: Tensor) -> Tensor:
        """The value as an independent variable to differentiate by: no gradient leaves it."""

    def read(self, names: tuple[str, ...] | None) -> list[Tensor]:
        """Detached values of the named nodes or inputs, ``[*dims | *S]`` where they carry dims; None: all inputs."""

    def read_nodes(self, names: Collection[str]) -> list[Tensor]:
        """The same of nodes by their names in the graph, in its order."""

    def variables(self) -> tuple[Distribution, list[Tensor], list[Tensor]]:
        """The distribution over independent variables, one of full size for each parameter with a gradient.

        Returns:
            The distribution, the variables, and the parameters they stand for: all
            ``[*dims | *elements | event dims of the slot]``.
        """

    def parameters(self) -> dict[int, Tensor]:
        """The parameters with a gradient, by their slot in the template, each of full size.

        ``[*dims | *elements | event dims of the slot]``
        """

    def distribution(self, parameters: Mapping[int, Tensor]) -> Distribution:
        """The distribution at other values of some `parameters`."""

    def next_sites(self) -> Sequence[NextSite]:
        """A cut below the site: sites that predict, each cost of which is credited to the site and to one of them."""

    def causal_dim(self) -> int | None:
        """An element dim along which each index is credited with less than the one before it, if there is one."""

    def gradient(self, scalar: Tensor, wrt: Tensor, *, differentiable: bool = False) -> Tensor:
        """``d scalar / d wrt`` as a value of the program, itself differentiable if asked.  The shape of ``wrt``"""

    def gradients(self, scalar: Tensor, wrt: Sequence[Tensor], *, differentiable: bool = False) -> Sequence[Tensor]:
        """`gradient` in several tensors at once."""


class ScoreEstimator(Estimator):
    """The draw is detached and a term of value zero carries the gradient."""

    def draw(self, dist: Distribution, shape: torch.Size) -> Tensor:
        """Detached draws.  ``[*shape | *B | *E]``"""
        return dist.sample(shape).detach()

    def term(self, context: SiteContext) -> Tensor:
        """What is added to the surrogate, up to its value; only its gradient counts.

        Returns:
            ``[*dims | *elements]`` or anything that broadcasts to it, of size 1 along the site's own rows: the backend
            averages over i.i.d. dims, weights weighted ones and sums over elements.
        """
        raise NotImplementedError


class RerunEstimator(ScoreEstimator):
    """Score-type, with the costs below the site evaluated at further outcomes."""

    at_draw: ClassVar[bool] = False
    """Whether it differentiates the costs at the draw: `SiteContext.at_draw`."""

    @classmethod
    def supports(cls, site: SiteInfo) -> Support:
        """Whether the program below the site can be evaluated at other outcomes."""
        if site.pathwise_only:
            return Support(False, site.pathwise_only)
        if site.replayed:
            return Support(False, "a replayed outcome is one outcome: the world was not seen at any other")
        return Support(site.rerun_break is None, site.rerun_break or "")


@dataclass(frozen=True)
class Draw:
    """Several outcomes of one draw of the program."""

    value: Tensor
    """Detached rows.  ``[R, *shape | *B | *E]``"""
    weight: Tensor | None = None
    """Detached weights in the objective, ``[R, *shape | *B]`` with size 1 along joined dims; None for ``1 / R``."""
    extra: tuple[Tensor, ...] = ()
    """What `ScoreEstimator.term` will want again, each ``[R, *shape | …]``."""


class RowEstimator(ScoreEstimator):
    """Draws several dependent or weighted outcomes at once, all of which stand in the objective's value."""

    weighted: ClassVar[bool] = False
    """Whether `Draw.weight` is given."""

    @property
    def rows(self) -> int:
        """How many outcomes: the size of the site's own sample dim."""
        raise NotImplementedError

    def draw_rows(self, dist: Distribution, shape: torch.Size, support: Tensor | None, joined: tuple[int, ...]) -> Draw:
        """All rows of ``shape`` independent draws.

        Args:
            dist: the distribution.
            shape: leading i.i.d. dims.
            support: the finite support of one element ``[S, *event]``, where it is known.
            joined: dims of ``[*shape | *B]`` of which one cost may see several indices.
        """
        raise NotImplementedError

    def evaluations(self, site: SiteInfo) -> int:
        return self.rows


@dataclass(frozen=True)
class Step:
    """What one site adds to the rows of a sequence."""

    index: Tensor
    """Outcome of each element, as a place in the support.  ``[*N, k, L]``"""
    parents: Tensor | None
    """The row so far that each row goes on from, ``[*N, k]``; None for the first site."""
    state: Any
    """What the next site is given."""


class SequenceEstimator(RowEstimator):
    """Row-type, and the sites that share the object may be drawn as one sequence: rows of joint outcomes.

    The sites are met in program order. ``N`` are the dims along which sequences are drawn apart: sample dims other than
    the rows, and element dims of which no cost sees two indices.
    """

    distinct: ClassVar[bool] = True
    """Whether no two rows hold the same outcome."""

    @property
    def joins_sites(self) -> bool:
        """Whether it was asked to."""
        raise NotImplementedError

    def grow(self, state: Any, log_p: Tensor, context: SequenceContext) -> Step:
        """Draws one site in all rows.

        Args:
            state: of the rows so far; None at the first site.
            log_p: log probability of each outcome of each of the site's ``L`` joined elements, given each row so far,
                ``[*N, rows, L, S]``, with one row at the first site.
            context: what is known of the site's place.
        """
        raise NotImplementedError

    def finish(self, state: Any) -> tuple[Tensor, tuple[Tensor, ...]]:
        """After the last site: the weights of the rows, and what `term` will want.  ``[*N, k]``, each ``[*N, k, …]``"""
        raise NotImplementedError


@dataclass(frozen=True)
class SequenceContext:
    """Where a site stands in its sequence."""

    offset: int
    """How many joined elements the sites before it have."""
    length: int
    """How many all of them have."""
    module: Any = None
    """What `Estimator.make_state` made for the first site."""
    training: bool = False
    """Whether it may move."""


class EnumeratingEstimator(Estimator):
    """Every outcome becomes a row, weighted by its probability."""

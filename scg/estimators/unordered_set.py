"""The unordered set estimator: the sample without replacement, its order integrated out."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.distributions import Distribution

from scg.estimators.base import Draw, SiteContext
from scg.estimators.sequences import Beam
from scg.estimators.subsets import Outcomes, WithoutReplacementEstimator, weighted_score

LARGEST = 12
"""Most rows: the probabilities of all their subsets are computed."""


@dataclass(frozen=True)
class UnorderedSet(WithoutReplacementEstimator):
    r"""Distinct outcomes, each weighted by its probability of being the first of the set.

    .. math::
        \hat g = \sum_{s \in S} p_s R(S, s) \Big[ f_s - \sum_{u \in S} p_u R^{D \setminus s}(S, u) f_u \Big]
                 \nabla \log p_s, \qquad
        R(S, s) = \frac{P^{D \setminus s}(S \setminus s)}{P^D(S)}, \quad R^{D \setminus s}(S, s) = 1

    Kool, van Hoof and Welling 2020, with the built-in baseline; without it for one row, where it would be biased.
    Unbiased; exact when the set is the whole support, and with two rows on a Bernoulli. ``k`` evaluations. For finite
    supports. The weights sum to one, so that adding a constant to a cost changes nothing.

    With ``G(T)`` the probability that all of ``T`` comes before the rest of the support outside the set,
    :math:`P^{D \setminus C}(S \setminus C) = G(S \setminus C)` and

    .. math:: G(T) = \sum_{t \in T} \frac{p_t}{P_T + P_{D \setminus S}}\, G(T \setminus t), \qquad G(\emptyset) = 1,

    of positive terms alone: no cancellation, in log space no underflow.

    The sites that share one object with ``sequence=True`` are drawn as one sequence by stochastic beam search: the set
    is one of joint outcomes, however many there are. Mask the logits of a finished sequence, so that it has one way to
    go on: then it is in the set once.

    Args:
        samples: ``k``, two unless given, at most twelve.
        sequence: draw all sites of this object, and the elements of each that meet in a cost, as one sequence.
    """

    name: ClassVar[str] = "unordered_set"
    unbiased: ClassVar[bool] = True
    reference: ClassVar[str] = "Kool, van Hoof and Welling 2020"
    formula: ClassVar[str] = (
        r"\sum_{s \in S} p_s R(S, s) \Big[ f_s - \sum_{u \in S} p_u R^{D \setminus s}(S, u) f_u \Big] \nabla \log p_s"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rows > LARGEST:
            raise ValueError(f"unordered_set: samples={self.samples} is over {LARGEST}; use 'without_replacement'")

    @property
    def rows(self) -> int:
        return self.samples or 2

    def draw_rows(self, dist: Distribution, shape: torch.Size, support: Tensor | None, joined: tuple[int, ...]) -> Draw:
        assert support is not None
        outcomes = Outcomes(dist, shape, support, joined)
        index, _ = self.race(outcomes.log_p, self.rows)
        rest = outcomes.log_p.scatter(-1, index, float("-inf")).logsumexp(-1)
        weight, leave_one_out = set_weights(outcomes.log_p.gather(-1, index), rest)
        parts = (outcomes.weights(weight), outcomes.weights(leave_one_out, 1))
        return Draw(outcomes.rows(index), parts[0], parts)

    def finish(self, state: Beam) -> tuple[Tensor, tuple[Tensor, ...]]:
        weight, leave_one_out = set_weights(state.log_p, state.rest)
        return weight, (weight, leave_one_out)

    def term(self, context: SiteContext) -> Tensor:
        assert context.row_axis is not None
        weight, leave_one_out = context.extra  # [*dims | *elements], [*dims | *elements, k]
        signal = torch.where(weight > 0, context.signal, 0.0)
        others = signal.movedim(context.row_axis, -1).unsqueeze(context.row_axis)  # [*dims, 1 row | *elements, k]
        return weighted_score(context, weight, signal - (leave_one_out * others).sum(-1))


def set_weights(chosen: Tensor, rest: Tensor) -> tuple[Tensor, Tensor]:
    """First- and second-order weights of a set.

    Args:
        chosen: log probabilities of its members ``[*N, k]``, finite.
        rest: log probability of everything outside the set ``[*N]``, minus infinity for nothing.

    Returns:
        ``p_s R(S, s)``, ``[*N, k]``, and ``p_u R^{D - s}(S, u)``, ``[*N, k (s), k (u)]``; the latter zero for one row.
    """
    k = chosen.shape[-1]
    rest = rest.unsqueeze(-1)
    if k == 2:  # G has closed forms: p_o / (1 - p_s) of the other one, and what makes the weights sum to one
        without_this = torch.logaddexp(chosen.flip(-1), rest)  # log (1 - p_s)
        own = torch.eye(2, dtype=torch.bool, device=chosen.device)
        second = torch.where(own, chosen.unsqueeze(-1), without_this.unsqueeze(-1))
        return torch.softmax(chosen + chosen.flip(-1) - without_this, -1), torch.exp(second)
    levels = [torch.zeros_like(rest)]  # log G of all subsets with 0, 1, … members
    for size in range(1, k + 1):
        members, parents = (torch.tensor(table, device=chosen.device) for table in _subsets(k, size))
        each = chosen[..., members]  # [*N, subsets, size]
        total = torch.logaddexp(each.logsumexp(-1), rest)
        levels.append((each + levels[-1][..., parents]).logsumexp(-1) - total)
    if k == 1:
        return torch.exp(chosen - levels[1]), torch.zeros_like(chosen).unsqueeze(-1)
    without = levels[k - 1].flip(-1)  # [*N, k]: in the order of combinations, the last lacks the first member
    pairs = levels[k - 2][..., torch.tensor(_pairs(k), device=chosen.device)]  # [*N, k, k]
    second = chosen.unsqueeze(-2) + pairs - without.unsqueeze(-1)
    own = torch.eye(k, dtype=torch.bool, device=chosen.device)
    second = torch.where(own, chosen.unsqueeze(-2), second)
    return torch.exp(chosen + without - levels[k]), torch.exp(second)


def _subsets(k: int, size: int) -> tuple[list[list[int]], list[list[int]]]:
    """Members of all subsets of ``size``, and where each subset less one member stands among the smaller ones.

    >>> _subsets(3, 2)
    ([[0, 1], [0, 2], [1, 2]], [[1, 0], [2, 0], [2, 1]])
    """
    smaller = {subset: i for i, subset in enumerate(itertools.combinations(range(k), size - 1))}
    members = [list(subset) for subset in itertools.combinations(range(k), size)]
    parents = [[smaller[tuple(m for m in subset if m != left)] for left in subset] for subset in members]
    return members, parents


def _pairs(k: int) -> list[list[int]]:
    """Where the set less members ``s`` and ``u`` stands among subsets of ``k - 2``; anything on the diagonal."""
    place = {subset: i for i, subset in enumerate(itertools.combinations(range(k), k - 2))}
    return [[0 if s == u else place[tuple(m for m in range(k) if m not in (s, u))] for u in range(k)] for s in range(k)]

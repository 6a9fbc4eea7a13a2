"""Memory-augmented policy optimisation: the best outcomes met so far are summed over, the rest are sampled."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from scg.estimators.base import SequenceContext, SequenceEstimator, SiteContext, SiteInfo, Step, Support
from scg.estimators.sequences import IMPOSSIBLE
from scg.estimators.subsets import SubsetEstimator, weighted_score

_MULTIPLIER, _PRIME = 1_000_003, 2_147_483_647
"""Of the hash of a sequence: ``h <- (h * multiplier + outcome + 1) mod prime``."""


@dataclass(frozen=True)
class Mapo(SequenceEstimator):
    r"""Sums over a memory of outcomes with low costs and samples outside it.

    .. math::
        \hat g = \sum_{s \in \mathcal{B}} (f_s - b)\, \nabla p_s
               + \frac{1 - \pi_\mathcal{B}}{(1 - \pi_\mathcal{B}^m)\, A}
                 \sum_{j:\, z_j \notin \mathcal{B}} (f_{z_j} - b) \nabla \log p_{z_j}, \qquad z_j \sim p

    with :math:`\pi_\mathcal{B}` the probability of the memory, :math:`m` proposals of which :math:`A` are not in it,
    and :math:`b` the mean cost of the memory. Liang, Norouzi, Berant, Le and Lao 2018. Proposals in the memory are
    rejected; that all are happens with probability :math:`\pi_\mathcal{B}^m`, which the factor makes up for. Unbiased
    without clipping. ``memory + m + explore`` evaluations. For finite supports.

    The sites that share the object are one sequence. After each training step the memory keeps the ``memory`` distinct
    outcomes of the lowest cost among those evaluated, its own among them at their cost of now; the cost is what the
    first site is credited with. It is a buffer of the compiled module: saved with it, of fixed size, one for each
    element that is drawn apart, one for all along the data batch.

    Args:
        samples: ``m``, two unless given.
        memory: most outcomes kept.
        clip: least weight of the memory, which it has even where its probability is lower: biased, faster at first.
        explore: rows of weight zero that look for outcomes to remember, and avoid those met before.
        filter: size of the table of hashes that says which were.
    """

    memory: int = 4
    clip: float = 0.0
    explore: int = 0
    filter: int = 2**14

    name: ClassVar[str] = "mapo"
    weighted: ClassVar[bool] = True
    distinct: ClassVar[bool] = False
    reference: ClassVar[str] = "Liang et al. 2018"
    formula: ClassVar[str] = (
        r"\sum_{s \in \mathcal{B}} (f_s - b)\, \nabla p_s + (1 - \pi_\mathcal{B})\, (f_z - b) \nabla \log p_z"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.memory < 1 or self.explore < 0 or not 0 <= self.clip < 1:
            raise ValueError(
                f"mapo: memory={self.memory} must be at least 1, explore={self.explore} at least 0, "
                f"and clip={self.clip} in [0, 1)"
            )
        if self.clip:
            object.__setattr__(self, "unbiased", False)

    @classmethod
    def supports(cls, site: SiteInfo) -> Support:
        return SubsetEstimator.supports(site)

    @property
    def joins_sites(self) -> bool:
        return True

    @property
    def proposals(self) -> int:
        """How many outcomes are proposed outside the memory."""
        return self.samples or 2

    @property
    def rows(self) -> int:
        return self.memory + self.proposals + self.explore

    def make_state(self, site: SiteInfo, batch_dims: tuple[int, ...], draws: int) -> nn.Module:
        shape = site.element_shape
        kept = [1 if d in site.joined or d in batch_dims else size for d, size in enumerate(shape)]
        apart = [d for d, size in enumerate(shape) if size > 1 and d not in site.joined]
        table = self.filter if self.explore else 0
        return Memory(tuple(kept), tuple(kept[d] for d in apart), self.memory, site.length, table)

    # -- the rows -----------------------------------------------------------------------------------------------------
    def grow(self, state: Rows | None, log_p: Tensor, context: SequenceContext) -> Step:
        memory = context.module
        assert isinstance(memory, Memory)
        length, support = log_p.shape[-2:]
        log_p = log_p.clamp_min(IMPOSSIBLE).expand([*log_p.shape[:-3], self.rows, length, support])
        shape = log_p.shape[:-3]
        if state is None:
            nothing = torch.zeros_like(log_p[..., 0, 0])  # [*N, k]
            start = memory.elements(shape).unsqueeze(-1).expand(nothing.shape)
            state = Rows(nothing, None, start, (), memory, context.training)
        known = memory.outcomes.reshape([*memory.apart, self.memory, -1])[..., context.offset :][..., :length]
        known = known.expand([*shape, self.memory, length])
        digits, hashes, choices = [], state.hashes, state.choices
        for element in range(length):
            here = log_p[..., element, :]  # [*N, k, S]
            possible = here > IMPOSSIBLE / 2
            children = (hashes.unsqueeze(-1) * _MULTIPLIER + torch.arange(support, device=here.device) + 1) % _PRIME
            drawn = here[..., self.memory : self.memory + self.proposals, :]
            parts = [known[..., element], _categorical(drawn)]
            if self.explore:
                first = self.memory + self.proposals
                new = possible[..., first:, :] & ~memory.met(children[..., first:, :])
                some = new.any(-1, keepdim=True)
                parts.append(_categorical(torch.where(new | ~some, here[..., first:, :], IMPOSSIBLE)))
                choices = (*choices, (hashes, children, possible))
            digit = torch.cat(parts, -1)
            hashes = children.gather(-1, digit.unsqueeze(-1)).squeeze(-1)
            digits.append(digit)
        index = torch.stack(digits, -1)  # [*N, k, L]
        chosen = log_p.gather(-1, index.unsqueeze(-1)).squeeze(-1).sum(-1)
        so_far = index if state.digits is None else torch.cat([state.digits, index], -1)
        grown = Rows(state.log_p + chosen, so_far, hashes, choices, memory, state.training)
        return Step(index, None, grown)

    def finish(self, state: Rows) -> tuple[Tensor, tuple[Tensor, ...]]:
        assert state.digits is not None
        n, m = self.memory, self.proposals
        if self.explore and state.training:
            state.memory.remember(state.hashes, state.choices)
        known, drawn = state.digits[..., :n, :], state.digits[..., n : n + m, :]
        filled = state.memory.filled.reshape([*state.memory.apart, n])
        p = torch.where(filled, state.log_p[..., :n].exp(), 0.0)  # [*N, M]
        total = p.sum(-1, keepdim=True)
        same = (drawn.unsqueeze(-2) == known.unsqueeze(-3)).all(-1) & filled.unsqueeze(-2)  # [*N, m, M]
        outside = (~same.any(-1)).to(p.dtype)  # [*N, m]
        accepted = outside / outside.sum(-1, keepdim=True).clamp_min(1.0)
        geometric = torch.stack([total**i for i in range(m)]).sum(0)  # (1 - x^m) / (1 - x)
        nothing = torch.zeros_like(state.log_p[..., n + m :])
        weight = torch.cat([p, accepted / geometric, nothing], -1)
        used = weight
        if self.clip:
            raised = total.clamp_min(self.clip)  # of p(. | memory), and 1 - raised of p(. | not memory)
            tiny = torch.finfo(p.dtype).tiny
            more, less = raised / total.clamp_min(tiny), (1 - raised) / (1 - total).clamp_min(tiny)
            shares = torch.cat([p * more, accepted / geometric * less, nothing], -1)
            used = torch.where((total > 0) & (raised > total), shares, weight)
        held = torch.cat([filled.expand(p.shape), torch.ones_like(state.log_p[..., n:], dtype=torch.bool)], -1)
        return weight, (used, held & (state.log_p > IMPOSSIBLE / 2), state.digits)

    # -- the term -----------------------------------------------------------------------------------------------------
    def term(self, context: SiteContext) -> Tensor:
        axis = context.row_axis
        assert axis is not None
        weight, possible, digits = context.extra  # [*dims | *elements], [*dims | *elements, T]
        signal = torch.where(weight > 0, context.signal, 0.0)
        if context.state is not None and context.training:
            context.state.keep_best(context.signal, possible, digits)
        share = weight.narrow(axis, 0, self.memory)
        total = share.sum(axis, keepdim=True)
        costs = (share * signal.narrow(axis, 0, self.memory)).sum(axis, keepdim=True)
        baseline = costs / torch.where(total > 0, total, 1.0)
        return weighted_score(context, weight, signal - baseline)


@dataclass(frozen=True)
class Rows:
    """The rows of a sequence so far."""

    log_p: Tensor
    """``[*N, k]``"""
    digits: Tensor | None
    """The outcome of each element.  ``[*N, k, T]``"""
    hashes: Tensor
    """Of the elements so far.  ``[*N, k]``"""
    choices: tuple[tuple[Tensor, Tensor, Tensor], ...]
    """At each element: the hash before it, the hashes behind each outcome, and which outcomes are possible."""
    memory: Memory
    training: bool


class Memory(nn.Module):
    """The outcomes of lowest cost, and a table of what was met: a Bloom filter with one hash.

    Args:
        elements: sizes of the element dims of the first site, one along those that share a memory.
        apart: of those, the ones along which sequences are drawn apart.
        size: most outcomes.
        length: how many elements a sequence has.
        table: size of the table of hashes, 0 for none.
    """

    outcomes: Tensor
    costs: Tensor
    filled: Tensor
    seen: Tensor

    def __init__(self, elements: tuple[int, ...], apart: tuple[int, ...], size: int, length: int, table: int) -> None:
        super().__init__()
        self.apart, self.size, self.table = apart, size, table
        self.register_buffer("outcomes", torch.zeros([*elements, size, length], dtype=torch.long))
        self.register_buffer("costs", torch.full([*elements, size], math.inf))
        self.register_buffer("filled", torch.zeros([*elements, size], dtype=torch.bool))
        self.register_buffer("seen", torch.zeros(table, dtype=torch.uint8))

    def keep_best(self, cost: Tensor, possible: Tensor, digits: Tensor) -> None:
        """Keeps the distinct outcomes of lowest cost.

        Args:
            cost: ``[*dims | *elements]`` up to broadcasting.
            possible: which rows hold an outcome at all, ``[*dims | *elements]`` with size 1 along joined elements.
            digits: ``[*dims | *elements, T]``, likewise.
        """
        lead = possible.dim() - (self.outcomes.dim() - 2)
        joined = [lead + d for d in range(possible.dim() - lead) if cost.shape[lead + d] > possible.shape[lead + d]]
        cost = (cost.mean(joined, keepdim=True) if joined else cost).expand(possible.shape)
        valid = possible & cost.isfinite()
        cost = torch.where(valid, cost, math.inf)
        kept = [d for d in range(self.outcomes.dim() - 2) if self.outcomes.shape[d] > 1]
        order = [lead + d for d in kept]
        order += [d for d in range(cost.dim()) if d not in order]
        sizes = [self.outcomes.shape[d] for d in kept]
        pool = cost.permute(order).reshape([*sizes, -1])  # [*kept, C]
        length = digits.shape[-1]
        options = digits.permute([*order, cost.dim()]).reshape([*sizes, -1, length])  # [*kept, C, T]
        best, costs = [], []
        for _ in range(self.size):
            place = pool.argmin(-1, keepdim=True)
            costs.append(pool.gather(-1, place).squeeze(-1))
            best.append(options.gather(-2, place.unsqueeze(-1).expand([*sizes, 1, length])).squeeze(-2))
            same = (options == best[-1].unsqueeze(-2)).all(-1)
            pool = torch.where(same, math.inf, pool)
        found = torch.stack(costs, -1).reshape(self.costs.shape)
        self.outcomes.copy_(torch.stack(best, -2).reshape(self.outcomes.shape))
        self.costs.copy_(found)
        self.filled.copy_(found.isfinite())

    # -- what was met -------------------------------------------------------------------------------------------------
    def elements(self, shape: torch.Size) -> Tensor:
        """A number for each element that has a memory of its own, where hashes begin.  ``[*N]``"""
        return torch.arange(math.prod(self.apart), device=self.filled.device).reshape(self.apart).expand(shape)

    def met(self, hashes: Tensor) -> Tensor:
        """Whether everything that begins so has been met, or something of the same hash."""
        return self.seen[hashes % self.table] > 0

    def remember(self, hashes: Tensor, choices: tuple[tuple[Tensor, Tensor, Tensor], ...]) -> None:
        """Marks whole sequences, and what they begin with where every way on is marked or impossible."""
        seen = self._marked(self.seen, hashes, torch.ones_like(hashes))
        for before, children, possible in reversed(choices):
            closed = ((seen[children % self.table] > 0) | ~possible).all(-1)
            seen = self._marked(seen, before, closed)
        self.seen.copy_(seen)

    def _marked(self, seen: Tensor, hashes: Tensor, mark: Tensor) -> Tensor:
        return seen.scatter_reduce(0, (hashes % self.table).flatten(), mark.to(seen.dtype).flatten(), "amax")


def _categorical(log_p: Tensor) -> Tensor:
    """One draw for each row ``[*N, S]``.  ``[*N]``"""
    p = log_p.softmax(-1)
    return torch.multinomial(p.reshape(-1, p.shape[-1]), 1).reshape(p.shape[:-1])

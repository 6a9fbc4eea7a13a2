"""Estimators of which the continuous noise is replaced by quadrature nodes: what `tests.law2` can sum exactly.

Only the noise is replaced; rows, weights and terms are those under test.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from scg.estimators.antithetic import AntitheticPair
from scg.estimators.arm import ARM
from scg.estimators.arms import ARMS, gauss_legendre
from scg.estimators.carms import CARMS
from scg.estimators.disarm import DisARM
from scg.estimators.sequences import Beam, BeamSearch
from scg.estimators.subsets import SubsetEstimator
from scg.estimators.unordered_set import UnorderedSet
from scg.estimators.without_replacement import WithoutReplacement
from scg.exact import Walk, kept_buffers, objective_of
from tests.law2 import ForcedDraws


def choose(table: Tensor) -> Tensor:
    """An index into the last dim of probabilities ``[*N, n]``, by a draw that can be forced.  ``[*N]``"""
    return torch.multinomial(table.reshape(-1, table.shape[-1]), 1).reshape(table.shape[:-1])


def pick(rows: Tensor, index: Tensor) -> Tensor:
    """``rows[index]``; plain indexing by a scalar would read it."""
    return rows.index_select(0, index.reshape(-1)).reshape(*index.shape, *rows.shape[1:])


@dataclass(frozen=True)
class FinitePair(AntitheticPair):
    """The uniform by Gauss-Legendre nodes in each of the cells that ``p`` and ``1 - p`` cut."""

    nodes: int = 1
    """A cell: 1 is exact for estimates linear in the uniform, 2 for their squares."""

    def uniform(self, p: Tensor) -> Tensor:
        m = torch.minimum(p, 1 - p)
        edges = torch.stack([torch.zeros_like(m), m, 1 - m, torch.ones_like(m)], -1)  # [*N, 4]
        x, w = (torch.tensor(part, dtype=p.dtype) / 2 for part in gauss_legendre(self.nodes))
        width = edges.diff(dim=-1).unsqueeze(-1)
        points = (edges[..., :-1, None] + width * (x + 0.5)).flatten(-2)
        return points.gather(-1, choose((width * w).flatten(-2)).unsqueeze(-1)).squeeze(-1)


@dataclass(frozen=True)
class FiniteDisARM(FinitePair, DisARM):
    """`DisARM`."""


@dataclass(frozen=True)
class FiniteARM(FinitePair, ARM):
    """`ARM`."""


@dataclass(frozen=True)
class FiniteARMS(ARMS):
    """`ARMS` with its rows drawn from the table of their joint law, derived apart from it."""

    def bits(self, p: Tensor) -> Tensor:
        n = self.rows
        rows = list(itertools.product([False, True], repeat=n))
        m = torch.minimum(p, 1 - p)
        all_low = [torch.ones_like(m), m, *(self.all_low(m, size) for size in range(2, n + 1))]
        table = []
        for low in map(sum, rows):  # inclusion-exclusion over the others being low as well
            terms = [(-1) ** more * math.comb(n - low, more) * all_low[low + more] for more in range(n - low + 1)]
            table.append(sum(terms[1:], terms[0]).clamp_min(0))
        low_bits = pick(torch.tensor(rows), choose(torch.stack(table, -1))).movedim(-1, 0)
        return torch.where(p < 0.5, low_bits, ~low_bits)

    def all_low(self, m: Tensor, size: int) -> Tensor:
        """The probability that ``size`` given rows fall below the threshold of probability ``m``."""
        if self.copula == "dirichlet":  # shares above x each: (1 - size x)^(n - 1)
            return (1 - size * (1 - m ** (1 / (self.rows - 1)))).clamp_min(0) ** (self.rows - 1)
        assert self.rows == 3, "three normals that sum to zero: the law of the third follows"
        return torch.zeros_like(m) if size == 3 else normal_pair(m, -0.5)


def normal_pair(m: Tensor, correlation: float) -> Tensor:
    """``P(x < h, y < h)`` by integrating the conditional probability over ``x``."""
    points, weights = (torch.tensor(part, dtype=torch.float64) for part in gauss_legendre(60))
    h = torch.special.ndtri(m).unsqueeze(-1)
    x = h - 6 * (1 + points)  # the last 12 deviations below the threshold
    density = torch.exp(-x.square() / 2) / math.sqrt(2 * math.pi)
    inner = torch.special.ndtr((h - correlation * x) / math.sqrt(1 - correlation**2))
    return (6 * weights * density * inner).sum(-1)


class FiniteBeam(BeamSearch):
    """A beam search of which only the order of the rows is drawn, one finish at a time.

    Of draws without replacement the next is a child of a row seen before, or the first child of another row; which row
    that is follows from the order of the rows.
    """

    def survivors(self, beam: Beam | None, children: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
        p = children.exp()  # [*N, rows, S]
        rows, outcomes = p.shape[-2:]
        row = torch.arange(rows).repeat_interleave(outcomes)  # [rows * S]
        mass = p.sum(-1) if beam is None else beam.log_p.exp()  # [*N, rows]
        rest = torch.zeros_like(mass[..., 0]) if beam is None else beam.rest.exp()
        opened = torch.zeros_like(rest, dtype=torch.long)  # rows seen so far
        left, places = p.flatten(-2), []
        free = torch.ones_like(left)
        for _ in range(k):
            unseen = torch.where(torch.arange(rows) >= opened.unsqueeze(-1), mass, 0.0).sum(-1) + rest
            old = torch.where(row < opened.unsqueeze(-1), left, 0.0)
            first = torch.where(row == opened.unsqueeze(-1), left, 0.0)
            scale = unseen.unsqueeze(-1) / first.sum(-1, keepdim=True).clamp_min(1e-300)
            table = old + first * scale
            none = table.sum(-1, keepdim=True) == 0  # no sequence is left: the first place not taken yet
            table = torch.where(none, torch.where(free.cumsum(-1) == 1, free, 0.0), table)
            place = choose(table / table.sum(-1, keepdim=True))
            opened = torch.where(place // outcomes == opened, opened + 1, opened)
            left, free = (part.scatter(-1, place.unsqueeze(-1), 0.0) for part in (left, free))
            places.append(place)
        order = -torch.arange(k, dtype=p.dtype).expand([*rest.shape, k])
        return torch.stack(places, -1), order, torch.zeros_like(rest)


@dataclass(frozen=True)
class FiniteCARMS(CARMS):
    """`CARMS` with its rows drawn from the table of their joint law, derived apart from it."""

    def categories(self, p: Tensor, orders: Tensor) -> Tensor:
        n, count = self.rows, p.shape[-1]
        ends = p.unsqueeze(-2).expand(orders.shape).gather(-1, orders).cumsum(-1)
        ends = torch.cat([torch.zeros_like(ends[..., :1]), ends], -1)  # [*N, O, C + 1]
        place = orders.argsort(-1)
        rows = list(itertools.product(range(count), repeat=n))
        table = []
        for row in rows:
            low = torch.stack([ends.gather(-1, place[..., c, None]).squeeze(-1) for c in row])  # [n, *N, O]
            high = torch.stack([ends.gather(-1, place[..., c, None] + 1).squeeze(-1) for c in row])
            table.append(self.box(low, high).clamp_min(0).mean(-1))
        return pick(torch.tensor(rows), choose(torch.stack(table, -1))).movedim(-1, 0)

    def box(self, low: Tensor, high: Tensor) -> Tensor:
        """The probability that each uniform lies between ``low`` and ``high``, ``[n, …]``."""
        if self.rows == 2:  # u and 1 - u
            return torch.minimum(high[0], 1 - low[1]) - torch.maximum(low[0], 1 - high[1])
        total = torch.zeros_like(low[0])
        for corner in itertools.product([0, 1], repeat=self.rows):
            at = torch.stack([(low if lower else high)[i] for i, lower in enumerate(corner)])
            shares = (1 - at ** (1 / (self.rows - 1))).sum(0)  # all d_i above these: the simplex shrunk
            total = total + (-1) ** sum(corner) * (1 - shares).clamp_min(0) ** (self.rows - 1)
        return total


@dataclass(frozen=True)
class FiniteUnorderedSet(FiniteBeam, UnorderedSet):
    """`UnorderedSet` with its race run one finish at a time."""

    def race(self, log_p: Tensor, k: int) -> tuple[Tensor, Tensor]:
        left, order = log_p.exp(), []
        for _ in range(k):
            order.append(choose(left / left.sum(-1, keepdim=True)))
            left = left.scatter(-1, order[-1].unsqueeze(-1), 0.0)
        return torch.stack(order, -1), log_p[..., 0]


@dataclass(frozen=True)
class FiniteWithoutReplacement(FiniteBeam, WithoutReplacement):
    """`WithoutReplacement` with the time of the next arrival by quadrature, for each set."""

    nodes: int = 48

    def race(self, log_p: Tensor, k: int) -> tuple[Tensor, Tensor]:
        p = log_p.exp()
        sets = torch.tensor(list(itertools.combinations(range(p.shape[-1]), k)))  # [sets, k]
        inside = p[..., sets]  # [*N, sets, k]
        if k == p.shape[-1]:
            return sets[0].expand(inside.shape[:-2] + (k,)), torch.full_like(p[..., 0], math.inf)
        t, mass = _arrivals(inside, p.sum(-1, keepdim=True) - inside.sum(-1), self.nodes)  # [*N, sets, nodes]
        place = choose(mass.flatten(-2))
        return pick(sets, place // self.nodes), t.flatten(-2).gather(-1, place.unsqueeze(-1)).squeeze(-1).log()

    def threshold(self, state: Beam) -> Tensor:
        rest = state.rest.exp()
        t, mass = _arrivals(state.log_p.exp(), torch.where(rest > 0, rest, 1.0), self.nodes)
        node = choose(mass / mass.sum(-1, keepdim=True))
        found = t.gather(-1, node.unsqueeze(-1)).squeeze(-1)
        return torch.where(rest > 0, -found.log(), -math.inf)


def _arrivals(inside: Tensor, rest: Tensor, nodes: int) -> tuple[Tensor, Tensor]:
    """Times at which the first of the rest may arrive after all of a set, and how probable each is.

    Args:
        inside: rates of the set ``[*N, k]``.
        rest: rate of all others ``[*N]``.
        nodes: of the quadrature.

    Returns:
        Times and probabilities ``[*N, nodes]``.
    """
    x, w = (torch.tensor(part, dtype=rest.dtype) / 2 for part in gauss_legendre(nodes))
    rate = rest.unsqueeze(-1)
    t = 40 / rate * (x + 0.5) ** 2
    arrived = (-torch.expm1(-inside.unsqueeze(-1) * t.unsqueeze(-2))).prod(-2)  # [*N, nodes]
    return t, rate * torch.exp(-rate * t) * arrived * (80 / rate * (x + 0.5) * w)


def finite_sets() -> Mapping[str, Callable[[int], SubsetEstimator]]:
    """Makers of the finite estimators with sets, by name, given the number of rows."""
    return {
        "unordered_set": lambda k: FiniteUnorderedSet(samples=k),
        "without_replacement": lambda k: FiniteWithoutReplacement(samples=k),
    }


def moments(compiled: Any, params: Mapping[str, Tensor], *args: Any) -> dict[str, tuple[Tensor, Tensor]]:
    """Mean and variance of the gradient estimate over all its draws, by parameter."""
    first = {name: torch.zeros_like(p) for name, p in params.items()}
    second = {name: torch.zeros_like(p) for name, p in params.items()}
    compiled(*args)  # traced before draws are forced
    walk = Walk()
    while walk.more():
        draws = ForcedDraws(walk)
        with kept_buffers([compiled] if isinstance(compiled, nn.Module) else []), draws:
            estimate = objective_of(compiled(*args))
            grads = torch.autograd.grad(estimate, list(params.values()), allow_unused=True)
        for name, grad in zip(params, grads, strict=True):
            if grad is not None:
                first[name] += draws.probability * grad
                second[name] += draws.probability * grad.square()
    return {name: (first[name], second[name] - first[name].square()) for name in params}

"""What is known of a value as a function of one draw: a polynomial in its elements, or a mean and perhaps a variance.

    z             m + e                       e is the draw less its mean m
    (z - x)**2    (m - x)^2 + 2 (m - x) e + e^2        expectation (m - x)^2 + Var z
    W z + b       mean W m + b, variance W^2 Var z     elements are no longer independent: no polynomials from here on

About its mean a polynomial's expectation has no large terms that cancel.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from scg.ir import Node, Op, Ref, Sample, map_refs
from scg.passes.closed_forms.draft import Draft

_HOLE = Ref("·")


@dataclass(frozen=True)
class Move:
    """An operation that copies elements about, with a hole where its operand stood."""

    target: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    item: int | None = None
    """Of an operation with several outputs: which one."""
    repeats: bool = False
    """Whether one element may be copied to several places."""

    @classmethod
    def of(cls, node: Op, operand: Ref, *, item: int | None = None, repeats: bool = False) -> Move:
        args, kwargs = map_refs(lambda ref: _HOLE if ref == operand else ref, (tuple(node.args), dict(node.kwargs)))
        return cls(node.target, args, kwargs, item, repeats)

    def __call__(self, draft: Draft, ref: Ref, at: Node) -> Ref:
        import operator

        args, kwargs = map_refs(lambda old: ref if old == _HOLE else old, (self.args, dict(self.kwargs)))
        moved = draft.op(self.target, *args, at=at, **kwargs)
        return moved if self.item is None else draft.op(operator.getitem, moved, self.item, at=at)

    @property
    def key(self) -> str:
        return f"{self.target} {self.args} {self.kwargs} {self.item}"


@dataclass(frozen=True)
class Polynomial:
    """``sum_k c_k e^k``, element by element, where e is the centred draw after some moves."""

    terms: tuple[Ref | float, ...]
    """c_0, c_1, …, each a number or a tensor that broadcasts to the shape."""
    moves: tuple[Move, ...]
    shape: tuple[int, ...]

    @property
    def degree(self) -> int:
        return len(self.terms) - 1

    @property
    def place(self) -> tuple[str, ...]:
        """Equal for polynomials in the same element at each place."""
        return tuple(move.key for move in self.moves)

    @property
    def independent(self) -> bool:
        """Whether no two of its elements are made from one element of the draw."""
        return not any(move.repeats for move in self.moves)


@dataclass(frozen=True)
class Spread:
    """A value of which the expectation is known, and the variance of each element where it is asked for."""

    mean: Ref
    variance: Callable[[], Ref | None] | None = None


Expansion = Polynomial | Spread


class Moments:
    """The moments of one site's draw, in a draft."""

    def __init__(self, draft: Draft, site: Sample) -> None:
        self.draft, self.site = draft, site
        self._moved: dict[Any, Ref | float | None] = {}

    def moment(self, order: int, polynomial: Polynomial, at: Node) -> Ref | float | None:
        """``E[e^order]`` at the places of a polynomial; None where it is not known."""
        key = (order, polynomial.place)
        if key not in self._moved:
            found = self.draft.central_moment(self.site, order)
            if isinstance(found, Ref):
                for move in polynomial.moves:
                    found = move(self.draft, found, at)
            self._moved[key] = found
        return self._moved[key]

    def mean(self, value: Expansion | None, at: Node) -> Ref | None:
        """The expectation, of the shape and dtype of ``at``, whose expansion ``value`` is."""
        if value is None:
            return None
        if isinstance(value, Spread):
            return self.draft.tensor(value.mean, at.tensor, at=at)
        total = value.terms[0]
        for order, factor in enumerate(value.terms[2:], 2):
            if factor == 0:
                continue
            moment = self.moment(order, value, at)
            if moment is None:
                return None
            total = self.draft.plus(total, self.draft.times(factor, moment, at), at)
        return self.draft.tensor(total, at.tensor, at=at)

    def variance(self, value: Expansion, at: Node) -> Ref | None:
        """The variance of each element, where it is that of a value affine in the draw."""
        if isinstance(value, Spread):
            return value.variance() if value.variance is not None else None
        if value.degree != 1:
            return None
        moment = self.moment(2, value, at)
        if moment is None:
            return None
        slope = value.terms[1]
        squared = self.draft.times(slope, slope, at)
        return self.draft.tensor(self.draft.times(squared, moment, at), at.tensor, at=at)

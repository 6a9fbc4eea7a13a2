"""Sums of products in log space: factors become messages, one variable at a time.

    a_t(z_t)     = log p(x_t | z_t) + m_t(z_t)
    m_t+1(z_t+1) = log sum_z_t softmax(a_t)(z_t) p(z_t+1 | z_t),     log sum exp a_t is added up on its own

A sum of two tables that share just the variable to be summed is one matrix product of their exponentials. One of them
is scaled to sum to 1: one call forward and one backward. What lies more than 87 nats (708 in float64) below the largest
term of such a sum counts as impossible.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from scg.analysis.factors import plates_of, summed_along
from scg.backends.recorder import narrowest
from scg.backends.sample_dims import Batched, SampleDims, stop_gradient
from scg.backends.terms import MANY
from scg.ir import Marginal


def log_marginal(
    dims: SampleDims,
    node: Marginal,
    values: Sequence[Batched],
    weights: Sequence[Batched],
    sequence: Sequence[str],
    order: int = 1,
) -> Batched:
    """The value of ``node``: ``-log sum_z p(z) exp(-sum of scaled values)``, ``[*dims of other sites | *B]``.

    Args:
        dims: the program's sample dims.
        node: split into factors.
        values: of its factors, ``[*dims | *S]``.
        weights: log probabilities of its sites' rows, ``[*dims, R | *elements]``, size 1 along joined elements.
        sequence: in which its sites are summed out.
        order: how many derivatives will be taken.
    """
    shape = node.tensor.shape
    ndim = len(shape) + len(node.plates)
    factors = []
    for factor, value in zip(node.factors, values, strict=True):
        tensor = summed_along(_narrowed(value, factor.axes, len(shape)), factor.axes, ndim, lead=len(value.dims))
        tensor = tensor if factor.scale == -1.0 else tensor * -factor.scale
        factors.append(LogFactor(Batched(_clamped(tensor), value.dims)))
    for site, weight in zip(node.sites, weights, strict=True):
        tensor = summed_along(_narrowed(weight, site.axes, len(shape)), site.axes, ndim, lead=len(weight.dims))
        factors.append(LogFactor(Batched(tensor, weight.dims), site=site.node))
    found = Elimination(dims, plates_of(node), factors, order)(sequence)
    lead = found.tensor.shape[: len(found.dims)]
    total = torch.threshold(found.tensor, _barred(found.tensor) / 2, -math.inf)
    return Batched(-total.reshape([*lead, *found.shape[: len(shape)]]).expand([*lead, *shape]), found.dims)


def _barred(tensor: Tensor) -> float:
    """The logarithm that stands for no chance at all: many of them can be added up."""
    return float(torch.finfo(tensor.dtype).min) * 1e-8


def _clamped(tensor: Tensor) -> Tensor:
    """``tensor`` without -inf: the data may be impossible, the logarithm of a sum still has a gradient."""
    return torch.clamp_min(tensor, _barred(tensor))


def _narrowed(value: Batched, axes: Sequence[int | None], ndim: int) -> Tensor:
    """``value`` of size 1 along those of the first ``ndim`` axes along which it is known not to vary."""
    narrow, lead = narrowest(value.tensor), len(value.dims)
    free = [False] * lead + [axis is not None and axis < ndim for axis in axes]
    shapes = zip(free, narrow.shape, value.tensor.shape, strict=True)
    sizes = [small if may else size for may, small, size in shapes]
    return narrow if sizes == list(narrow.shape) else narrow.expand(sizes)


@dataclass(frozen=True)
class LogFactor:
    """A table of logarithms ``[*dims | *index space]``, of size 1 along axes where it does not vary."""

    value: Batched
    site: str = ""
    """The site whose log probabilities given the others it holds: at most zero, and not all far below."""
    message: bool = False
    """Whether it is what a site has left behind."""

    @property
    def has_holes(self) -> bool:
        """Whether entries may be -inf; those of all others are finite."""
        return bool(self.site) or self.message

    @property
    def dims(self) -> tuple[str, ...]:
        return self.value.dims


class Elimination:
    """Sums sites out of a product of factors.

    Args:
        dims: the program's sample dims.
        inside: the plates that each site to be summed stands in.
        factors: of the whole product.
        order: how many derivatives will be taken.
    """

    def __init__(
        self, dims: SampleDims, inside: Mapping[str, frozenset[int]], factors: Sequence[LogFactor], order: int = 1
    ) -> None:
        self.dims, self.inside, self.sums = dims, inside, _Sums(order)
        self.plates = frozenset().union(*inside.values())
        self.factors = [self._multiplied_up(factor) for factor in factors]
        self.last: list[tuple[Batched, int]] = []
        """Tables and the axes of their rows: the logarithms of their sums are factors that no site is left in."""

    def __call__(self, order: Sequence[str]) -> Batched:
        """The logarithm of the product summed over the sites in ``order``."""
        place = {name: i for i, name in enumerate(order)}
        buckets: list[list[LogFactor]] = [[] for _ in range(len(order) + 1)]

        def put(factor: LogFactor) -> None:
            buckets[min((place[dim] for dim in factor.dims if dim in place), default=-1)].append(factor)

        for factor in self.factors:
            put(factor)
        for name, bucket in zip(order, buckets[:-1], strict=True):
            for factor in self._sum_out(name, bucket):
                put(self._multiplied_up(factor))
        return self._sum([*buckets[-1], *self._last()])

    def _multiplied_up(self, factor: LogFactor) -> LogFactor:
        """``factor`` multiplied up over the plates that none of its sites stands in."""
        held = frozenset().union(*(self.inside.get(name, frozenset()) for name in factor.dims))
        value = factor.value
        lead = len(value.dims)
        gone = [lead + axis for axis in sorted(self.plates - held) if value.shape[axis] > 1]
        if not gone:
            return factor
        total = value.tensor.sum(gone, keepdim=True)
        total = _clamped(total) if factor.has_holes else total
        return LogFactor(Batched(total, value.dims), message=factor.message)

    def _sum_out(self, name: str, group: Sequence[LogFactor]) -> list[LogFactor]:
        beyond = [{dim for dim in factor.dims if dim in self.inside and dim != name} for factor in group]
        for widest in sorted(filter(None, beyond), key=len, reverse=True):
            right = [factor for factor, rows in zip(group, beyond, strict=True) if rows and rows <= widest]
            left = [factor for factor, rows in zip(group, beyond, strict=True) if not rows or not rows <= widest]
            # else an impossible row may be the largest
            known = any(factor.has_holes for factor in left)
            if known and not widest.intersection(*[{dim for factor in left for dim in factor.dims}]):
                return self._product(name, self._finite(left, name), right, widest)
        return [LogFactor(self._log_sum(self._finite(group, name), name), message=True)]

    def _finite(self, factors: Sequence[LogFactor], name: str) -> Batched:
        """The sum of tables, with an entry above -inf among the rows of ``name`` wherever one looks."""
        total, holes = self._sum(factors), [factor for factor in factors if factor.has_holes]
        for factor in holes[:1]:
            alone = factor.message and not self.inside.keys() & {*factor.dims} - {name}
            if len(holes) == 1 and (factor.site == name or alone):
                return total
        return Batched(_clamped(total.tensor), total.dims) if holes else total

    def _log_sum(self, table: Batched, name: str) -> Batched:
        """``log sum exp`` over the rows of ``name``."""
        left = tuple(dim for dim in table.dims if dim != name)
        return Batched(torch.logsumexp(table.tensor, table.dims.index(name)), left)

    def _product(self, name: str, left: Batched, right: Sequence[LogFactor], rows: set[str]) -> list[LogFactor]:
        """As a matrix product ``[right's rows, name] @ [name, left's rows | index space]``."""
        found = self._scale(left, name)
        shares = Batched(left.tensor.softmax(left.dims.index(name)), left.dims)
        table = self._sum(right)
        if not all(factor.site for factor in right):
            table, top = self._shifted(Batched(_clamped(table.tensor), table.dims), name)
            found.append(LogFactor(top))
        new = self.dims.union(tuple(rows))
        if set(table.dims) == {name, *rows} and all(size == 1 for size in table.shape):
            matrix = _arranged(
                self.sums.exp(table.tensor).reshape(self.dims.sizes(table.dims)), table.dims, (*new, name)
            )
            others = tuple(dim for dim in shares.dims if dim != name)
            columns = _arranged(shares.tensor, shares.dims, (name, *others))
            product = matrix.reshape([-1, matrix.shape[-1]]) @ columns.reshape([columns.shape[0], -1])
            product = product.reshape([*self.dims.sizes(new), *columns.shape[1:]])
        else:
            others = tuple(dim for dim in self.dims.union(shares.dims, table.dims) if dim not in {name, *rows})
            product = self._batched_product(name, shares, table, others, new)
        dims = (*new, *others)
        laid_out = self.dims.union(dims)
        message = self.sums.log(_arranged(product, dims, laid_out), self.dims.size(name))
        if not all(factor.site in rows for factor in right):  # else it is a mean of distributions over the rows
            message = _clamped(message)
        return [LogFactor(Batched(message, laid_out), message=True), *found]

    def _scale(self, table: Batched, name: str) -> list[LogFactor]:
        """What ``table`` sums to over the rows of ``name``; put off where nothing but the result depends on it."""
        axis = table.dims.index(name)
        size = table.tensor.shape[len(table.dims) :]
        inner = any(dim in self.inside for dim in table.dims if dim != name)
        if inner or any(size[axis] > 1 for axis in self.plates):
            return [LogFactor(self._log_sum(table, name))]
        self.last.append((table, axis))
        return []

    def _last(self) -> list[LogFactor]:
        """What was put off, many of one shape in one call."""
        groups: dict[Any, list[Batched]] = {}
        for table, axis in self.last:
            rest = tuple(dim for dim in table.dims if dim != table.dims[axis])
            groups.setdefault((axis, rest, table.tensor.shape), []).append(table)
        found = []
        for (axis, rest, _), tables in groups.items():
            if len(tables) >= MANY:
                total = torch.stack([table.tensor for table in tables]).logsumexp(axis + 1).sum(0)
                found.append(LogFactor(Batched(total, rest)))
            else:
                found += [LogFactor(self._log_sum(table, table.dims[axis])) for table in tables]
        return found

    def _batched_product(
        self, name: str, left: Batched, right: Batched, others: tuple[str, ...], new: tuple[str, ...]
    ) -> Tensor:
        """A matrix product for each of the other rows and each index: ``[*new, *others | *index space]``."""
        left, right = (_placed(value, (*others, *new, name), self.dims) for value in (left, right))
        lead, inner = len(others), len(new) + 1
        ndim = left.tensor.dim()
        order = [*range(lead), *range(lead + inner, ndim), *range(lead, lead + inner)]
        u = left.tensor.permute(order)  # [*others, *index space, *new, name]
        w = self.sums.exp(right.tensor.permute(order))
        u = u.flatten(-inner, -2) if inner > 2 else u
        w = w.flatten(-inner, -2) if inner > 2 else w
        found = (w @ u.transpose(-1, -2)).squeeze(-1)  # [*others, *index space, new]
        found = found.reshape([*found.shape[:-1], *self.dims.sizes(new)])
        space = ndim - lead - inner
        return found.permute([*range(lead + space, lead + space + len(new)), *range(lead + space)])

    def _shifted(self, table: Batched, name: str) -> tuple[Batched, Batched]:
        """``table`` less its maximum over the rows of ``name``, and that maximum."""
        axis = table.dims.index(name)
        top = stop_gradient(table).tensor.amax(axis, keepdim=axis > 0)
        shifted = Batched(table.tensor - top, table.dims)
        return shifted, Batched(top.squeeze(axis) if axis > 0 else top, tuple(d for d in table.dims if d != name))

    def _sum(self, factors: Sequence[LogFactor]) -> Batched:
        """The sum of tables, many of one shape in one call."""
        groups: dict[tuple[tuple[str, ...], torch.Size], list[Tensor]] = {}
        for factor in factors:
            groups.setdefault((factor.dims, factor.value.tensor.shape), []).append(factor.value.tensor)
        total: Batched | None = None
        for (dims, _), tensors in groups.items():
            if len(tensors) >= MANY:
                tensors = [torch.stack(tensors).sum(0)]
            for tensor in tensors:
                total = Batched(tensor, dims) if total is None else self._added(total, Batched(tensor, dims))
        assert total is not None
        return total

    def _added(self, a: Batched, b: Batched) -> Batched:
        dims = self.dims.union(a.dims, b.dims)
        return Batched(self.dims.align(a, dims) + self.dims.align(b, dims), dims)


class _Sums:
    """``log sum exp`` in two steps, with an operation of the backend's in between."""

    def __init__(self, order: int) -> None:
        self.order = order

    def exp(self, table: Tensor) -> Tensor:
        """For second derivatives a hair above zero where it would be zero: that of the logarithm stays finite."""
        return table.exp() + torch.finfo(table.dtype).tiny if self.order > 1 else table.exp()

    def log(self, total: Tensor, terms: int) -> Tensor:
        """Of a sum of ``terms`` such; of nothing -inf, without a gradient (which `relu` does not let through)."""
        if self.order == 1:
            return torch.relu(total).log()
        return torch.threshold(total.log(), math.log(2 * terms * torch.finfo(total.dtype).tiny), -math.inf)


def _arranged(tensor: Tensor, dims: Sequence[str], order: Sequence[str]) -> Tensor:
    """``[*dims | …]`` as ``[*order | …]``."""
    places = [dims.index(name) for name in order]
    if places == list(range(len(places))):
        return tensor
    return tensor.permute([*places, *range(len(places), tensor.dim())])


def _placed(value: Batched, dims: Sequence[str], table: SampleDims) -> Batched:
    """``value`` with the dims ``dims`` in that order, size 1 where it lacks one."""
    order = tuple(name for name in dims if name in value.dims)
    tensor = _arranged(value.tensor, value.dims, order)
    lead = [table.size(name) if name in value.dims else 1 for name in dims]
    return Batched(tensor.reshape([*lead, *value.shape]), tuple(dims))

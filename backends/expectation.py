"""Expectations over sample dims: means over i.i.d. rows, probability-weighted sums over enumerated and weighted ones.

before   value  [K, z rows | B]        after   value  [B]
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from scg.analysis.influence import Influence, Relation
from scg.backends.beams import Layout
from scg.backends.recorder import compile_time, record_constant
from scg.backends.sample_dims import Batched, SampleDims, stop_gradient
from scg.ir import Dist, Graph, Sample


class Expectation:
    """Takes expectations with the weights that the sites' rows have, messages between sites shared."""

    def __init__(
        self,
        graph: Graph,
        found: Influence,
        dims: SampleDims,
        layout: Layout,
        table: Callable[[], MutableMapping[str, Batched]] = dict,
    ) -> None:
        self.graph, self.found, self.dims, self.layout = graph, found, dims, layout
        self.weights = table()
        """Probabilities of the rows of enumerated sites, ``[*dims, R | *elements]``, size 1 along joined dims; weights
        of the rows of sequences, ``[*dims, R | *frame]``."""
        self.log_weights = table()
        """Their logarithms, of enumerated sites."""
        self._joints: dict[Any, Batched] = {}
        """Joint probabilities of enumerated rows, by sites and by the elements they are met with."""

    def beside(self, dims: SampleDims) -> Expectation:
        """The expectation of a rerun with sample dims of its own: weights without gradient, messages made anew."""
        other = copy.copy(self)
        other.dims, other._joints = dims, {}
        other.weights = {name: stop_gradient(weight) for name, weight in self.weights.items()}
        other.log_weights = {name: stop_gradient(weight) for name, weight in self.log_weights.items()}
        return other

    def forget(self) -> None:
        """Drops the messages: they may have been made where gradients are stopped."""
        self._joints = {}

    def __call__(self, value: Batched, of: str, keep: Sequence[str] = (), *, detach: bool = False) -> Batched:
        """Mean over i.i.d. dims and probability-weighted sum over enumerated ones.

        Args:
            value: ``[*dims | *S]`` of the node ``of``, whose influence says which weights its elements meet.
            keep: sample dims that stay: the weights of the others are conditional on them.
            detach: stop the gradient of the weights.
        """
        summed = tuple(name for name in value.dims if name in self.weights and name not in keep)
        if summed:
            weight = self._probability(of, value.ndim, summed, keep)
            if detach:
                weight = stop_gradient(weight)
            dims = self.dims.union(value.dims, weight.dims)
            v, w = self.dims.align(value, dims), self.dims.align(weight, dims)
            if any(self._may_be_impossible(name) for name in summed):  # 0 * inf
                v = torch.where(w > 0, v, 0.0)
            value = _sum_out(w * v, dims, summed)
        drawn = [i for i, name in enumerate(value.dims) if name not in keep]
        if not drawn:
            return value
        return Batched(value.tensor.mean(drawn), tuple(name for name in value.dims if name in keep))

    def _probability(self, of: str, ndim: int, names: tuple[str, ...], keep: Sequence[str]) -> Batched:
        """Of the rows of ``names``, given those of ``keep``, as the elements of the node ``of`` meet them."""
        kept = tuple(name for name in self.weights if name in keep)
        if not self._closure(names, keep) & self._closure(kept, ()):
            return self._joint(of, ndim, names, frozenset(keep))
        drawn = frozenset(keep).difference(kept)  # what is summed is upstream of what is kept: Bayes' rule
        both = self._joint(of, ndim, self.dims.union(names, kept), drawn)
        given = self._joint(of, ndim, self.dims.union(kept), drawn)
        dims = self.dims.union(both.dims, given.dims)
        below = self.dims.align(given, dims, ndim).clamp(min=torch.finfo(given.tensor.dtype).tiny)
        return Batched(self.dims.align(both, dims, ndim) / below, dims)

    def _closure(self, names: Sequence[str], stop: Collection[str]) -> set[str]:
        """``names`` and the weighted sites that their weights depend on, directly or not, up to ``stop``."""
        seen: set[str] = set()
        stack = list(names)
        while stack:
            name = stack.pop()
            if name not in seen and name not in stop and name in self.weights:
                seen.add(name)
                stack.extend(self.weights[name].dims)
        return seen

    def _joint(self, of: str, ndim: int, names: tuple[str, ...], stop: frozenset[str]) -> Batched:
        """Joint probability of the rows of ``names``, the last site's weight first, sites before them summed out.

            P(z_t) = sum over z_{t-1} of P(z_{t-1}) P(z_t | z_{t-1})

        Messages are shared between all nodes that meet the same elements: T costs on a chain take T sums of k^2 terms.
        """
        wide = [name for name in self._closure(names, stop) if self._is_wide(name)]
        key = (names, stop, ndim, frozenset((name, self._seen(of, name)) for name in wide))
        if key not in self._joints:
            last = names[-1]
            weight = self._weight_for(of, last, ndim)
            before = self.dims.union(
                names[:-1], [name for name in weight.dims if name in self.weights and name != last and name not in stop]
            )
            if before:
                left = self._joint(of, ndim, before, stop)
                dims = self.dims.union(left.dims, weight.dims)
                product = self.dims.align(weight, dims, ndim) * self.dims.align(left, dims, ndim)
                weight = _sum_out(product, dims, [name for name in before if name not in names])
            self._joints[key] = weight
        return self._joints[key]

    def _seen(self, of: str, name: str) -> Any:
        """Which elements of the weights of ``name`` the node ``of`` meets."""
        return self.layout.key(name, of) if name in self.layout.frames else self.found.relation(of, name)

    def _is_wide(self, name: str) -> bool:
        """Do the weights of ``name`` differ between its elements?"""
        return any(size > 1 for size in self.weights[name].shape)

    def _weight_for(self, of: str, name: str, ndim: int) -> Batched:
        """The rows' probabilities of enumerated site ``name``, laid out along the dims of the node ``of``."""
        weight = self.weights[name]
        lead = len(weight.dims)
        shape = weight.shape
        if not self._is_wide(name):
            return Batched(weight.tensor.reshape([*weight.tensor.shape[:lead], *[1] * ndim]), weight.dims)
        sequence = name in self.layout.frames
        if sequence and self.layout.key(name, of):
            return self.layout.place(name, weight, of, ndim)
        relation = None if sequence else self.found.relation(of, name)
        if relation is None:  # the value does not depend on it: any element's weights sum to one
            first = weight.tensor.flatten(lead)[..., 0]
            return Batched(first.reshape([*first.shape, *[1] * ndim]), weight.dims)
        with compile_time():
            axes = [relation.tied(dim) if size > 1 else None for dim, size in enumerate(shape)]
        wide = [dim for dim, size in enumerate(shape) if size > 1]
        places = [axes[dim] for dim in wide]
        if None not in places and len(set(places)) == len(places):
            tensor = weight.tensor.reshape([*weight.tensor.shape[:lead], *(shape[dim] for dim in wide)])
            order = sorted(range(len(wide)), key=lambda i: places[i] or 0)
            tensor = tensor.permute([*range(lead), *(lead + i for i in order)])
            sizes = [1] * ndim
            for i in order:
                sizes[places[i] or 0] = shape[wide[i]]
            return Batched(tensor.reshape([*tensor.shape[:lead], *sizes]), weight.dims)
        with compile_time():
            points = [_point_index(relation, dim, ndim) if size > 1 else 0 for dim, size in enumerate(shape)]
        placed = [_placed(point) for point in points]
        return Batched(weight.tensor[(*[slice(None)] * lead, *placed)], weight.dims)

    def _may_be_impossible(self, name: str) -> bool:
        frame = self.layout.frames.get(name)
        sites = [self.graph[site] for site in ([name] if frame is None else frame.sites)]
        dists = [self.graph[site.dist] for site in sites if isinstance(site, Sample)]
        return any(isinstance(dist, Dist) and dist.template.cls.__name__ != "Bernoulli" for dist in dists)


def _sum_out(tensor: Tensor, dims: tuple[str, ...], names: Sequence[str]) -> Batched:
    """``[*dims | …]`` without the dims ``names``."""
    axes = [dims.index(name) for name in names]
    return Batched(tensor.sum(axes) if axes else tensor, tuple(name for name in dims if name not in names))


def _point_index(relation: Relation, dim: int, ndim: int) -> Tensor:
    """The one site index each element sees along ``dim``; any, where it sees none. Event dims, behind, share theirs."""
    lo, hi = relation.lo[dim], relation.hi[dim]
    point = torch.where(lo <= hi, lo, torch.zeros_like(lo))
    return (point.flatten(ndim)[..., 0] if point.dim() > ndim else point).contiguous()


def _placed(point: Tensor | int) -> Any:
    """An index of compile time as generated code takes it: a tensor, or a number where there is one element."""
    if isinstance(point, int):
        return point
    if point.dim():
        return record_constant(lambda: point)
    with compile_time():
        return int(point)

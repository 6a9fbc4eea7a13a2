"""Learning signals: the costs credited to a site, as its elements are credited with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from scg.backends.coefficients import Coefficient
from scg.backends.credit_sums import credit_max, credit_sum, running_max
from scg.backends.expectation import Expectation
from scg.backends.recorder import compile_time, record_constant
from scg.backends.sample_dims import Batched, SampleDims
from scg.ir import Bound, Cost, CreditEdge, Graph, Sample


class Signals:
    """The credited cost-to-go of every site in one run of the program, sums of costs shared between sites."""

    def __init__(
        self,
        graph: Graph,
        dims: SampleDims,
        env: Mapping[str, Any],
        bounds: Mapping[str, Batched],
        expectation: Expectation,
        coefficients: Mapping[str, Coefficient],
        *,
        fixed: Mapping[str, float | Tensor] | None = None,
        follows: bool = False,
    ) -> None:
        self.graph, self.dims, self.env, self.bounds = graph, dims, env, bounds
        self.expectation, self.coefficients = expectation, coefficients
        self.fixed = fixed or {}
        """Coefficients that are known when compiling."""
        self.follows = follows
        """Whether signals keep the gradient of the values they are computed from."""
        self._shares: dict[Any, Tensor] = {}
        self._detached: dict[str, Batched] = {}
        self._sums: dict[tuple[int, ...], dict[frozenset[tuple[str, int]], Tensor]] = {}
        """Sums of credited costs made so far, by shape and members."""
        self._edges: dict[str, list[CreditEdge]] = {}
        for (name, _), edge in graph.credit.items():
            self._edges.setdefault(name, []).append(edge)

    def credited(self, site: Sample) -> list[CreditEdge]:
        """From every cost credited to ``site``."""
        return self._edges.get(site.name, [])

    def edges(self, site: Sample) -> list[CreditEdge]:
        """Those from costs that count in the objective."""
        return [edge for edge in self.credited(site) if not self.coefficients[edge.cost].is_zero]

    def bound_of(self, cost: str) -> Bound | None:
        node = self.graph[cost]
        assert isinstance(node, Cost)
        bound = self.graph[node.value]
        return bound if isinstance(bound, Bound) and bound.name in self.bounds else None

    def of(self, site: Sample, dims: tuple[str, ...]) -> tuple[Tensor, float] | None:
        """The credited cost-to-go ``[*dims | *elements]`` (size 1 where it does not vary) and a factor taken out."""
        edges = [edge for edge in self.edges(site) if self.bound_of(edge.cost) is None]
        if not edges:
            return None
        scale = self.scale(edges)
        return self.total(edges, dims, scale), scale

    def total(self, edges: Sequence[CreditEdge], dims: tuple[str, ...], scale: float) -> Tensor:
        """The sum of what these costs credit a site with, ``scale`` taken out.  ``[*dims | *elements]``"""
        groups: dict[tuple[int, ...], list[tuple[str, Tensor]]] = {}
        for edge in edges:
            value = self._shared(edge, dims, scale)
            groups.setdefault(tuple(value.shape), []).append((edge.cost, value))
        total: Tensor | None = None
        for shape, members in groups.items():
            part = self._running_sum(shape, members)
            total = part if total is None else total + part
        assert total is not None
        return total

    def scale(self, edges: Sequence[CreditEdge]) -> float:
        """What is taken out of the coefficients of these costs: the largest where all are numbers."""
        uniform = [self.coefficients[edge.cost].uniform for edge in edges]
        known = [abs(u) for u in uniform if u is not None]
        return max(known) if known and len(known) == len(uniform) else 1.0

    def unit(self, site: Sample, scale: float) -> Tensor | None:
        """For each element the largest coefficient of what it is credited with, ``scale`` taken out; None for one.

        Of size 1 along dims where it does not vary, if known when compiling.  ``[*elements]``
        """
        edges = [edge for edge in self.edges(site) if self.bound_of(edge.cost) is None]
        if all(edge.cost in self.fixed for edge in edges):
            with compile_time():
                made = self._fixed_unit(site, edges, scale)
            return None if made is None else record_constant(lambda: made)
        elements, found = self._element_shape(site.name), None
        for edge in edges:
            coefficient = self.coefficients[edge.cost].tensor
            assert coefficient is not None
            largest = running_max(coefficient.detach().abs(), edge, elements)
            found = largest if found is None else torch.maximum(found, largest)
        return found

    def _fixed_unit(self, site: Sample, edges: Sequence[CreditEdge], scale: float) -> Tensor | None:
        elements, found = self._element_shape(site.name), None
        for edge in edges:
            node = self.graph[edge.cost].tensor
            coefficient = torch.as_tensor(self.fixed[edge.cost], dtype=torch.float64, device="cpu")
            largest = credit_max(coefficient.abs().expand(node.shape), edge, elements) / scale
            found = largest if found is None else torch.maximum(found, largest)
        if found is None or bool((found == 1).all()):
            return None
        for axis in range(found.dim()):
            if bool((found == found.narrow(axis, 0, 1)).all()):
                found = found.narrow(axis, 0, 1)
        return found.to(node.dtype).to(node.device)

    def _running_sum(self, shape: tuple[int, ...], members: list[tuple[str, Tensor]]) -> Tensor:
        """The sum of the members, built on the largest sum made before: T rewards-to-go take T additions."""
        ids = frozenset((cost, id(value)) for cost, value in members)
        known = self._sums.setdefault(shape, {})
        best: frozenset[tuple[str, int]] = frozenset()
        for done in reversed(known):  # the last one is mostly the largest
            if len(done) > len(best) and done <= ids:
                best = done
        total: Tensor | None = known.get(best)
        for cost, value in members:
            if (cost, id(value)) not in best:
                total = value if total is None else total + value
        assert total is not None
        known[ids] = total
        return total

    def _shared(self, edge: CreditEdge, dims: tuple[str, ...], scale: float) -> Tensor:
        """One cost's share of a site's signal: ``[*dims | *elements]`` with size 1 along mixed dims."""
        key = (edge.cost, edge.share, dims, scale, edge.axes, edge.mixed if edge.simple else id(edge))
        if key not in self._shares:
            self._shares[key] = self.share(edge, dims, scale)
        return self._shares[key]

    def share(self, edge: CreditEdge, dims: tuple[str, ...], scale: float, cost: Batched | None = None) -> Tensor:
        cost = self._detached_cost(edge.cost) if cost is None else cost
        value = self.expectation(cost, edge.cost, keep=dims, detach=True)
        tensor = self._placed(value, dims)
        coefficient = self.coefficients[edge.cost]
        if coefficient.uniform is None:
            assert coefficient.tensor is not None
            tensor = tensor * coefficient.tensor.detach()
            if scale != 1.0:
                tensor = tensor / scale
        tensor = credit_sum(tensor, len(dims), edge, self._element_shape(edge.site))
        if coefficient.uniform is not None and coefficient.uniform != scale:
            tensor = tensor * (coefficient.uniform / scale)
        return tensor if edge.share == 1.0 else tensor * edge.share

    def credited_sum(self, edge: CreditEdge, dims: tuple[str, ...], value: Batched) -> Tensor:
        """The elements of any value summed into those of the site that they teach.  ``[*dims | *elements]``"""
        return credit_sum(self._placed(value, dims), len(dims), edge, self._element_shape(edge.site))

    def _placed(self, value: Batched, dims: tuple[str, ...]) -> Tensor:
        if value.dims or not dims:
            return self.dims.align(value, dims)
        return value.tensor.reshape([1] * len(dims) + list(value.shape))

    def _detached_cost(self, cost: str) -> Batched:
        if cost not in self._detached:
            value: Batched = self.env[cost]
            self._detached[cost] = value if self.follows else Batched(value.tensor.detach(), value.dims)
        return self._detached[cost]

    def _element_shape(self, site: str) -> tuple[int, ...]:
        type_ = self.graph[site].tensor
        return type_.shape[: len(type_.shape) - type_.event_ndim]

"""A graph that new nodes are tried out on: what comes of them takes its place in the order at the end."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Normal

from scg.ir import Dist, Expected, Graph, Node, Ref, Sample, TensorType
from scg.passes.closed_forms.forms import CentralMoment, mean
from scg.passes.rewriter import Rewriter, type_of

aten = torch.ops.aten


class Draft(Rewriter):
    """All nodes of ``graph``, and new ones behind them that read whatever there is."""

    def __init__(self, graph: Graph) -> None:
        super().__init__(graph)
        self.nodes = dict(graph.nodes)
        self._made: dict[Any, Ref] = {}

    def dist(self, ref: Ref) -> Dist:
        node = self.nodes[ref]
        assert isinstance(node, Dist)
        return node

    # -- expectations -------------------------------------------------------------------------------------------------
    def expected(self, form: Callable[..., Tensor], *dists: Ref, at: Node, event: bool = False) -> Ref | None:
        """A node for ``form(*dists)``; None where torch cannot say it without looking at values.

        Args:
            event: the form keeps the event dims of the draw.
        """
        key = (form, dists)
        if key not in self._made:
            try:
                value = form(*map(self._stand_in, dists))
            except (NotImplementedError, RuntimeError, ValueError):
                return None
            device = self.nodes[self.dist(dists[0]).params[0]].tensor.device
            event_ndim = len(self.dist(dists[0]).template.event_shape) if event else 0
            type_ = dataclasses.replace(type_of(value), device=device, event_ndim=event_ndim)
            name = self.fresh(f"{at.name}_{getattr(form, '__name__', 'expected')}")
            place = {"loc": at.loc, "scope": at.scope}
            self._made[key] = self.add(Expected(name=name, type=type_, form=form, dists=dists, **place))
        return self._made[key]

    def _stand_in(self, ref: Ref) -> Any:
        """The distribution without values."""
        node = self.dist(ref)
        types = (self.nodes[param].tensor for param in node.params)
        return node.template.rebuild([torch.empty(t.shape, dtype=t.dtype, device="meta") for t in types])

    def mean(self, site: Sample) -> Ref | None:
        """The mean of a draw, of its shape; of a Normal the parameter itself, so that it can be followed further."""
        if not CentralMoment(2).known(self.dist(site.dist).template.cls):
            return None
        location = self._slot(site, "loc")
        found = self.expected(mean, site.dist, at=site, event=True) if location is None else location
        return None if found is None else self.expand(found, site.tensor.shape, at=site)

    def central_moment(self, site: Sample, order: int) -> Ref | float | None:
        """The central moment of each element of a draw, of its shape; a number where it is one."""
        form = CentralMoment(order)
        if not form.known(self.dist(site.dist).template.cls):
            return None
        scale = self._slot(site, "scale")
        if scale is None:
            found = self.expected(form, site.dist, at=site, event=True)
            return None if found is None else self.expand(found, site.tensor.shape, at=site)
        if order % 2:
            return 0.0
        power = self.once(aten.pow.Tensor_Scalar, scale, order, at=site)
        factor = math.prod(range(1, order, 2))  # (k - 1)!! sigma^k
        moment = power if factor == 1 else self.once(aten.mul.Scalar, power, factor, at=site)
        return self.expand(moment, site.tensor.shape, at=site)

    def _slot(self, site: Sample, name: str) -> Ref | None:
        """The parameter of a Normal."""
        return self.parameter(site.dist, name) if self.dist(site.dist).template.cls is Normal else None

    def parameter(self, dist: Ref, name: str) -> Ref:
        """The node that holds a parameter, by the name of its slot."""
        node = self.dist(dist)
        names = node.template.names
        return node.params[names.index(name) if name in names else 0]  # one tensor may fill two slots: it has one name

    # -- arithmetic, with numbers left out of the graph ---------------------------------------------------------------
    def once(self, target: Callable[..., Any], *args: Any, at: Node) -> Ref:
        """`op`, or what an equal call gave before."""
        key = (target, repr(args))
        if key not in self._made:
            self._made[key] = self.op(target, *args, at=at)
        return self._made[key]

    def plus(self, a: Ref | float, b: Ref | float, at: Node) -> Ref | float:
        if isinstance(a, Ref) and isinstance(b, Ref):
            return self.once(aten.add.Tensor, a, b, at=at)
        if isinstance(b, Ref):
            a, b = b, a
        if isinstance(a, Ref):
            return a if b == 0 else self.once(aten.add.Scalar, a, b, at=at)
        return a + b  # type: ignore[operator]

    def times(self, a: Ref | float, b: Ref | float, at: Node) -> Ref | float:
        if isinstance(a, Ref) and isinstance(b, Ref):
            return self.once(aten.mul.Tensor, a, b, at=at)
        if isinstance(b, Ref):
            a, b = b, a
        if isinstance(a, Ref):
            return 0.0 if b == 0 else a if b == 1 else self.once(aten.mul.Scalar, a, b, at=at)
        return a * b  # type: ignore[operator]

    def expand(self, ref: Ref, shape: tuple[int, ...], at: Node) -> Ref:
        """``ref`` broadcast to ``shape``."""
        return ref if self.shape(ref) == tuple(shape) else self.once(aten.expand.default, ref, list(shape), at=at)

    def tensor(self, value: Ref | float, like: TensorType, at: Node) -> Ref:
        """``value`` as a tensor of the shape and dtype of ``like``."""
        if not isinstance(value, Ref):
            return self.op(
                aten.full.default, list(like.shape), float(value), at=at, dtype=like.dtype, device=like.device
            )
        if self.nodes[value].tensor.dtype != like.dtype:
            value = self.once(aten.to.dtype, value, like.dtype, at=at)
        return self.expand(value, like.shape, at=at)


def in_order(graph: Graph, draft: Draft, **changes: Any) -> Graph:
    """``graph`` with the nodes of ``draft``, each behind what it reads, and otherwise in the order they had."""
    done: dict[str, Node] = {}
    for first in draft.nodes:
        stack = [first]
        while stack:
            name = stack[-1]
            waits = [ref for ref in draft.nodes[name].inputs if ref not in done]
            if name in done or not waits:
                done.setdefault(stack.pop(), draft.nodes[name])
            else:
                stack.extend(reversed(waits))
    return graph.with_nodes(done.values(), tensors=draft.tensors, **changes)

"""One program for every batch size, from programs of several: what differs between them is a function of the size.

    before   reshape(h, (4, 100, 200)) * 0.01       and   reshape(h, (4, 103, 200)) * 0.00970…
    after    reshape(h, (4, batch, 200)) * (1.0 / batch)

Three programs are compared call by call; what fits a number that differs in two of them must fit it in the third.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, fx

from scg.backends.torch_module import Program


class Differs(Exception):
    """Programs of several batch sizes differ in more than numbers."""


def any_batch(programs: Sequence[Program], sizes: Sequence[int], position: int) -> Program:
    """The program that all of ``programs`` are instances of.

    Args:
        programs: three, of the same model.
        sizes: their batch sizes.
        position: of a tensor leaf of the call that carries the batch size in front.

    Raises:
        Differs: with what keeps them apart.
    """
    first = programs[0]
    if any((p.inputs, p.captured) != (first.inputs, first.captured) for p in programs):
        raise Differs("they read different arguments")
    if position not in first.inputs:
        raise Differs("the argument that carries the batch size is not read")
    module = fx.GraphModule(first.module, first.module.graph, "Surrogate")
    merge = _Merge([module.graph, *(p.module.graph for p in programs[1:])], [p.module for p in programs], sizes)
    merge.run(first.inputs.index(position))
    module.recompile()
    return dataclasses.replace(first, module=module)


class _Merge:
    def __init__(self, graphs: Sequence[fx.Graph], modules: Sequence[fx.GraphModule], sizes: Sequence[int]) -> None:
        self.graph, self.modules, self.sizes = graphs[0], modules, sizes
        self.rows = list(zip(*(list(graph.nodes) for graph in graphs), strict=False))
        if len({len(graph.nodes) for graph in graphs}) > 1:
            raise Differs("they make different calls")
        self.index = [{node: i for i, node in enumerate(graph.nodes)} for graph in graphs]
        self._made: dict[Any, fx.Node] = {}

    def run(self, argument: int) -> None:
        """Rewrites the first graph in place."""
        arguments = [row[0] for row in self.rows if row[0].op == "placeholder"]
        with self.graph.inserting_after(arguments[-1]):
            self.batch = self.graph.call_method("size", (arguments[argument], 0))
        self.batch.name = "batch"
        self.last = self.batch
        for row in self.rows:
            if len({node.op for node in row}) > 1 or not all(_same(node.target, row[0].target) for node in row):
                raise Differs(f"%{row[0].name} is another call")
            if row[0].op == "get_attr":
                self._constant(row)
            elif row[0].op != "placeholder":
                row[0].args = self.merged([node.args for node in row], row[0].name)
                row[0].kwargs = self.merged([dict(node.kwargs) for node in row], row[0].name)
        if not self.batch.users:
            self.graph.erase_node(self.batch)

    def merged(self, items: Sequence[Any], where: str) -> Any:
        first = items[0]
        if isinstance(first, fx.Node):
            if len({table.get(item, -1) for table, item in zip(self.index, items, strict=True)}) > 1:
                raise Differs(f"%{where} reads another value")
            return first
        if isinstance(first, (tuple, list)):
            if len({len(item) for item in items}) > 1:
                raise Differs(f"%{where} takes another number of arguments")
            return type(first)(self.merged(parts, where) for parts in zip(*items, strict=True))
        if isinstance(first, dict):
            if any(item.keys() != first.keys() for item in items):
                raise Differs(f"%{where} takes other arguments")
            return {key: self.merged([item[key] for item in items], where) for key in first}
        if isinstance(first, slice):
            parts = [self.merged([getattr(i, end) for i in items], where) for end in ("start", "stop", "step")]
            return slice(*parts)
        if all(_same(item, first) for item in items):
            return first
        if any(isinstance(item, bool) or not isinstance(item, (int, float)) for item in items):
            raise Differs(f"%{where} takes another argument")
        return self._number(items, where)

    def _number(self, values: Sequence[Any], where: str) -> fx.Node:
        """The node that computes a number from the batch size."""
        key = (type(values[0]), *values)
        if key not in self._made:
            whole = all(isinstance(value, int) for value in values)
            made = self._affine(values) if whole else self._ratio([float(value) for value in values])
            if made is None:
                raise Differs(f"%{where} takes {values[0]}, {values[1]}, … for batches of {self.sizes[0]}, …")
            self._made[key] = made
        return self._made[key]

    def _affine(self, values: Sequence[int]) -> fx.Node | None:
        """``a * batch + b``."""
        (b0, b1), (v0, v1) = self.sizes[:2], values[:2]
        slope = Fraction(v1 - v0, b1 - b0)
        offset = v0 - slope * b0
        if slope.denominator != 1 or any(slope * b + offset != v for b, v in zip(self.sizes, values, strict=True)):
            return None
        scaled = self.batch if slope == 1 else self._call(operator.mul, self.batch, int(slope))
        return scaled if offset == 0 else self._call(operator.add, scaled, int(offset))

    def _ratio(self, values: Sequence[float]) -> fx.Node | None:
        """A constant times, or over, a power of the batch size or what leaving one out makes of it."""
        single = all(map(_is_single, values))
        close = functools.partial(math.isclose, rel_tol=4e-7 if single else 1e-12)
        for powers, shape in _SHAPES.items():
            factors = [value / shape(size) for value, size in zip(values, self.sizes, strict=True)]
            if all(close(factor, factors[0]) for factor in factors):
                near = round(factors[0])
                factor = float(near) if near and close(near, factors[0]) else factors[0]
                up, down = map(self._power, powers)
                scaled: Any = factor if up is None else self._call(operator.mul, factor, up)
                return scaled if down is None else self._call(operator.truediv, scaled, down)
        return None

    def _power(self, terms: tuple[int, ...]) -> fx.Node | None:
        """The product of ``batch - term``."""
        made: fx.Node | None = None
        for term in terms:
            part = self.batch if term == 0 else self._call(operator.sub, self.batch, term)
            made = part if made is None else self._call(operator.mul, made, part)
        return made

    def _call(self, target: Callable[..., Any], *args: Any) -> fx.Node:
        key = (target, *args)
        if key not in self._made:
            with self.graph.inserting_after(self.last):
                self.last = self._made[key] = self.graph.call_function(target, args)
        return self._made[key]

    def _constant(self, row: tuple[fx.Node, ...]) -> None:
        tensors = [getattr(module, str(node.target)) for module, node in zip(self.modules, row, strict=True)]
        first = tensors[0]
        if all(t.shape == first.shape and t.dtype == first.dtype and _equal(t, first) for t in tensors):
            return
        node = row[0]
        if any(t.dtype != first.dtype or t.dim() != first.dim() or t.numel() == 0 for t in tensors):
            raise Differs("it computes other constants")
        shape = self.merged([tuple(t.shape) for t in tensors], node.name)
        options = {"dtype": first.dtype, "device": first.device}
        value = first.flatten()[0].item()
        if all(bool((t == value).all()) for t in tensors):
            target, args = torch.full, (shape, value)
        elif first.dim() == 1 and all(_equal(t, torch.arange(len(t)).to(t)) for t in tensors):
            target, args = torch.arange, (shape[0],)  # type: ignore[assignment]
        else:
            raise Differs("a table that it computes beforehand depends on the batch size")
        with self.graph.inserting_after(self.last):
            made = self.graph.call_function(target, args, options)
        self.last = made
        node.replace_all_uses_with(made)
        self.index[0][made] = self.index[0][node]


_SHAPES: dict[tuple[tuple[int, ...], tuple[int, ...]], Callable[[int], float]] = {
    ((), (0,)): lambda b: 1 / b,
    ((), (1,)): lambda b: 1 / (b - 1),
    ((0,), ()): lambda b: b,
    ((0,), (1,)): lambda b: b / (b - 1),
    ((1,), (0,)): lambda b: (b - 1) / b,
    ((), (0, 0)): lambda b: 1 / b**2,
    ((), (0, 1)): lambda b: 1 / (b * (b - 1)),
}
"""By the terms above and below the line: ``1 / B``, ``1 / (B - 1)``, …"""


def _same(a: Any, b: Any) -> bool:
    """Equal, or leaves of one class with the same settings."""
    if type(a) is not type(b):
        return False
    if isinstance(a, float) and math.isnan(a):
        return math.isnan(b)
    if a is b or bool(a == b):
        return True
    settings = getattr(a, "__dict__", None)
    return callable(a) and bool(settings) and settings == b.__dict__


def _is_single(value: float) -> bool:
    """A number of float32 precision, or one over a number of draws."""
    for draws in range(1, 65):
        whole = value * draws
        if math.isclose(whole, torch.tensor(whole, dtype=torch.float32).item(), rel_tol=1e-15):
            return True
    return False


def _equal(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a, b) or (a.is_floating_point() and torch.allclose(a, b, rtol=0, atol=0, equal_nan=True))

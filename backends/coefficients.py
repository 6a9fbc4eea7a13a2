"""Coefficients of the costs: the gradient of the objective's linear tail at each cut.

    loss = (a.sum() + 0.1 * b.mean())      coefficients: 1 for a, 0.1 / n for every element of b

Where the tail reads nothing but constants they are numbers of compile time; else they are recomputed each step by the
traced gradient of the tail.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from scg.ir import Cost, Graph, Op, Param, Ref, TensorType, map_refs


@dataclass(frozen=True)
class Coefficient:
    """What one cost is multiplied by in the objective: a number, or a tensor of the cost's shape."""

    uniform: float | None = None
    tensor: Tensor | None = None

    @property
    def is_zero(self) -> bool:
        return self.uniform == 0.0


class CoefficientRule:
    """The coefficients of all costs of a graph as a function of the other tensors that the tail reads."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.costs = [cost.name for cost in graph.of(Cost)]
        self.tail = [node for node in graph if node.name in graph.tail and isinstance(node, Op)]
        read = dict.fromkeys(ref for node in self.tail for ref in node.inputs)
        self.others = [ref for ref in read if ref not in graph.tail and ref not in self.costs]
        self.constant = all(isinstance(node := graph[ref], Param) and node.role == "constant" for ref in self.others)
        if self.constant:
            values = [graph.tensors[graph[ref].path] for ref in self.others]  # type: ignore[attr-defined]
            self.fixed = [_compress(g) for g in self._gradients(*values)]
            self.offset = self._offset(*values)
        else:
            self.program = self._trace()

    @property
    def known(self) -> Mapping[str, float | Tensor]:
        """Those that are known when compiling, by cost name."""
        return dict(zip(self.costs, self.fixed, strict=True)) if self.constant else {}

    def __call__(self, look: Callable[[Ref], Tensor], wrap: Callable[[Tensor], Tensor]) -> Mapping[str, Coefficient]:
        """The coefficients by cost name.

        Args:
            look: gives the value of a node the tail reads.
            wrap: makes a compile-time tensor known to the recorder.
        """
        if self.constant:
            return {
                name: Coefficient(uniform=found) if isinstance(found, float) else Coefficient(tensor=wrap(found))
                for name, found in zip(self.costs, self.fixed, strict=True)
            }
        tensors = _Inline(self.program).run(*(look(ref).detach() for ref in self.others))
        return {name: Coefficient(tensor=tensor) for name, tensor in zip(self.costs, tensors, strict=True)}

    def _gradients(self, *others: Tensor) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            leaves = [_zeros(self.graph[name].tensor).requires_grad_() for name in self.costs]
            objective = self._apply(leaves, others)
            if objective is None or not objective.requires_grad:
                return tuple(torch.zeros_like(leaf) for leaf in leaves)
            found = torch.autograd.grad(objective, leaves, allow_unused=True)
        return tuple(torch.zeros_like(x) if g is None else g for g, x in zip(found, leaves, strict=True))

    def _offset(self, *others: Tensor) -> float:
        """The objective where all costs are zero: the part that no sample influences."""
        objective = self._apply([_zeros(self.graph[name].tensor) for name in self.costs], others)
        return 0.0 if objective is None else float(objective)

    def _apply(self, costs: Sequence[Tensor], others: Sequence[Tensor]) -> Tensor | None:
        env: dict[str, Any] = dict(zip(self.costs, costs, strict=True))
        env.update(zip(self.others, others, strict=True))
        for node in self.tail:
            args, kwargs = map_refs(env.__getitem__, (tuple(node.args), dict(node.kwargs)))
            env[node.name] = node.target(*args, **kwargs)
        return env.get(self.graph.objective)

    def _trace(self) -> fx.GraphModule:
        from torch.fx.experimental.proxy_tensor import make_fx

        stand_ins = [_zeros(self.graph[ref].tensor) for ref in self.others]
        program = make_fx(self._gradients)(*stand_ins)
        program.graph.eliminate_dead_code()
        program.recompile()
        return program


class _Inline(fx.Interpreter):
    """Runs a traced gradient inside the program being recorded, on public bindings."""

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        public = getattr(torch, target.overloadpacket.__name__, None) if hasattr(target, "overloadpacket") else None
        if public is not None:
            try:
                return public(*args, **kwargs)
            except TypeError:
                pass
        return target(*args, **kwargs)


def _zeros(type_: TensorType) -> Tensor:
    return torch.zeros(type_.shape, dtype=type_.dtype, device=type_.device)


def _compress(gradient: Tensor) -> float | Tensor:
    if gradient.numel() == 0:
        return 0.0
    first = gradient.flatten()[0]
    return float(first) if bool((gradient == first).all()) else gradient.detach()

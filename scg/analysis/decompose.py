"""Takes an operation outside the table apart into those inside it, by watching it run on fake tensors.

    grid_sampler_2d(x, grid)  ->  arange, floor, where, index, mul, add, ...

Core ATen decompositions are applied where the operation itself is not in the table, and composite operations dissolve.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._decomp import core_aten_decompositions, decomposition_table
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from scg.analysis.rules import Unknown
from scg.ir import Op, Ref, TensorType, map_refs
from scg.operations import lookup, packet_name


def decompose(op: Op, types: Mapping[Ref, TensorType]) -> tuple[list[Op], tuple[Ref | None, ...]]:
    """The operations that ``op`` consists of, in order, and the names of its outputs.

    Raises:
        Unknown: it is one opaque kernel, writes in place, or cannot run without values.
    """
    operator_ = packet_name(op.target) is not None
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad(), torch.device("cpu"):
        fakes = {ref: torch.empty(type_.shape, dtype=type_.dtype) for ref, type_ in types.items()}
        recorder = _Recorder(op.target, fakes)

        def call(*values: Tensor) -> Any:
            table = dict(zip(fakes, values, strict=True))
            return op.target(*map_refs(table.__getitem__, op.args), **map_refs(table.__getitem__, dict(op.kwargs)))

        # A custom autograd.Function cannot run under functionalize.
        run = torch.func.functionalize(call) if operator_ else call
        try:
            with recorder:
                result = run(*fakes.values())
        except Exception as error:  # whatever a foreign kernel raises without values, the answer is the same
            raise Unknown(f"{op.op_name} cannot be taken apart: {error}") from error
    results = [result] if isinstance(result, Tensor) else list(result)
    return recorder.nodes, tuple(recorder.names.get(id(t)) for t in results)


@cache
def _decompositions() -> Mapping[Any, Callable[..., Any]]:
    """All that torch has, the core ones where there are two."""
    return {**decomposition_table, **core_aten_decompositions()}


class _Recorder(TorchDispatchMode):
    """Notes every operation that runs as an `Op`, dissolving those outside the table."""

    def __init__(self, root: Callable[..., Any], inputs: Mapping[Ref, Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.root = root
        self.nodes: list[Op] = []
        self.names = {id(tensor): ref for ref, tensor in inputs.items()}
        self._alive: list[Any] = []  # an id stays unique only while its tensor lives

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func.namespace == "prim":  # type: ignore[attr-defined]
            return func(*args, **kwargs)
        known = lookup(func)
        if known is None or known.kind == "composite" or func is self.root:
            decomposition = _decompositions().get(func)
            with self:
                if decomposition is not None:
                    return decomposition(*args, **kwargs)
                dissolved = func.decompose(*args, **kwargs)  # type: ignore[attr-defined]
            if dissolved is not NotImplemented:
                return dissolved
            raise Unknown(f"no rule for {func}")
        if func._schema.is_mutable:  # type: ignore[attr-defined]
            raise Unknown(f"{func} writes in place")
        result = func(*args, **kwargs)
        if result is not None:  # a bare assertion on metadata
            self._note(func, args, kwargs, result)
        return result

    def _note(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        def named(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            if id(value) not in self.names:
                raise Unknown("reads a tensor from elsewhere")
            return self.names[id(value)]

        name = Ref(f"_{len(self.nodes)}")
        args, kwargs = tree_map(named, args), tree_map(named, kwargs)
        results = [result] if isinstance(result, Tensor) else list(result)
        types = tuple(TensorType(t.dtype, tuple(t.shape)) for t in results)
        multiple = not isinstance(result, Tensor)
        self.nodes.append(Op(name=name, type=types if multiple else types[0], target=func, args=args, kwargs=kwargs))
        self._alive.extend(results)
        for i, tensor in enumerate(results):
            own = Ref(f"{name}.{i}") if multiple else name
            self.names[id(tensor)] = own

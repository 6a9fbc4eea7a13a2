"""fx's recording of ATen operations, with what is noted about each of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.proxy_tensor import ProxyTorchDispatchMode, PythonKeyTracer, get_proxy_slot
from torch.utils._python_dispatch import TorchDispatchMode

from scg import ir
from scg.errors import TraceError
from scg.tracer_frames import user_loc, where


@dataclass
class Fact:
    """What is noted about an fx node beside its operation."""

    loc: str
    scope: str
    variable: str
    no_grad: bool
    live: bool
    """A gradient may flow back from here, to a parameter, an input or a site."""
    made: tuple[type[ir.Node], dict[str, Any]] | None = None
    """Of a node that is no ATen operation: its kind and fields, with fx nodes where the IR has `Ref`s."""
    explicit: bool = False
    """The user chose the node's name."""
    picks: bool = False
    """See `ir.Op.picks`."""


class InnerGradient(TraceError):
    """A gradient taken inside the model reads something that a node computed inside itself."""


class OperationMode(ProxyTorchDispatchMode):
    """fx's recording of ATen operations, with the casts that autocast makes below them written out.

    With ``in_parts``, composite operations are recorded by the operations they consist of: those are what autograd
    saves tensors for.
    """

    def __init__(self, tracer: Tracer, in_parts: bool) -> None:
        super().__init__(tracer, "real", pre_dispatch=True)
        self.tracer: Tracer = tracer
        self.in_parts = in_parts

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten.detach.default and self.tracer.is_copy(args[0]):
            return func(*args)  # autograd unpacks it
        device = _autocast_device(args)
        if device is not None:
            if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), f"Autocast{device.upper()}"):
                dtype = _autocast_dtype(func, args, kwargs)
                with torch.autocast(device, enabled=False), self:
                    cast = partial(_cast, dtype)
                    return func(*map_tensors(cast, args), **map_tensors(cast, kwargs))
        if device is not None or self.in_parts:
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        return super().__torch_dispatch__(func, types, args, kwargs)


class SavedTensors(TorchDispatchMode):
    """Knows the copies that autograd saves for its backward as the tensors they are copies of."""

    def __init__(self, tracer: Tracer) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.tracer = tracer

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.detach.default:  # one of the user's own gets a node after this, which then counts
            self.tracer.copies[id(result)] = result, args[0]
        return result


def _autocast_device(args: Any) -> str | None:
    """The device type of the arguments, where autocast is on for it."""
    if not torch.is_autocast_enabled("cpu") and not torch.is_autocast_enabled("cuda"):
        return None
    found: list[Tensor] = []
    map_tensors(found.append, args)
    device = next((tensor.device.type for tensor in found), None)
    return device if device is not None and torch.is_autocast_enabled(device) else None


def _autocast_dtype(func: Any, args: Any, kwargs: Any) -> torch.dtype | None:
    """The floating dtype in which autocast runs an operation, if it is one for all arguments."""
    with _FirstOperation() as first:
        func(*args, **kwargs)
    return first.dtypes.pop() if len(first.dtypes) == 1 else None


class _FirstOperation(TorchDispatchMode):
    """Notes the floating dtypes that reach the first operation that is not a cast."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self.dtypes and func.namespace == "aten" and func is not torch.ops.aten._to_copy.default:
            found: list[Tensor] = []
            map_tensors(found.append, args)
            self.dtypes = {tensor.dtype for tensor in found if tensor.is_floating_point()}
        return func(*args, **(kwargs or {}))


def _cast(dtype: torch.dtype | None, tensor: Tensor) -> Tensor:
    wanted = dtype is not None and tensor.is_floating_point() and tensor.dtype not in (dtype, torch.float64)
    return tensor.to(dtype) if wanted else tensor


class Captures(Protocol):
    """Whoever knows the user's tensors and modules."""

    modules: dict[int, str]

    def lift(self, tensor: Tensor) -> Tensor: ...

    def node_of(self, tensor: Tensor) -> fx.Node: ...


class Tracer(PythonKeyTracer):
    """fx's tracer of ATen operations, noting for each node where it comes from."""

    def __init__(self, recorder: Captures) -> None:
        super().__init__()
        self.root = nn.Module()
        self.graph = fx.Graph(tracer_cls=type(self))
        self.recorder = recorder
        self.facts: dict[fx.Node, Fact] = {}
        self.copies: dict[int, tuple[Tensor, Tensor]] = {}
        """Tensors that autograd saved, and what they are copies of; see `SavedTensors`."""

    def is_copy(self, tensor: Tensor) -> bool:
        """Whether a tensor is known only as the copy of another."""
        return id(tensor) in self.copies and get_proxy_slot(tensor, self, None) is None

    def create_node(
        self, kind: str, target: Any, args: Any, kwargs: Any, name: str | None = None, type_expr: Any = None
    ) -> fx.Node:
        node = self.graph.create_node(kind, target, args, kwargs, name, type_expr)
        loc, scope, variable = where(self.recorder.modules)
        no_grad = not torch.is_grad_enabled()
        live = not no_grad and target not in _STOPS and any(self.facts[read].live for read in node.all_input_nodes)
        self.facts[node] = Fact(loc, scope, variable, no_grad, live)
        return node

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, FakeTensor):
            if self.is_copy(a):
                return self.recorder.node_of(self.copies[id(a)][1])
            raise InnerGradient(
                f"{user_loc()}: torch.autograd.grad reads a value computed inside a distribution or a custom function, "
                "which are captured whole. Write the density out in tensor code."
            )
        if isinstance(a, Tensor):
            return self.recorder.node_of(self.recorder.lift(a))
        return super().create_arg(a)


_STOPS = frozenset({torch.ops.aten.detach.default, torch.ops.aten.detach_.default})


def map_tensors(fn: Callable[[Tensor], Any], tree: Any) -> Any:
    """``tree`` (nested tuples, lists, dicts) with ``fn`` of its tensors."""
    if isinstance(tree, Tensor):
        return fn(tree)
    if isinstance(tree, tuple):
        items = [map_tensors(fn, item) for item in tree]
        return type(tree)(*items) if hasattr(tree, "_fields") else tuple(items)
    if isinstance(tree, list):
        return [map_tensors(fn, item) for item in tree]
    if isinstance(tree, dict):
        return {key: map_tensors(fn, item) for key, item in tree.items()}
    return tree

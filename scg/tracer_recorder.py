"""Runs the user's function on fake tensors and notes, in program order, everything it does.

Three layers see it: the hook on distributions (`sample`, `rsample`, `log_prob` stay whole), a ``TorchFunctionMode``
(captured tensors become nodes, reads of values are refused, random functions with learned parameters become sites), and
below them fx's ``ProxyTorchDispatchMode`` at the pre-dispatch key (all the rest, as ATen operations).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._ops import HigherOrderOperator
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd import Function
from torch.distributions import Bernoulli, Categorical, Distribution, Normal
from torch.fx.experimental.proxy_tensor import (
    disable_proxy_modes_tracing,
    get_proxy_slot,
    track_tensor_tree,
)
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes

from scg import ir
from scg.capture import Captured
from scg.errors import TraceError
from scg.primitives import OpaqueSpec
from scg.template import Template, flatten
from scg.tracer_frames import assigned_name, name_of, user_frame, user_loc
from scg.tracer_operations import Fact, Tracer, map_tensors


def _nodes_in(tree: Any) -> list[fx.Node]:
    found: list[fx.Node] = []
    fx.node.map_arg(tree, found.append)
    return found


def _made(*_: Any) -> None:
    """fx target of the nodes that are no ATen operation: see `Fact.made`."""


_READS = frozenset(
    {getattr(Tensor, name).__get__ for name in "shape dtype device requires_grad ndim is_leaf layout is_cuda".split()}
    | {Tensor.size, Tensor.dim, Tensor.numel, Tensor.is_floating_point, Tensor.is_complex, Tensor.stride}
    | {Tensor.ndimension, Tensor.nelement, Tensor.is_contiguous, Tensor.__len__, Tensor.__repr__, Tensor.__format__}
)
"""What may be read of a captured tensor without making it part of the graph."""

_FORBIDDEN: dict[Any, str] = {
    Tensor.__bool__: "bool()",
    Tensor.item: ".item()",
    Tensor.tolist: ".tolist()",
    Tensor.numpy: ".numpy()",
    Tensor.__array__: "numpy",
    Tensor.__float__: "float()",
    Tensor.__int__: "int()",
    Tensor.__index__: "index()",
    Tensor.__complex__: "complex()",
    Tensor.__contains__: "in",
    Tensor.register_hook: "register_hook()",
    Tensor.backward: "backward()",
    Tensor.data.__set__: "assigning .data",  # type: ignore[attr-defined]
}
"""Functions that would freeze a value of this call into the graph, or be lost in it."""


class Recorder(TorchFunctionMode):
    """One trace: the fx graph in the making, the captured tensors in it, and the meaning of the primitives."""

    def __init__(self, fake_mode: FakeTensorMode, found: Captured) -> None:
        super().__init__()
        self.fake_mode = fake_mode
        self.paths = {id(tensor): path for path, tensor in found.tensors.items()}
        """The user's names for captured tensors, by id."""
        self.modules = {id(module): path for path, module in found.modules.items()}
        """Paths of captured modules, by id."""
        self.buffers = {id(buffer) for module in found.modules.values() for buffer in module._buffers.values()}
        """ids of captured buffers."""
        self.tracer = Tracer(self)
        self.tensors: dict[str, Tensor] = {}
        """The captured tensors met so far, by path."""
        self._fakes: dict[int, FakeTensor] = {}
        self._dists: dict[int, tuple[Distribution, Template, list[Tensor], fx.Node]] = {}
        self._inside = False

    # -- nodes -----------------------------------------------------------------------------------------------------
    def node_of(self, tensor: Tensor) -> fx.Node:
        """The fx node that computes a fake tensor."""
        slot = get_proxy_slot(tensor, self.tracer, None)
        return slot.proxy.node if slot is not None else self.tracer.create_arg(tensor)

    def nodes_in(self, tree: Any) -> Any:
        """``tree`` with fx nodes where tensors stand."""
        return map_tensors(lambda tensor: self.node_of(self.lift(tensor)), tree)

    def emit(
        self, kind: type[ir.Node], fields: dict[str, Any], fake: Any, name: str, explicit: bool = False
    ) -> fx.Node:
        """Appends a node that is no ATen operation; ``fake`` (tensors, or nothing) is what it computes."""
        node = self.tracer.create_node("call_function", _made, (), {}, name)
        fact = self.tracer.facts[node]
        fact.made, fact.explicit = (kind, fields), explicit
        fact.live = self._starts_gradient(kind, fields, fact)
        node.meta["hint"] = name
        with disable_proxy_modes_tracing():
            track_tensor_tree(fake, fx.Proxy(node, self.tracer), constant=None, tracer=self.tracer)
        return node

    def _starts_gradient(self, kind: type[ir.Node], fields: dict[str, Any], fact: Fact) -> bool:
        if kind in (ir.Input, ir.Param):
            return bool(fields["requires_grad"])
        if kind is ir.Sample:
            return not fields["data"]
        if kind is ir.Opaque or (fact.no_grad and kind is not ir.Dist):
            return False
        return any(self.tracer.facts[node].live for node in _nodes_in(fields))

    def is_live(self, tensor: Any) -> bool:
        """Whether a gradient may flow back from a tensor."""
        return isinstance(tensor, Tensor) and self.tracer.facts[self.node_of(self.lift(tensor))].live

    def lift(self, tensor: Tensor) -> Tensor:
        """The fake of a captured tensor; its node is made the first time."""
        if isinstance(tensor, FakeTensor):
            return tensor
        if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
            raise TraceError(f"{user_loc()}: torch.func transforms (vmap, grad, jvp) are not captured.")
        if id(tensor) not in self._fakes:
            kind = "parameter" if isinstance(tensor, nn.Parameter) else "constant"
            path = self.paths.get(id(tensor)) or f"{kind}_{len(self.tensors)}"
            self.tensors[path] = tensor  # keeps it alive, so that its id stays its own
            with self._quiet():
                fake = self.fake_mode.from_tensor(tensor, static_shapes=True)
            role = "buffer" if id(tensor) in self.buffers else kind
            self.emit(ir.Param, {"path": path, "role": role, "requires_grad": tensor.requires_grad}, fake, path)
            self._fakes[id(tensor)] = fake
        return self._fakes[id(tensor)]

    def has(self, tensor: Any) -> bool:
        """Whether a captured tensor is part of the graph."""
        return id(tensor) in self._fakes

    def add_input(self, tensor: Tensor, path: str, position: int) -> Tensor:
        """The fake of an argument of the call, with its node."""
        with self._quiet():
            fake = self.fake_mode.from_tensor(tensor, static_shapes=True)
        fields = {"path": path, "position": position, "requires_grad": tensor.requires_grad}
        node = self.emit(ir.Input, fields, fake, path.replace(".", "_"))
        self.tracer.facts[node].loc = ""
        return fake

    @contextmanager
    def _quiet(self) -> Iterator[None]:
        """Runs on fake tensors unseen."""
        was, self._inside = self._inside, True
        with ExitStack() as stack:
            stack.enter_context(torch._C.DisableTorchFunction())
            stack.enter_context(disable_proxy_modes_tracing())
            stack.enter_context(torch._C._ExcludeDispatchKeyGuard(_PRE_DISPATCH))
            for device in filter(torch.is_autocast_enabled, ("cpu", "cuda")):  # acts on operations, not inside of nodes
                stack.enter_context(torch.autocast(device, enabled=False))
            try:
                yield
            finally:
                self._inside = was

    # -- distributions ---------------------------------------------------------------------------------------------
    def on_attribute(self, dist: Distribution, name: str) -> Any:
        """Hook on distributions: draws and densities become nodes, argument checks are off."""
        if name == "_validate_args":
            return False
        attribute = object.__getattribute__(dist, name)
        if self._inside:
            return attribute
        if name in ("sample", "rsample"):
            return partial(self._draw_method, dist, name)
        if name == "log_prob":
            return partial(self._log_prob, dist)
        return attribute

    def _draw_method(self, dist: Distribution, method: str, sample_shape: Any = ()) -> Tensor:
        return self._draw(dist, method, tuple(sample_shape))

    def _draw(
        self,
        dist: Distribution,
        method: str,
        sample_shape: tuple[int, ...] = (),
        name: str | None = None,
        estimator: Any = None,
        value: Tensor | None = None,
    ) -> Tensor:
        template, fakes, node = self._dist(dist)
        event_ndim = len(template.event_shape)
        if value is not None:
            value = self.lift(value)
            with self._quiet():
                fake = value.detach()
        else:
            fake = self._fake_draw(dist, template, fakes, method, sample_shape)
        fields = {
            "dist": node,
            "method": method,
            "sample_shape": sample_shape,
            "value": None if value is None else self.node_of(value),
            "data": not torch.is_grad_enabled(),
            "requested": estimator,
        }
        hint = name or assigned_name(user_frame()) or "site_0"
        made = self.emit(ir.Sample, fields, fake, hint, explicit=name is not None)
        made.meta["event_ndim"] = event_ndim
        return fake

    def _fake_draw(
        self, dist: Distribution, template: Template, fakes: list[Tensor], method: str, sample_shape: tuple[int, ...]
    ) -> Tensor:
        with self._quiet():
            rebuilt = template.rebuild(fakes)  # not the user's object: lazy properties would stay in it
            try:
                fake: Tensor = getattr(rebuilt, method)(torch.Size(sample_shape)).contiguous()  # one_hot's fake is not
            except NotImplementedError as error:
                raise TraceError(f"{user_loc()}: {template.family} has no {method}().") from error
            except torch._subclasses.fake_tensor.DataDependentOutputException:  # rejection samplers
                floats = [f for f in fakes if f.is_floating_point()]
                fake = torch.empty(
                    dist._extended_shape(torch.Size(sample_shape)), dtype=floats[0].dtype, device=floats[0].device
                )
                fake = fake.requires_grad_(method == "rsample" and any(f.requires_grad for f in floats))
        return fake

    def _log_prob(self, dist: Distribution, value: Tensor) -> Tensor:
        template, fakes, node = self._dist(dist)
        value = self.lift(value) if isinstance(value, Tensor) else torch.as_tensor(value)
        with self._quiet():
            fake = template.rebuild(fakes).log_prob(value)
        self.emit(ir.LogProb, {"dist": node, "value": self.node_of(value)}, fake, "log_prob")
        return fake

    def _dist(self, dist: Distribution) -> tuple[Template, list[Tensor], fx.Node]:
        """The node of a distribution object: one an object, made when it is first drawn from or scored."""
        if id(dist) not in self._dists:
            was, self._inside = self._inside, True
            try:
                template, tensors = flatten(dist)
            finally:
                self._inside = was
            fakes = [self.lift(tensor) for tensor in tensors]
            params = tuple(self.node_of(fake) for fake in fakes)
            name = name_of(dist, user_frame()) or template.family.lower()
            node = self.emit(ir.Dist, {"template": template, "params": params}, None, name)
            self._dists[id(dist)] = dist, template, fakes, node
        return self._dists[id(dist)][1:]

    # -- primitives ------------------------------------------------------------------------------------------------
    def sample(self, dist: Distribution, name: str | None, estimator: Any, value: Tensor | None) -> Tensor:
        return self._draw(dist, "sample", (), name, estimator, value)

    def cost(self, value: Tensor, name: str) -> Tensor:
        value = self.lift(value)
        with self._quiet():
            fake = value.view_as(value)
        self.emit(ir.Cost, {"value": self.node_of(value), "label": name, "declared": True}, fake, name, explicit=True)
        return fake

    def depends(self, value: Tensor, on: Tensor, dims: tuple[str, ...]) -> Tensor:
        value, site = self.lift(value), self.node_of(self.lift(on))
        made = self.tracer.facts[site].made
        if made is None or made[0] is not ir.Sample:
            raise TraceError(f"{user_loc()}: depends(on=…) takes the value that sample() returned, unchanged.")
        with self._quiet():
            fake = value.view_as(value)
        self.emit(ir.Depends, {"value": self.node_of(value), "on": site, "dims": dims}, fake, "depends")
        return fake

    def multisample(self, value: Tensor, alpha: float) -> Tensor:
        value = self.lift(value)
        with self._quiet():
            fake = value.view_as(value)
        self.emit(ir.Bound, {"value": self.node_of(value), "alpha": alpha}, fake, "bound")
        return fake

    def logmarginal(self, value: Tensor, over: tuple[str, ...]) -> Tensor:
        value = self.lift(value)
        with self._quiet():
            fake = value.view_as(value)
        self.emit(ir.Marginal, {"value": self.node_of(value), "over": over}, fake, "logmarginal")
        return fake

    def opaque(self, spec: OpaqueSpec, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        bound = inspect.signature(spec.fn).bind(*args, **kwargs)
        bound.apply_defaults()
        if bound.kwargs:
            raise TraceError(f"{user_loc()}: an opaque function takes no keyword-only arguments: {spec.fn.__name__}.")
        lifted = map_tensors(self.lift, bound.args)
        with self._quiet():
            fake = opaque_result(spec, lifted)
        fields = {
            "fn": spec.fn, "args": self.nodes_in(lifted), "batch_dims": spec.batch_dims,
            "pure": spec.pure, "shape": spec.shape, "dtype": spec.dtype,
        }  # fmt: skip
        self.emit(ir.Opaque, fields, fake, spec.fn.__name__)
        return fake

    def on_function(self, function: type[Function], args: tuple[Any, ...]) -> Any:
        """A custom `torch.autograd.Function`: one node, so that it keeps its own backward."""
        if self._inside or function.__module__.partition(".")[0] == "torch":
            return function.apply(*args)
        lifted = map_tensors(self.lift, args)
        with self._quiet():
            fake = function.apply(*lifted)
        outputs = fake if isinstance(fake, tuple) else (fake,)
        if any(output is argument for output in outputs for argument in lifted if isinstance(output, Tensor)):
            raise TraceError(f"{user_loc()}: {function.__name__} writes to its argument: return a new tensor.")
        fields = {"target": function.apply, "args": self.nodes_in(lifted), "kwargs": {}}
        self.emit(ir.Op, fields, fake, function.__name__)
        return fake

    # -- torch functions -------------------------------------------------------------------------------------------
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._inside or func in _READS:
            return func(*args, **kwargs)
        if func in _FORBIDDEN:
            return self._refuse(func, *args, **kwargs)
        if isinstance(func, HigherOrderOperator):
            raise TraceError(
                f"{user_loc()}: torch.{func.name()} is not captured: compute both branches and use torch.where, or "
                "write the loop in Python."
            )
        if torch._C._functorch.maybe_current_level() is not None:
            raise TraceError(f"{user_loc()}: torch.func transforms (vmap, grad, jvp) are not captured.")
        args, kwargs = map_tensors(self.lift, args), map_tensors(self.lift, kwargs)
        if func == _DATA:
            return args[0].detach()
        if func in _CONSTRUCTORS and isinstance(args[0], (list, tuple)) and _nodes_in(self.nodes_in(args[0])):
            raise TraceError(f"{user_loc()}: {func.__name__}() reads the values of traced tensors: use torch.stack().")
        if func is Tensor.__getitem__:
            tensor, rest = self._picked(*args)
            return tensor if rest == () else tensor[rest]
        if func is Tensor.__setitem__:
            tensor, rest = self._picked(*args[:2])
            tensor[... if rest == () else rest] = args[2]
            return None
        if kwargs.get("generator") is not None:
            raise TraceError(
                f"{user_loc()}: {func.__name__}() takes no generator= here: a compiled program draws from torch's own. "
                "Leave it out; torch.manual_seed makes the draws the same again."
            )
        if func in _RANDOM and any(map(self.is_live, (*args, *kwargs.values()))):
            return _RANDOM[func](self, *args, **kwargs)
        return func(*args, **kwargs)

    def _picked(self, tensor: Tensor, index: Any) -> tuple[Tensor, Any]:
        """``tensor`` at the integer scalars of ``index``, of which torch would read the values; and what else it says.

        They are looked up as tensors. What torch would hand out is a view: the node says so.
        """
        items = list(index) if isinstance(index, tuple) else [index]
        if not any(map(_is_scalar_index, items)):
            return tensor, index
        taken = [_taken(item) for item in items]
        if any(item is Ellipsis for item in items):
            at = next(i for i, item in enumerate(items) if item is Ellipsis)
            taken[at] = tensor.ndim - sum(taken)
        for position in reversed(range(len(items))):  # from the right, so that the dims to the left keep their places
            if _is_scalar_index(items[position]):
                dim = sum(taken[:position])
                row = torch.ops.aten.index.Tensor(tensor, [None] * dim + [items[position].reshape(1)])
                self.tracer.facts[self.node_of(row)].picks = True
                tensor = row.squeeze(dim)
                del items[position]
        return tensor, tuple(items)

    def _bernoulli(self, input: Tensor, p: Any = None, *, generator: Any = None, out: Any = None) -> Tensor:
        if p is not None:  # the values of `input` play no part
            return torch.bernoulli(input, p)
        _refuse_out(out)
        return self._draw(Bernoulli(probs=input), "sample")

    def _multinomial(
        self, input: Tensor, num_samples: int, replacement: bool = False, *, generator: Any = None, out: Any = None
    ) -> Tensor:
        _refuse_out(out)
        if num_samples == 1:
            return self._draw(Categorical(probs=input), "sample").unsqueeze(-1)
        if not replacement:
            raise TraceError(
                f"{user_loc()}: torch.multinomial without replacement has no density that scg knows. "
                "Draw with replacement=True, or one at a time."
            )
        return self._draw(Categorical(probs=input), "sample", (num_samples,)).movedim(0, -1)

    def _normal(self, mean: Any, std: Any = 1.0, size: Any = None, *, generator: Any = None, out: Any = None) -> Tensor:
        _refuse_out(out)
        return self._draw(Normal(mean, std), "sample", () if size is None else tuple(size))

    def _refuse(self, func: Any, tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Raises, unless the value is a literal of the program (``torch.tensor(2.0).item()``)."""
        literal = getattr(tensor, "constant", None)
        if literal is not None and func not in _WAYS_OUT:
            with _disable_current_modes():
                return func(literal, *args, **kwargs)
        name = self.paths.get(id(tensor))
        value = f"the value of {name}" if name else "a tensor's value"
        done = f"{_FORBIDDEN[func]} needs {value} while the model is traced"
        way_out = _BRANCH if func is Tensor.__bool__ else _WAYS_OUT.get(func, _FROZEN)
        raise TraceError(f"{user_loc()}: {_FORBIDDEN[func] if func in _WAYS_OUT else done}. {way_out}")


_RANDOM: dict[Any, Callable[..., Tensor]] = {
    torch.bernoulli: Recorder._bernoulli,
    Tensor.bernoulli: Recorder._bernoulli,
    torch.multinomial: Recorder._multinomial,
    Tensor.multinomial: Recorder._multinomial,
    torch.normal: Recorder._normal,
}
"""Random functions that are sites where their parameters are learned, and noise elsewhere."""

_CONSTRUCTORS = frozenset({torch.tensor, torch.as_tensor, torch.asarray})
_PRE_DISPATCH = torch._C.DispatchKeySet(torch._C.DispatchKey.PreDispatch)
_DATA = Tensor.data.__get__  # type: ignore[attr-defined]


_FROZEN = (
    "It would be frozen as it is in this call: keep it a tensor, pass it as a plain Python argument, or wrap the "
    "Python code that needs it in @scg.opaque."
)
_BRANCH = (
    "The branch would be frozen as it goes in this call: use torch.where or a mask for `if` and `while`; move an "
    "`assert torch.isfinite(z).all()` out of the model, or compile with debug=True to check every site at run time."
)
_WAYS_OUT: dict[Any, str] = {
    Tensor.register_hook: "Gradient hooks are not captured: hook the parameters outside of the model.",
    Tensor.backward: "The model returns the loss; call backward() on it outside, or use torch.autograd.grad inside.",
    Tensor.data.__set__: "Use copy_() under torch.no_grad().",  # type: ignore[attr-defined]
}
"""Of what cannot be captured even where no value is read."""


def opaque_result(spec: OpaqueSpec, args: tuple[Any, ...]) -> Any:
    """Fake outputs of an opaque call."""
    found: list[Tensor] = []
    map_tensors(found.append, args)
    if not found and (spec.shape is None or spec.dtype is None):
        raise TraceError(f"{user_loc()}: opaque {spec.fn.__name__} has no tensor argument: give it shape= and dtype=.")
    several = [option for option in (spec.shape, spec.dtype) if isinstance(option, tuple)]
    count = len(several[0]) if several else 1
    shapes: tuple[Any, ...] = spec.shape if isinstance(spec.shape, tuple) else (spec.shape,) * count
    dtypes: tuple[Any, ...] = spec.dtype if isinstance(spec.dtype, tuple) else (spec.dtype,) * count
    outputs = tuple(
        torch.empty(
            tuple(found[0].shape if shape is None else shape(*args)),
            dtype=dtype or found[0].dtype,
            device=found[0].device if found else None,
        )
        for shape, dtype in zip(shapes, dtypes, strict=True)
    )
    return outputs if several else outputs[0]


def _refuse_out(out: Any) -> None:
    if out is not None:
        raise TraceError(f"{user_loc()}: a draw with learned parameters takes no out=.")


def _is_scalar_index(item: Any) -> bool:
    whole = isinstance(item, Tensor) and not item.is_floating_point() and item.dtype != torch.bool
    return whole and item.ndim == 0


def _taken(item: Any) -> int:
    """How many dims of the indexed tensor one item of the index takes."""
    if item is None or item is Ellipsis:
        return 0
    return item.ndim if isinstance(item, Tensor) and item.dtype == torch.bool else 1

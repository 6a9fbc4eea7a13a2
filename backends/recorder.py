"""Records what torch functions do to fake tensors as one flat ``torch.fx`` graph.

The interpreter in `scg.backends.lowering` is ordinary tensor code; run under a `Recorder` it leaves behind exactly the
calls it made (the first Futamura projection), bound to the public ``torch.*`` functions and with equal expressions
shared. Nothing of the interpreter is left at run time.
"""

from __future__ import annotations

import operator
import types
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from scg.backends.narrowing import Narrowing
from scg.backends.peephole import Peephole
from scg.errors import LoweringError


@contextmanager
def compile_time() -> Iterator[None]:
    """Inside, tensors are real and nothing is recorded: for what is computed once, before the program runs."""
    with torch._C.DisableTorchFunction(), _disable_current_modes():
        yield


_RANDOM = {
    "bernoulli", "multinomial", "normal", "rand", "randn", "randint", "randperm", "rand_like", "randn_like",
    "randint_like", "poisson", "binomial", "_standard_gamma", "_sample_dirichlet", "dropout", "alpha_dropout",
    "feature_dropout", "feature_alpha_dropout", "rrelu", "rrelu_with_noise", "scaled_dot_product_attention", "gru",
    "lstm", "rnn_tanh", "rnn_relu", "native_dropout", "empty", "empty_like", "new_empty", "new", "batch_norm",
    "fractional_max_pool2d", "fractional_max_pool3d",
}  # fmt: skip
"""Functions of which two equal calls must stay two calls: they draw, or hand out fresh memory, or update a buffer."""

_RESERVED = {"torch", "device", "inf", "nan", "NoneType", "self"}
"""Names that generated code reads: no argument may take one."""

_SAME_IF_SHAPE = {"reshape", "view", "expand", "broadcast_to", "expand_as", "contiguous"}
"""Functions that do nothing when the shape stays."""

_READABLE: dict[str, Callable[..., Any]] = {
    "add": operator.add, "__radd__": operator.add, "sub": operator.sub, "mul": operator.mul, "__rmul__": operator.mul,
    "div": operator.truediv, "__truediv__": operator.truediv, "neg": operator.neg, "__getitem__": operator.getitem,
    "gt": operator.gt, "lt": operator.lt, "ge": operator.ge, "le": operator.le, "matmul": operator.matmul,
    "__pow__": operator.pow, "pow": operator.pow,
}  # fmt: skip
"""Tensor methods written as Python operators in the generated code."""


BUILT_IN = (types.BuiltinFunctionType, types.MethodDescriptorType, types.WrapperDescriptorType)
"""Types of functions whose values are the same whatever has a gradient."""

_PYTHON_METHODS = {func: name for name, func in vars(Tensor).items() if isinstance(func, types.FunctionType)}
"""Tensor methods written in Python, and their names."""


def _how_to_call(func: Callable[..., Any], with_kwargs: bool) -> tuple[str, Any]:
    """The fx opcode and target that read best for ``func``."""
    method = isinstance(func, (types.MethodDescriptorType, types.WrapperDescriptorType))
    name = _PYTHON_METHODS.get(func) if isinstance(func, types.FunctionType) else func.__name__ if method else None
    if name is None:
        return "call_function", func
    if name in _READABLE and not with_kwargs:
        return "call_function", _READABLE[name]
    return "call_method", name


def _function_name(func: Callable[..., Any]) -> str:
    name = getattr(func, "__name__", "")
    return getattr(func, "_opname", name) if isinstance(func, torch._ops.OpOverload) else name


def _is_shared(func: Callable[..., Any]) -> bool:
    """May two equal calls become one? Not those of leaves that may draw."""
    return getattr(func, "repeatable", True)


class InPlaceError(LoweringError):
    """What is recorded writes into a tensor, which the flat graph cannot."""


class Recorder(TorchFunctionMode):
    """While active, every torch function call on tensors is run on fakes and appended to `graph`."""

    def __init__(self, fake_mode: FakeTensorMode, *, narrows: bool = False, eager: bool = False) -> None:
        super().__init__()
        self.eager = eager
        """Whether the program runs call by call: comparisons draw faster there, and constants are made once."""
        self.narrowing = Narrowing(self._call) if narrows else None
        """Which tensors are expanded, where that is looked after."""
        self.fake_mode = fake_mode
        self.graph = fx.Graph()
        self.graph._graph_namespace.create_name("torch", None)  # fx takes care of all other names that it writes
        self.constants: dict[str, Tensor] = {}
        self.hint = ""
        self._nodes: dict[int, fx.Node] = {}
        self._alive: list[Tensor] = []  # ids are only unique among living objects
        self._shared: dict[Hashable, Any] = {}
        self._detached: dict[fx.Node, Tensor] = {}
        """What a result is detached from."""
        self._handed_out: set[int] = set()
        """Ids of results that stand for more than one call."""
        self._constant_of: dict[int, Tensor] = {}
        self._placeholders: list[fx.Node] = []
        self.peephole = Peephole(self)
        self.externals: dict[int, str] = {}
        """Names of real tensors that are to become arguments when they are first met (estimator state), by id."""
        self.met: list[Tensor] = []
        """The externals met, in the order of their placeholders."""

    # -- inputs ---------------------------------------------------------------------------------------------------
    def placeholder(self, name: str, tensor: Tensor) -> Tensor:
        """A fake stand-in for ``tensor``, an argument of the recorded program called ``name``."""
        fake = self.fake_mode.from_tensor(tensor, static_shapes=True)
        if isinstance(tensor, torch.nn.Parameter) or tensor.requires_grad:
            fake.requires_grad_(tensor.requires_grad)
        anchor = self._placeholders[-1] if self._placeholders else self.graph._root
        taken = _RESERVED | {str(node.target) for node in self._placeholders}
        with self.graph.inserting_after(anchor):
            self._placeholders.append(self.graph.placeholder(_unused(name, taken)))
        return self._track(fake, self._placeholders[-1])

    def constant(self, tensor: Tensor) -> Tensor:
        """A fake stand-in for a real tensor fixed at compile time."""
        known = self._constant_of.get(id(tensor))
        if known is not None:
            return known
        if id(tensor) in self.externals:
            with compile_time():
                fake = self.placeholder(self.externals[id(tensor)], tensor)
            self.met.append(tensor)
            self._constant_of[id(tensor)] = fake
            return fake
        name = f"const_{len(self.constants)}"
        self.constants[name] = tensor
        with compile_time():
            fake = self.fake_mode.from_tensor(tensor.detach(), static_shapes=True)
        self._constant_of[id(tensor)] = self._track(fake, self.graph.get_attr(name))
        self._alive.append(tensor)
        return fake

    def value_of(self, fake: Tensor) -> Tensor | None:
        """What a constant of the program holds; None of anything else."""
        node = self._nodes.get(id(fake))
        return self.constants[str(node.target)] if node is not None and node.op == "get_attr" else None

    def node(self, tensor: Tensor) -> fx.Node:
        """The fx node that holds ``tensor``."""
        found = self._nodes.get(id(tensor))
        if found is None:
            found = self._nodes[id(self.constant(tensor))]
        return found

    @contextmanager
    def named(self, hint: str) -> Iterator[None]:
        """Names the calls recorded inside after the graph node they compute."""
        before, self.hint = self.hint, hint
        try:
            yield
        finally:
            self.hint = before

    def handed_out(self, tensor: Tensor) -> Tensor:
        """Takes note that ``tensor`` is the result of one more call."""
        self._handed_out.add(id(tensor))
        return tensor

    def within(self, most: int, make: Callable[[], Tensor]) -> Tensor | None:
        """What ``make`` returns, if nothing that it takes holds more bytes; else None, and its calls will not run."""
        before = set(self.graph.nodes)
        made = make()
        needed, waiting = set[fx.Node](), [self.node(made)]
        while waiting:
            if (node := waiting.pop()) not in before and node not in needed:
                needed.add(node)
                waiting += node.all_input_nodes
        sizes = (node.meta["fake"].untyped_storage().nbytes() for node in needed if "fake" in node.meta)
        if max(sizes, default=0) <= most:
            return made
        for node in self.graph.nodes:
            if node not in before:
                node.meta["effect"] = False
        return None

    # -- recording ------------------------------------------------------------------------------------------------
    def __torch_function__(
        self, func: Callable[..., Any], types_: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = _function_name(func)
        if name == "__get__":
            return self._property(func, args)
        if name == "__setitem__" and _is_masked_fill(*args) and self._is_own(args[0]):
            self._nodes[id(args[0])] = self.node(self.call(torch.where, args[1], args[2], args[0]))
            self._forget(args[0])
            return None
        if name == "__setitem__":
            raise InPlaceError("an estimator or distribution writes into a tensor; use torch.where or scatter instead")
        if name == "new" and len(args) == 2 and isinstance(args[1], torch.Size):
            func = torch.Tensor.new_empty  # in the generated code a size is a tuple, which `new` takes for the data
        if func is torch.functional.broadcast_tensors:
            shape = torch.broadcast_shapes(*(tensor.shape for tensor in args))
            return tuple(self.call(Tensor.expand, tensor, tuple(shape)) for tensor in args)
        plain = [key for key, value in kwargs.items() if value is not None]
        if func is F.binary_cross_entropy_with_logits and plain == ["reduction"] and kwargs["reduction"] == "none":
            return self.call(torch.binary_cross_entropy_with_logits, *args, None, None, 0)  # the built-in it calls
        return self.call(func, *args, **kwargs)

    def on_function(self, function: type[torch.autograd.Function], args: tuple[Any, ...]) -> Any:
        """A custom autograd function met in estimator or distribution code: one call, with its own backward."""
        return self.call(CustomFunction(function), *args)

    def call(self, func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Runs ``func`` on fakes and records it as one call, whatever it does inside."""
        if self.narrowing is None or not torch.is_grad_enabled():
            return self._call(func, *args, **kwargs)
        name = _function_name(func)
        found = self.narrowing.attempt(func, name, args, kwargs)
        if found is not None:
            return found
        out = self._call(func, *args, **kwargs)
        if name == "expand" and out is not args[0]:
            self.narrowing.expanded(out, args[0])
        return out

    def _call(self, func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        flat, spec = tree_flatten((args, kwargs))
        flat = [self.constant(a) if isinstance(a, Tensor) and not isinstance(a, FakeTensor) else a for a in flat]
        if not torch.is_grad_enabled():  # the flat graph has no no_grad regions: stop the gradient at the door
            flat = [self._stopped(a) if isinstance(a, Tensor) else a for a in flat]
        args, kwargs = tree_unflatten(flat, spec)
        name = _function_name(func)
        if (simpler := self.peephole.simpler(func, name, args, kwargs)) is not None:
            return simpler
        in_place = name.endswith("_") and not name.endswith("__")
        key = None if in_place or name in _RANDOM or not _is_shared(func) else self._key(func, flat, spec)
        if key is not None and key in self._shared:
            self._handed_out.add(id(self._shared[key]))
            return self._shared[key]
        if key is not None and (made := self._made_with_gradient(func, flat, spec)) is not None:
            self._handed_out.add(id(made))
            return self._stopped(made)
        with torch._C.DisableTorchFunction():
            out = getattr(func, "fake", func)(*args, **kwargs)
        if not _has_tensor(out):
            return out
        if isinstance(out, Tensor) and id(out) in self._nodes and not in_place:
            return out  # the function handed its argument back
        if name in _SAME_IF_SHAPE and out.shape == args[0].shape:
            return args[0]
        node_args, node_kwargs = tree_map_only(Tensor, self.node, (args, kwargs))
        op, target = _how_to_call(func, bool(node_kwargs))
        node = self.graph.create_node(op, target, node_args, node_kwargs, name=self.hint or None)
        if in_place:
            node.meta["effect"] = True
            self._nodes[id(out)] = node
            self._forget(out)
            return out
        node.meta["effect"] = getattr(func, "effect", False) or (name == "batch_norm" and bool(args[5]))
        out = self._track_all(out, node)
        self.peephole.recorded(func, name, args, kwargs, out)
        if key is not None:
            self._shared[key] = out
        if name == "detach":
            self._detached[node] = args[0]
        return out

    def _property(self, func: Any, args: Any) -> Any:
        with torch._C.DisableTorchFunction():
            out = func(*args)
        name = func.__self__.__name__
        if isinstance(out, Tensor) and name in ("T", "mT", "H", "mH", "real", "imag"):
            return self.call(getattr, args[0], name)
        return self.call(torch.Tensor.detach, args[0]) if name == "data" else out

    def _is_own(self, tensor: Tensor) -> bool:
        """Whether ``tensor`` is a result without views that one call alone was given."""
        storage = tensor.untyped_storage()._cdata
        others = (item for item in self._alive if isinstance(item, FakeTensor) and item is not tensor)
        if self.node(tensor).op in ("placeholder", "get_attr") or id(tensor) in self._handed_out:
            return False
        if any(item.untyped_storage()._cdata == storage for item in others):
            return False
        return True

    def _forget(self, tensor: Tensor) -> None:
        """Takes note that ``tensor`` was written into: it is no longer the result of the call that made it."""
        self._shared = {key: out for key, out in self._shared.items() if out is not tensor}
        self.peephole.forget(tensor)

    def _stopped(self, tensor: Tensor) -> Tensor:
        if not tensor.requires_grad:
            return tensor
        with torch.enable_grad():
            return self.call(torch.Tensor.detach, tensor)  # type: ignore[no-any-return]

    def _key(self, func: Callable[..., Any], flat: list[Any], spec: Any) -> Hashable | None:
        parts: list[Hashable] = [func, str(spec)]
        for item in flat:
            if isinstance(item, Tensor):
                parts.append(self.node(item))
            else:
                if isinstance(item, slice):
                    item = (item.start, item.stop, item.step)
                try:
                    hash(item)
                except TypeError:
                    return None
                parts.append((type(item), item))
        return tuple(parts)

    def _made_with_gradient(self, func: Callable[..., Any], flat: list[Any], spec: Any) -> Tensor | None:
        """The result of an equal call on what its arguments are detached from: its value is the same."""
        if not isinstance(func, BUILT_IN) or any(isinstance(item, Tensor) and item.requires_grad for item in flat):
            return None
        sources = [self._detached.get(self.node(item), item) if isinstance(item, Tensor) else item for item in flat]
        if all(source is item for source, item in zip(sources, flat, strict=True)):
            return None
        made = self._shared.get(self._key(func, sources, spec))
        if not isinstance(made, Tensor):
            return None
        memory = made.untyped_storage()._cdata
        view = any(isinstance(item, Tensor) and item.untyped_storage()._cdata == memory for item in sources)
        return None if view else made  # of a view there is nothing to share

    def _track(self, fake: Tensor, node: fx.Node) -> Tensor:
        self._nodes[id(fake)] = node
        self._alive.append(fake)
        node.meta["fake"] = fake
        return fake

    def _track_all(self, out: Any, node: fx.Node) -> Any:
        if isinstance(out, Tensor):
            return out if id(out) in self._nodes else self._track(out, node)  # an argument may come back among others
        if isinstance(out, (tuple, list)):
            for i, item in enumerate(out):
                if _has_tensor(item):
                    self._track_all(item, self.graph.call_function(operator.getitem, (node, i)))
        return out


@dataclass(frozen=True)
class CustomFunction:
    """A ``torch.autograd.Function`` as one call of the generated code."""

    function: type[torch.autograd.Function]
    repeatable: ClassVar[bool] = False  # it may draw
    __module__ = __name__

    @property
    def __name__(self) -> str:
        return self.function.__name__

    def __call__(self, *args: Any) -> Any:
        return self.function.apply(*args)


def _unused(name: str, taken: set[str]) -> str:
    """``name``, with underscores behind it until nothing else is called so: ``a.b`` and ``a_b`` are both ``a_b``."""
    while name in taken:
        name += "_"
    return name


def _is_masked_fill(target: Tensor, mask: Any, value: Any) -> bool:
    """``target[mask] = number``"""
    is_mask = isinstance(mask, Tensor) and mask.dtype == torch.bool and mask.shape == target.shape
    return is_mask and isinstance(value, (int, float))


def _has_tensor(out: Any) -> bool:
    return any(isinstance(leaf, Tensor) for leaf in tree_flatten(out)[0])


def active_recorder() -> Recorder | None:
    """The recorder in force, if any."""
    stack = torch.overrides._get_current_function_mode_stack()
    return next((mode for mode in reversed(stack) if isinstance(mode, Recorder)), None)


def record_call(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Calls ``function`` as one leaf: under a recorder it becomes one call of the generated code."""
    recorder = active_recorder()
    return function(*args, **kwargs) if recorder is None else recorder.call(function, *args, **kwargs)


def narrowest(tensor: Tensor) -> Tensor:
    """What ``tensor`` is known to be an expansion of, in a program that looks after it; else itself."""
    recorder = active_recorder()
    return tensor if recorder is None or recorder.narrowing is None else recorder.narrowing(tensor)


def summed(tensor: Tensor) -> Tensor:
    """What ``tensor`` is known to be a sum of, along some dims; else itself."""
    recorder = active_recorder()
    return tensor if recorder is None else recorder.peephole.summed(tensor)


def record_constant(make: Callable[[], Tensor]) -> Tensor:
    """A tensor made at compile time, as the recorder in force sees it (the tensor itself where there is none)."""
    recorder = active_recorder()
    with compile_time():
        made = make()
    return made if recorder is None else recorder.constant(made)

"""Which batch sizes one program may serve: the model is run once with a symbolic batch size, and what it asks is noted.

A program of one batch size can be made one of any size only if nothing that the model computes depends on the size in
another way than shapes do. `scaling` finds the sizes for which that holds, and the reason where it does not.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import SymFloat, SymInt, Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributions import Distribution
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from scg.capture import captured, restored
from scg.interception import intercept
from scg.primitives import OpaqueSpec, handling
from scg.template import flatten
from scg.tracer_recorder import opaque_result

if TYPE_CHECKING:
    import sympy

SMALLEST = 2
"""A batch of one broadcasts, which makes it a program of its own."""


@dataclass(frozen=True)
class Batch:
    """The tensor arguments that carry the batch size in front."""

    size: int
    positions: frozenset[int]
    """Among the tensor leaves of the call."""


def batch_of(leaves: Sequence[Tensor]) -> Batch | None:
    """The leading size of the first tensor argument that has dims, and who shares it; None where nothing varies."""
    sizes = [leaf.shape[0] if leaf.dim() else None for leaf in leaves]
    size = next((found for found in sizes if found is not None), None)
    if size is None or size < SMALLEST:
        return None
    return Batch(size, frozenset(i for i, found in enumerate(sizes) if found == size))


def resized(args: Any, kwargs: Any, batch: Batch, size: int) -> tuple[Any, Any]:
    """The arguments with another batch size: rows taken in turn."""
    leaves, spec = pytree.tree_flatten((args, kwargs))
    position = -1
    for i, leaf in enumerate(leaves):
        if isinstance(leaf, Tensor):
            position += 1
            if position in batch.positions:
                rows = torch.arange(size, device=leaf.device) % batch.size
                leaves[i] = leaf.detach()[rows].requires_grad_(leaf.requires_grad)
    found: tuple[Any, Any] = pytree.tree_unflatten(leaves, spec)
    return found


@dataclass(frozen=True)
class Scaling:
    """The batch sizes that one program may serve."""

    conditions: tuple[sympy.Basic, ...] = ()
    """Of the model's own ``if``s on the size: all must hold."""
    symbol: sympy.Symbol | None = None
    reason: str = ""
    """Why the model must be traced for each size; empty where it need not."""

    def holds(self, size: int) -> bool:
        """Whether the program may serve batches of ``size``."""
        if self.reason or size < SMALLEST:
            return False
        return all(bool(condition.subs(self.symbol, size)) for condition in self.conditions)


class _NotScaling(Exception):
    """The model uses its batch size as more than a shape."""


def scaling(model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], batch: Batch) -> Scaling:
    """Runs ``model`` on shapes alone, its batch size a symbol."""
    from torch.fx.experimental.symbolic_shapes import ShapeEnv  # brings sympy in

    shapes = ShapeEnv()
    mode = FakeTensorMode(shape_env=shapes, allow_non_fake_inputs=True)
    leaves, spec = pytree.tree_flatten((args, kwargs))
    position = -1
    for i, leaf in enumerate(leaves):
        if isinstance(leaf, Tensor):
            position += 1
            leaves[i] = _fake(mode, leaf, position in batch.positions)
    fake_args, fake_kwargs = pytree.tree_unflatten(leaves, spec)
    watch = _Watch()
    try:
        with _quietly(model, mode, watch):
            model(*fake_args, **fake_kwargs)
    except _NotScaling as found:
        return Scaling(reason=str(found))
    except Exception as error:  # whatever torch cannot do with symbolic shapes
        return Scaling(reason=f"it does not run with a symbolic batch size ({type(error).__name__})")
    conditions = tuple(guard.expr for guard in shapes.guards)
    symbols = set().union(*(condition.free_symbols for condition in conditions))
    if len(symbols) > 1:
        return Scaling(reason="its arguments have several free sizes")
    return Scaling(conditions, symbols.pop() if symbols else None)


def _fake(mode: FakeTensorMode, leaf: Tensor, batched: bool) -> Tensor:
    if not batched:
        return mode.from_tensor(leaf, static_shapes=True)
    from torch.fx.experimental.symbolic_shapes import DimDynamic, StatelessSymbolicContext

    dims = [DimDynamic.DYNAMIC, *[DimDynamic.STATIC] * (leaf.dim() - 1)]
    return mode.from_tensor(leaf, symbolic_context=StatelessSymbolicContext(dims))


@contextmanager
def _quietly(model: Callable[..., Any], mode: FakeTensorMode, watch: _Watch) -> Iterator[None]:
    """The model may run on fakes: its state is put back, argument checks are off, nothing is recorded."""
    handler = _Shapes()
    with ExitStack() as stack:
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(restored(captured(model)))
        stack.enter_context(mode)
        stack.enter_context(torch.enable_grad())
        stack.enter_context(watch)
        stack.enter_context(intercept(handler.on_attribute))
        stack.enter_context(handling(handler))
        stack.enter_context(_Arguments())
        yield


class _Shapes:
    """Gives draws, densities and primitives the shapes that they have."""

    def __init__(self) -> None:
        self._inside = False

    def on_attribute(self, dist: Distribution, name: str) -> Any:
        if name == "_validate_args":
            return False
        if self._inside or name not in ("sample", "rsample", "log_prob"):
            return object.__getattribute__(dist, name)
        return partial(self._call, dist, name)

    def _call(self, dist: Distribution, name: str, *args: Any, **kwargs: Any) -> Any:
        """On a copy: what the user's object would compute and keep of fakes must not stay in it."""
        self._inside = True
        try:
            template, tensors = flatten(dist)
            return getattr(template.rebuild(tensors), name)(*args, **kwargs)
        finally:
            self._inside = False

    def sample(self, dist: Distribution, name: str | None, estimator: Any, value: Tensor | None) -> Tensor:
        drawn: Tensor = self._call(dist, "sample") if value is None else value
        return drawn

    def cost(self, value: Tensor, name: str) -> Tensor:
        return value

    def depends(self, value: Tensor, on: Tensor, dims: tuple[str, ...]) -> Tensor:
        return value

    def logmarginal(self, value: Tensor, over: tuple[str, ...]) -> Tensor:
        return value

    def multisample(self, value: Tensor, alpha: float) -> Tensor:
        return value

    def opaque(self, spec: OpaqueSpec, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        bound = inspect.signature(spec.fn).bind(*args, **kwargs)
        bound.apply_defaults()
        return opaque_result(spec, bound.args)


class _Arguments(TorchFunctionMode):
    """Looks at the sizes and numbers that the model hands to torch."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        _check_numbers((args, kwargs))
        return func(*args, **(kwargs or {}))


_MADE = {"zeros", "ones", "full", "empty", "arange", "new_zeros", "new_ones", "new_full", "new_empty", "zeros_like",
         "ones_like", "full_like", "empty_like", "scalar_tensor"}  # fmt: skip
_MOVED = {"expand", "view", "_unsafe_view", "reshape", "unsqueeze", "squeeze", "clone", "detach", "_to_copy", "alias",
          "permute", "transpose", "t", "lift_fresh", "fill", "fill_", "zero_", "unbind", "select", "slice", "split",
          "split_with_sizes"}  # fmt: skip


class _Watch(TorchDispatchMode):
    """Looks at every operation: sizes must be polynomials of the batch size, and constants of that size plain ones."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._constants: dict[int, Tensor] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        made = [leaf for leaf in pytree.tree_leaves(out) if isinstance(leaf, Tensor)]
        for tensor in made:
            _check_numbers(tuple(tensor.shape))
        read = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        sized = any(isinstance(size, SymInt) for tensor in made for size in tensor.shape)
        random = torch.Tag.nondeterministic_seeded in func.tags
        if sized and not random and all(id(tensor) in self._constants for tensor in read):
            name = func._schema.name.split("::")[1]
            if name not in _MADE and name not in _MOVED:
                raise _NotScaling(f"{name} computes a constant of the batch's size")
            self._constants.update((id(tensor), tensor) for tensor in made)
        return out


def _check_numbers(tree: Any) -> None:
    """Refuses sizes and numbers that are no plain function of the batch size."""
    for leaf in _numbers(tree):
        expression = leaf.node.expr
        if not expression.is_rational_function(*expression.free_symbols):
            raise _NotScaling(f"it computes {expression} from the batch size")


def _numbers(tree: Any) -> Iterator[Any]:
    if isinstance(tree, (SymInt, SymFloat)):
        yield tree
    elif isinstance(tree, slice):
        yield from _numbers((tree.start, tree.stop, tree.step))
    elif isinstance(tree, (tuple, list)):
        for item in tree:
            yield from _numbers(item)
    elif isinstance(tree, Mapping):
        yield from _numbers(tuple(tree.values()))

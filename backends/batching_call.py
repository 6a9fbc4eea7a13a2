"""What every batching rule gets, an operation on batched operands, and the ways of running it that rules share.

Dims of one draw are counted from the right, where the sample dims in front of them do not matter.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from scg.backends.binding import public
from scg.backends.sample_dims import Batched, SampleDims
from scg.ir import Op, TensorType
from scg.operations import packet_name


class NoRule(Exception):
    """Raised by a rule for a case it does not cover: the fallback takes over."""


@dataclass(frozen=True)
class Call:
    """One operation to run on batched operands."""

    op: Op
    dims: SampleDims
    union: tuple[str, ...]
    """The sample dims of all operands together; those of the result, unless a rule says otherwise."""
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    # -- the arguments ----------------------------------------------------------------------------------------------
    @property
    def name(self) -> str:
        return packet_name(self.op.target) or ""

    def arg(self, index: int, name: str, default: Any = None) -> Any:
        """A schema argument, given by position or by name."""
        if index < len(self.args):
            return self.args[index]
        return self.kwargs.get(name, default)

    def with_arg(self, index: int, name: str, value: Any) -> Call:
        """The call with another value of a schema argument."""
        if index < len(self.args):
            return replace(self, args=(*self.args[:index], value, *self.args[index + 1 :]))
        return replace(self, kwargs={**self.kwargs, name: value})

    def with_first(self, *values: Any) -> Call:
        """The call with other values of its first arguments."""
        return replace(self, args=(*values, *self.args[len(values) :]))

    @property
    def operands(self) -> list[Batched]:
        """Every tensor among the arguments, also those in lists."""
        return [item for item in tree_leaves((self.args, self.kwargs)) if isinstance(item, Batched)]

    @property
    def ndim(self) -> int:
        """The highest rank of an operand."""
        return max(operand.ndim for operand in self.operands)

    # -- sample dims and shapes -------------------------------------------------------------------------------------
    @property
    def lead(self) -> int:
        """Number of sample dims in front of the result."""
        return len(self.union)

    @property
    def sizes(self) -> list[int]:
        return self.dims.sizes(self.union)

    @property
    def out_type(self) -> TensorType:
        assert isinstance(self.op.type, TensorType)
        return self.op.type

    @property
    def out_shape(self) -> tuple[int, ...]:
        return self.out_type.shape

    def tensor(self, value: Batched, ndim: int | None = None) -> Tensor:
        """``value`` as it broadcasts with others of rank ``ndim``: see `SampleDims.align`."""
        return self.dims.align(value, self.union, ndim)

    def full(self, value: Batched, ndim: int | None = None) -> Tensor:
        """``value`` with all rows of all sample dims."""
        return self.dims.align(value, self.union, ndim, full=True)

    def batched(self, value: Batched, ndim: int | None = None) -> Tensor:
        """``value`` with all sample dims in front, of size 1 where it lacks one."""
        if value.dims:
            return self.tensor(value, ndim)
        pad = 0 if ndim is None else ndim - value.ndim
        return value.tensor.reshape([1] * (self.lead + pad) + list(value.shape))

    # -- running ----------------------------------------------------------------------------------------------------
    def on(self, fn: Callable[[Batched], Tensor]) -> Any:
        """The operation on what ``fn`` makes of every operand."""
        args, kwargs = tree_map_only(Batched, fn, (self.args, self.kwargs))
        return public(self.op.target)(*args, **kwargs)

    def as_is(self) -> Any:
        """The operation on the tensors as they are, where sample dims in front do not disturb it."""
        return self.on(lambda value: value.tensor)

    def broadcast(self) -> Any:
        """The operation where dims in front broadcast."""
        ndim = self.ndim
        return self.on(lambda value: self.tensor(value, ndim))

    def fold(self, own: int) -> Any:
        """The operation with the sample dims merged into the batch dim of its first operand, and split off again.

        Args:
            own: how many batch dims the operand has itself.
        """
        x: Batched = self.args[0]
        merged = self.full(x).reshape([-1, *x.shape[own:]])
        out = self.with_first(merged).as_is()
        front = [*self.sizes, *x.shape[:own]]
        return tree_map_only(Tensor, lambda t: t.reshape([*front, *t.shape[1:]]), out)


Rule = Callable[[Call], Any]
"""Runs a call: what it returns has the sample dims of the union, unless it returns a `Batched` that says otherwise."""

Rules = tuple[tuple[str, Rule], ...]
"""Names of ATen operators, separated by spaces, and their rule."""


def from_right(dim: int, ndim: int) -> int:
    """A dim of one draw of rank ``ndim``, counted from the right."""
    return dim if dim < 0 else dim - max(ndim, 1)


def all_from_right(dims: Any, ndim: int) -> list[int]:
    """The same of one dim or several; of none, of every dim."""
    if dims is None or (isinstance(dims, (list, tuple)) and len(dims) == 0):
        return [-i for i in range(ndim, 0, -1)]
    return [from_right(dim, ndim) for dim in ([dims] if isinstance(dims, int) else dims)]


def along_dim(position: int, name: str = "dim", default: int | None = None) -> Rule:
    """Operations with one ``dim`` argument, at this position of the schema."""

    def rule(call: Call) -> Any:
        x: Batched = call.args[0]
        dim = call.arg(position, name, default)
        if not isinstance(dim, int) or x.ndim == 0:
            raise NoRule
        return call.with_arg(position, name, from_right(dim, x.ndim)).as_is()

    return rule

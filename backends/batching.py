"""Runs one operation on values that carry named leading sample dims.

A value of a node of shape ``[*S]`` is held as ``[*dims | *S]`` with exactly the sample dims it depends on. Every rule
keeps the operation whole (one fused kernel for all samples); an operation without a rule goes through ``torch.vmap`` of
that single operation, and where that has no rule either, through a loop over the samples.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from scg.backends.recorder import CustomFunction, record_call
from scg.backends.runtime import loop_rows
from scg.errors import LoweringError
from scg.ir import Op, TensorType
from scg.operations import lookup


@dataclass(frozen=True)
class Batched:
    """A tensor ``[*dims | *S]`` and the names of its sample dims."""

    tensor: Tensor
    dims: tuple[str, ...] = ()

    @property
    def ndim(self) -> int:
        """Number of dims of one draw."""
        return self.tensor.dim() - len(self.dims)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one draw."""
        return tuple(self.tensor.shape[len(self.dims) :])


def stop_gradient(value: Batched) -> Batched:
    """The value without its gradient."""
    return Batched(value.tensor.detach(), value.dims) if value.tensor.requires_grad else value


@dataclass(frozen=True)
class SampleDim:
    """One named sample dim: how many rows, what they are, and whose."""

    name: str
    size: int
    kind: str
    """``iid``, ``enumerated``, ``weighted`` or ``counterfactual``."""
    site: str | None = None
    order: int = 0


class SampleDims:
    """The sample dims of one program, in their layout order."""

    def __init__(self, dims: Iterable[SampleDim] = ()) -> None:
        self.table = {dim.name: dim for dim in sorted(dims, key=lambda dim: dim.order)}
        self._place = {name: place for place, name in enumerate(self.table)}

    def __getitem__(self, name: str) -> SampleDim:
        return self.table[name]

    def size(self, name: str) -> int:
        return self.table[name].size

    def sizes(self, names: Sequence[str]) -> list[int]:
        return [self.table[name].size for name in names]

    def union(self, *groups: Sequence[str]) -> tuple[str, ...]:
        """The dims of all groups, in layout order."""
        wanted = set(itertools.chain.from_iterable(groups))
        return tuple(sorted(wanted & self._place.keys(), key=self._place.__getitem__))

    def align(self, value: Batched, dims: Sequence[str], ndim: int | None = None, *, full: bool = False) -> Tensor:
        """``value`` as ``[*dims | 1… | *S]``: size 1 for dims it lacks (expanded if ``full``), rank padded to ``ndim``.

        A value without sample dims is returned as it is unless ``full``: broadcasting from the right places it.
        """
        ndim = value.ndim if ndim is None else ndim
        if value.dims == tuple(dims) and value.ndim == ndim:
            return value.tensor
        if not value.dims and not full:
            return value.tensor
        lead = [self.size(name) if name in value.dims else 1 for name in dims]
        pad = [1] * (ndim - value.ndim)
        tensor = value.tensor.reshape([*lead, *pad, *value.shape])
        return tensor.expand([*self.sizes(dims), *pad, *value.shape]) if full else tensor


Value = Any
"""A `Batched`, or a tuple of them for an operation with several outputs."""


def split_results(out: Any, dims: tuple[str, ...]) -> Value:
    """What an operation returned, as values with ``dims``."""
    if isinstance(out, Tensor):
        return Batched(out, dims)
    if isinstance(out, (tuple, list)):
        return tuple(split_results(item, dims) for item in out)
    return out


class Batcher:
    """Executes IR operations on `Batched` values."""

    def __init__(self, dims: SampleDims) -> None:
        self.dims = dims

    def run(self, op: Op, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Value:
        """``op`` on arguments in which a `Batched` stands for every tensor."""
        flat, spec = tree_flatten((tuple(args), dict(kwargs)), is_leaf=lambda item: isinstance(item, Batched))
        union = self.dims.union(*(item.dims for item in flat if isinstance(item, Batched)))
        if op.target is operator.getitem:
            return args[0][args[1]]
        if not union:
            plain = [item.tensor if isinstance(item, Batched) else item for item in flat]
            plain_args, plain_kwargs = tree_unflatten(plain, spec)
            return split_results(bind(op)(*plain_args, **plain_kwargs), ())
        call = Call(op, self.dims, union, tuple(args), dict(kwargs))
        name = packet_name(op.target)
        rule = RULES.get(name)
        if rule is None and name in POINTWISE or rule is None and is_pointwise(op.target):
            rule = _pointwise
        if rule is not None:
            try:
                out = rule(call)
            except NoRule:
                pass
            else:
                return split_results(out, union) if not isinstance(out, Batched) else out
        out = self._fallback(op, flat, spec, union)
        if isinstance(out, Tensor) and isinstance(op.type, TensorType):
            out = out.to(op.type.dtype)  # a mapped operation may keep another precision
        return split_results(out, union)

    def _fallback(self, op: Op, flat: list[Any], spec: Any, union: tuple[str, ...]) -> Any:
        """``vmap`` of the single operation over the flattened sample dims."""
        sizes = self.dims.sizes(union)
        rows = 1
        for size in sizes:
            rows *= size
        axes: list[int | None] = []
        operands: list[Any] = []
        for item in flat:
            if isinstance(item, Batched) and item.dims:
                tensor = self.dims.align(item, union, full=True)
                operands.append(tensor.reshape([rows, *item.shape]))
                axes.append(0)
            else:
                operands.append(item.tensor if isinstance(item, Batched) else item)
                axes.append(None)
        tensors = [item for item in operands if isinstance(item, Tensor)]
        where = [i for i, item in enumerate(operands) if isinstance(item, Tensor)]
        function = Mapped(op.target, tuple(operands), tuple(where), spec, tuple(axes[i] for i in where), rows)
        out = record_call(function, *tensors)
        return _map_tensors(lambda t: t.reshape([*sizes, *t.shape[1:]]), out)


_WRONG_UNDER_VMAP = {"index_fill", "linspace", "logspace"}
"""Operations of which torch.vmap gives other values than a loop."""


class Mapped:
    """One operation mapped over the first dim of some operands; a leaf of the generated code."""

    def __init__(
        self,
        target: Callable[..., Any],
        operands: tuple[Any, ...],
        where: tuple[int, ...],
        spec: Any,
        axes: tuple[int | None, ...],
        rows: int,
    ) -> None:
        self.target, self.spec, self.where, self.axes, self.rows = target, spec, where, axes, rows
        self.constants = tuple(None if i in where else item for i, item in enumerate(operands))
        self.__name__ = f"mapped_{getattr(target, '__name__', 'op').split('.')[0]}"
        self.__qualname__ = self.__name__
        self.__module__ = __name__
        self.looped: bool | None = True if packet_name(target) in _WRONG_UNDER_VMAP else None

    def _single(self, *tensors: Tensor) -> Any:
        flat = list(self.constants)
        for i, tensor in zip(self.where, tensors, strict=True):
            flat[i] = tensor
        args, kwargs = tree_unflatten(flat, self.spec)
        return self.target(*args, **kwargs)

    def __call__(self, *tensors: Tensor) -> Any:
        if self.looped is None:
            try:
                out = torch.vmap(self._single, in_dims=self.axes, randomness="different")(*tensors)
                self.looped = False
                return out
            except RuntimeError:  # vmap has no rule for it
                self.looped = True
        if not self.looped:
            return torch.vmap(self._single, in_dims=self.axes, randomness="different")(*tensors)
        return loop_rows(self._single, tensors, self.axes, self.rows)


def _map_tensors(fn: Callable[[Tensor], Tensor], tree: Any) -> Any:
    if isinstance(tree, Tensor):
        return fn(tree)
    if isinstance(tree, (tuple, list)):
        return tuple(_map_tensors(fn, item) for item in tree)
    return tree


class NoRule(Exception):
    """Raised by a rule for a case it does not cover: the fallback takes over."""


# -- binding an ATen overload to the public function of the same meaning ---------------------------------------------
def packet_name(target: Callable[..., Any]) -> str:
    """``add`` of ``aten.add.Tensor``; of another callable, its name."""
    if isinstance(target, torch._ops.OpOverload):
        return str(target.overloadpacket.__name__)
    return getattr(target, "__name__", repr(target))


_NOT_PUBLIC = {"to", "where", "index", "slice", "lift_fresh_copy", "_to_copy", "copy"}


def bind(op: Op) -> Callable[..., Any]:
    """A fast public binding of ``op.target`` (an ATen overload object costs about a microsecond more a call)."""
    target = op.target
    if not isinstance(target, torch._ops.OpOverload) or target.namespace != "aten":
        owner = getattr(target, "__self__", None)
        whole = target
        if isinstance(owner, type) and issubclass(owner, torch.autograd.Function):
            whole = CustomFunction(owner)
        return lambda *args: record_call(whole, *args)
    name = packet_name(target)
    if name in _NOT_PUBLIC:
        return target
    for owner in (torch, torch._C._nn, torch.Tensor):
        found = getattr(owner, name, None)
        if found is not None and not isinstance(found, type(bind)):
            return _checked(found, target)
    return target


def _checked(public: Callable[..., Any], target: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return public(*args, **kwargs)
        except TypeError:  # the public signature differs from the schema's
            return target(*args, **kwargs)

    return call


# -- rules ------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Call:
    """One operation to run on batched operands: what every rule gets."""

    op: Op
    dims: SampleDims
    union: tuple[str, ...]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def lead(self) -> int:
        """Number of sample dims in front of the result."""
        return len(self.union)

    @property
    def sizes(self) -> list[int]:
        return self.dims.sizes(self.union)

    def arg(self, index: int, name: str, default: Any = None) -> Any:
        """A schema argument, given by position or by name."""
        if index < len(self.args):
            return self.args[index]
        return self.kwargs.get(name, default)

    def tensor(self, value: Batched, ndim: int | None = None, *, full: bool = False) -> Tensor:
        return self.dims.align(value, self.union, ndim, full=full)

    def batched(self, value: Batched) -> Tensor:
        """``value`` with all sample dims in front, of size 1 where it lacks one."""
        if value.dims:
            return self.tensor(value)
        return value.tensor.reshape([1] * self.lead + list(value.shape))

    def invoke(self, *args: Any, **kwargs: Any) -> Any:
        return bind(self.op)(*args, **kwargs)

    @property
    def out_type(self) -> TensorType:
        assert isinstance(self.op.type, TensorType)
        return self.op.type

    @property
    def out_shape(self) -> tuple[int, ...]:
        return self.out_type.shape


def _operands(call: Call) -> list[Batched]:
    flat, _ = tree_flatten((call.args, call.kwargs), is_leaf=lambda item: isinstance(item, Batched))
    return [item for item in flat if isinstance(item, Batched)]


def _rebuild(call: Call, fn: Callable[[Batched], Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments with ``fn`` applied to every tensor."""
    flat, spec = tree_flatten((call.args, call.kwargs), is_leaf=lambda item: isinstance(item, Batched))
    args, kwargs = tree_unflatten([fn(item) if isinstance(item, Batched) else item for item in flat], spec)
    return args, kwargs


def is_pointwise(target: Callable[..., Any]) -> bool:
    known = lookup(target)
    if known is not None and known.kind not in ("pointwise", "choice"):
        return False
    return isinstance(target, torch._ops.OpOverload) and torch.Tag.pointwise in target.tags


POINTWISE = {
    "binary_cross_entropy_with_logits", "binary_cross_entropy", "mse_loss", "l1_loss", "huber_loss", "smooth_l1_loss",
    "soft_margin_loss", "kl_div", "poisson_nll_loss", "dropout", "alpha_dropout", "bernoulli", "poisson", "normal",
    "masked_fill", "where", "to", "_to_copy", "detach", "clone", "contiguous", "alias", "lift_fresh_copy",
    "__or__", "__and__", "__xor__", "float", "double", "long", "int", "bool", "half", "binomial", "lerp",
    "nan_to_num", "clamp", "clip", "isclose", "square", "softplus", "celu", "elu", "selu", "gelu", "silu", "mish",
    "hardtanh", "hardsigmoid", "hardswish", "leaky_relu", "log_sigmoid", "logsigmoid", "relu6", "threshold",
    "polygamma", "rrelu", "xlogy", "addcmul", "addcdiv", "rsub", "special_entr", "logit", "sinc", "fmod", "remainder",
}  # fmt: skip
"""Elementwise operations beyond those ATen tags as such."""

_REDUCTION = {
    "binary_cross_entropy_with_logits": 4, "binary_cross_entropy": 3, "mse_loss": 2, "l1_loss": 2, "huber_loss": 2,
    "smooth_l1_loss": 2, "soft_margin_loss": 2, "kl_div": 2, "poisson_nll_loss": 5,
}  # fmt: skip
"""Elementwise losses, which want equal shapes of both operands or warn: position of their reduction argument."""


def _pointwise(call: Call) -> Any:
    operands = _operands(call)
    ndim = max(operand.ndim for operand in operands)
    name = packet_name(call.op.target)
    if name in _REDUCTION:
        if call.arg(_REDUCTION[name], "reduction", 1) != 0:
            raise NoRule
        shape = torch.broadcast_shapes(*(operand.shape for operand in operands[:2]))
        full = [*call.sizes, *shape]
        first, second = (call.tensor(operand, len(shape)).expand(full) for operand in operands[:2])
        rest = iter([first, second] + [call.tensor(operand, len(shape)) for operand in operands[2:]])
        args, kwargs = _rebuild(call, lambda operand: next(rest))
    else:
        args, kwargs = _rebuild(call, lambda operand: call.tensor(operand, ndim if operand.dims else None))
    if name == "masked_fill" and isinstance(args[2], Tensor):
        return torch.where(args[1], args[2], args[0])
    return call.invoke(*args, **kwargs)


def _type_as(call: Call) -> Any:
    x: Batched = call.args[0]
    return Batched(x.tensor.to(call.args[1].tensor.dtype), x.dims)


def _negative(dim: int, ndim: int) -> int:
    return dim if dim < 0 else dim - max(ndim, 1)


def _dims_list(dim: Any, ndim: int) -> list[int]:
    if dim is None or (isinstance(dim, (list, tuple)) and len(dim) == 0):
        return [-i for i in range(ndim, 0, -1)]
    if isinstance(dim, int):
        dim = [dim]
    return [_negative(d, ndim) for d in dim]


def _reduce(call: Call) -> Any:
    """Reductions over listed dims: ``sum``, ``mean``, ``amax``, ``logsumexp``, ``var``…"""
    x: Batched = call.args[0]
    rest = list(call.args[1:])
    kwargs = dict(call.kwargs)
    name = packet_name(call.op.target)
    if x.ndim == 0:
        if name not in ("sum", "mean", "amax", "amin", "logsumexp", "nansum", "nanmean"):
            raise NoRule
        dtype = call.out_type.dtype
        return x.tensor if x.tensor.dtype == dtype else x.tensor.to(dtype)
    if not rest and "dim" not in kwargs:  # over everything
        return _over_all(name, x, kwargs)
    if "dim" in kwargs:
        kwargs["dim"] = _dims_list(kwargs["dim"], x.ndim)
    else:
        rest[0] = _dims_list(rest[0], x.ndim)
    return call.invoke(x.tensor, *rest, **kwargs)


def _over_all(name: str, x: Batched, kwargs: dict[str, Any]) -> Any:
    if x.ndim == 0 and name in ("max", "min", "prod", "all", "any", "median"):
        return x.tensor
    dims = _dims_list(None, x.ndim)
    if name in ("sum", "mean", "amax", "amin", "var", "std", "prod", "all", "any", "max", "min", "logsumexp", "median"):
        flat = x.tensor.flatten(len(x.dims)) if len(dims) > 1 else x.tensor
        if name in ("max", "min"):
            return (torch.amax if name == "max" else torch.amin)(flat, -1)
        if name == "median":
            return torch.median(flat, -1)[0]
        if name in ("prod", "all", "any"):
            return getattr(torch, name)(flat, -1, **kwargs)
        return getattr(torch, name)(x.tensor, dims, **kwargs)
    raise NoRule


def _norm(call: Call) -> Any:
    x: Batched = call.args[0]
    dim = call.arg(2, "dim")
    if dim is None or x.ndim == 0:
        raise NoRule
    return _with_dims(call, {2: ("dim", _dims_list(dim, x.ndim))})


def _along_dim(position: int, name: str = "dim", default: int | None = None) -> Callable[[Call], Any]:
    """Operations with one ``dim`` argument, counted from the right once sample dims stand in front."""

    def rule(call: Call) -> Any:
        x: Batched = call.args[0]
        dim = call.arg(position, name, default)
        if not isinstance(dim, int) or x.ndim == 0:
            raise NoRule
        return _with_dims(call, {position: (name, _negative(dim, x.ndim))})

    return rule


def _with_dims(call: Call, changes: Mapping[int, tuple[str, Any]]) -> Any:
    args = [item.tensor if isinstance(item, Batched) else item for item in call.args]
    kwargs = {key: item.tensor if isinstance(item, Batched) else item for key, item in call.kwargs.items()}
    for position, (name, value) in changes.items():
        if position < len(args):
            args[position] = value
        else:
            kwargs[name] = value
    return call.invoke(*args, **kwargs)


def _max_min(call: Call) -> Any:
    """``max``/``min``/``median``/``mode`` in full, per dim and by element; ``all``/``any``/``prod`` per dim."""
    if len(call.args) > 1 and isinstance(call.args[1], Batched):
        return _pointwise(call)
    if len(call.args) == 1 and "dim" not in call.kwargs:
        return _over_all(packet_name(call.op.target), call.args[0], dict(call.kwargs))
    if isinstance(call.arg(1, "dim"), (list, tuple)):
        return _reduce(call)
    return _along_dim(1)(call)


def _view(call: Call) -> Any:
    """``view``, ``reshape``, ``_unsafe_view``, ``flatten``…: the recorded result shape behind the sample dims."""
    x: Batched = call.args[0]
    if len(call.args) > 1 and isinstance(call.args[1], torch.dtype):
        return call.invoke(x.tensor, call.args[1])
    return Batched(x.tensor.reshape([*call.dims.sizes(x.dims), *call.out_shape]), x.dims)


def _expand(call: Call) -> Any:
    x: Batched = call.args[0]  # ``expand_as`` reads the shape of the other one alone
    aligned = call.dims.align(x, x.dims, len(call.out_shape))
    return Batched(aligned.expand([*call.dims.sizes(x.dims), *call.out_shape]), x.dims)


def _permute(call: Call) -> Any:
    x: Batched = call.args[0]
    order = [d % max(x.ndim, 1) for d in call.args[1]]
    return x.tensor.permute([*range(call.lead), *(call.lead + d for d in order)])


def _transpose(call: Call) -> Any:
    x: Batched = call.args[0]
    if x.ndim == 0:
        return x.tensor
    if len(call.args) == 1:  # t(), numpy_T, mT
        if packet_name(call.op.target) == "numpy_T":
            return x.tensor.permute([*range(call.lead), *reversed(range(call.lead, call.lead + x.ndim))])
        return x.tensor.transpose(-1, -2) if x.ndim > 1 else x.tensor
    return x.tensor.transpose(_negative(call.args[1], x.ndim), _negative(call.args[2], x.ndim))


def _movedim(call: Call) -> Any:
    x: Batched = call.args[0]
    source, target = call.args[1], call.args[2]
    sources, targets = [
        [_negative(dim, x.ndim) for dim in (dims if isinstance(dims, (list, tuple)) else [dims])]
        for dims in (source, target)
    ]
    return torch.movedim(x.tensor, sources, targets)


def _unsqueeze(call: Call) -> Any:
    x: Batched = call.args[0]
    dim = call.arg(1, "dim")
    return x.tensor.unsqueeze(dim if dim < 0 else dim - x.ndim - 1)


def _flip(call: Call) -> Any:
    x: Batched = call.args[0]
    return torch.flip(x.tensor, _dims_list(call.args[1], x.ndim)) if call.args[1] and x.ndim else x.tensor


def _roll(call: Call) -> Any:
    x: Batched = call.args[0]
    dims = call.arg(2, "dims", ())
    if x.ndim == 0:
        return x.tensor
    if not dims:
        flat = x.tensor.reshape([*call.sizes, -1])
        return torch.roll(flat, call.args[1], -1).reshape(x.tensor.shape)
    return torch.roll(x.tensor, call.args[1], _dims_list(dims, x.ndim))


def _cat(call: Call) -> Any:
    tensors: Sequence[Batched] = call.args[0]
    dim = call.arg(1, "dim", 0)
    kept = [t for t in tensors if t.shape != (0,)]
    return torch.cat([call.tensor(t, full=True) for t in kept], _negative(dim, kept[0].ndim))


def _stack(call: Call) -> Any:
    tensors: Sequence[Batched] = call.args[0]
    dim = call.arg(1, "dim", 0)
    full = [call.tensor(t, full=True) for t in tensors]
    return torch.stack(full, dim if dim < 0 else dim - tensors[0].ndim - 1)


def _slice(call: Call) -> Any:
    x: Batched = call.args[0]
    dim = _negative(call.arg(1, "dim", 0), x.ndim)
    start, end, step = call.arg(2, "start"), call.arg(3, "end"), call.arg(4, "step", 1)
    cut = slice(start, None if end is not None and end > 2**62 else end, step)
    index: tuple[Any, ...] = (..., cut, *[slice(None)] * (-dim - 1))
    return x.tensor[index]


def _narrow(call: Call) -> Any:
    x, dim, start, length = call.args
    if isinstance(start, Batched):
        raise NoRule
    return torch.narrow(x.tensor, _negative(dim, x.ndim), start, length)


def _slice_scatter(call: Call) -> Any:
    """``slice_scatter`` and ``select_scatter``: base and source both get every sample dim."""
    base, source = call.args[0], call.args[1]
    changes = {0: ("self", call.tensor(base, full=True)), 1: ("src", call.tensor(source, full=True))}
    dim = call.arg(2, "dim", 0)
    return _with_dims(call, {**changes, 2: ("dim", _negative(dim, base.ndim))})


def _class_loss(call: Call) -> Any:
    """``cross_entropy_loss``, ``nll_loss``… by element: the samples are further rows of the batch."""
    x, target, weight = call.args[0], call.args[1], call.arg(2, "weight")
    if call.arg(3, "reduction", 1) != 0 or (weight is not None and weight.dims):
        raise NoRule
    own = min(x.ndim - 1, 1)  # of one row alone there is no batch dim
    rows, wanted = (call.tensor(item, full=True).reshape([-1, *item.shape[own:]]) for item in (x, target))
    given, kwargs = _rebuild(call, lambda item: item.tensor)
    return call.invoke(rows, wanted, *given[2:], **kwargs).reshape([*call.sizes, *call.out_shape])


def _pad(call: Call) -> Any:
    x: Batched = call.args[0]
    if packet_name(call.op.target) == "constant_pad_nd" or call.arg(2, "mode", "constant") == "constant":
        return call.invoke(x.tensor, *call.args[1:], **call.kwargs)
    return _fold(call, x, lambda t: call.invoke(t, *call.args[1:], **call.kwargs))


def _linear(call: Call) -> Any:
    x, weight = call.args[0], call.args[1]
    bias = call.arg(2, "bias")
    if not weight.dims and (bias is None or not bias.dims):
        return call.invoke(x.tensor, weight.tensor, *([bias.tensor] if bias is not None else []))
    if x.ndim == 0 or weight.ndim == 1:
        raise NoRule
    row = call.batched(x) if x.ndim > 1 else call.batched(x).unsqueeze(-2)
    lead_pad = [1] * max(x.ndim - 2, 0)
    w = call.batched(weight)
    w = w.reshape([*w.shape[: call.lead], *lead_pad, *weight.shape])
    out = torch.matmul(row, w.transpose(-1, -2))
    if bias is not None:
        b = call.batched(bias)
        out = out + b.reshape([*b.shape[: call.lead], *[1] * (max(x.ndim, 2) - 1), *bias.shape])
    return out if x.ndim > 1 else out.squeeze(-2)


def _matmul(call: Call) -> Any:
    a, b = call.args[0], call.args[1]
    left, right = call.batched(a), call.batched(b)
    if a.ndim == 1:
        left = left.unsqueeze(-2)
    if b.ndim == 1:
        right = right.unsqueeze(-1)
    ndim = max(a.ndim, b.ndim, 2)

    def padded(tensor: Tensor, own: int) -> Tensor:
        shape = list(tensor.shape)
        return tensor.reshape([*shape[: call.lead], *[1] * (ndim - max(own, 2)), *shape[call.lead :]])

    out = torch.matmul(padded(left, a.ndim), padded(right, b.ndim))
    if a.ndim == 1:
        out = out.squeeze(-2)
    if b.ndim == 1:
        out = out.squeeze(-1)
    return out


def _addmm(call: Call) -> Any:
    if call.kwargs or len(call.args) > 3:
        raise NoRule
    bias, a, b = call.args
    product = _matmul(Call(call.op, call.dims, call.union, (a, b), {}))
    return product + call.tensor(bias, max(a.ndim, b.ndim) if bias.dims else None)


def _dot(call: Call) -> Any:
    a, b = call.args
    if a.ndim != 1 or b.ndim != 1:
        raise NoRule
    return torch.sum(call.batched(a) * call.batched(b), -1)


def _einsum(call: Call) -> Any:
    equation, operands = call.args[0], call.args[1]
    if "." in equation or "->" not in equation:
        raise NoRule
    inputs, output = equation.replace(" ", "").split("->")
    free = [letter for letter in "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz" if letter not in equation]
    letter = dict(zip(call.union, free, strict=False))
    terms = ["".join(letter[d] for d in x.dims) + term for x, term in zip(operands, inputs.split(","), strict=True)]
    lead = "".join(letter[d] for d in call.union)
    return torch.einsum(",".join(terms) + "->" + lead + output, *(x.tensor for x in operands))


def _fold(call: Call, x: Batched, fn: Callable[[Tensor], Any]) -> Any:
    """Sample dims merged into the batch dim of ``x`` (its first), ``fn`` applied, and split off again."""
    full = call.tensor(x, full=True)
    out = fn(full.reshape([-1, *x.shape[1:]]))
    return _map_tensors(lambda t: t.reshape([*call.sizes, x.shape[0], *t.shape[1:]]), out)


def _fold_first(unbatched: int) -> Callable[[Call], Any]:
    """Convolutions and pools: samples go into the batch dim; needs ``unbatched`` dims behind it, weights unsampled."""

    def rule(call: Call) -> Any:
        x: Batched = call.args[0]
        others = [item for item in (*call.args[1:], *call.kwargs.values()) if isinstance(item, Batched)]
        if any(item.dims for item in others) or x.ndim < unbatched:
            raise NoRule
        rest = [item.tensor if isinstance(item, Batched) else item for item in call.args[1:]]
        kwargs = {key: item.tensor if isinstance(item, Batched) else item for key, item in call.kwargs.items()}
        if x.ndim == unbatched:  # no batch dim: the samples are the batch
            full = call.tensor(x, full=True)
            out = call.invoke(full.reshape([-1, *x.shape]), *rest, **kwargs)
            return _map_tensors(lambda t: t.reshape([*call.sizes, *t.shape[1:]]), out)
        return _fold(call, x, lambda t: call.invoke(t, *rest, **kwargs))

    return rule


def _convolution(call: Call) -> Any:
    return _fold_first(call.args[1].ndim - 1)(call)


def _batch_norm(call: Call) -> Any:
    """Training: samples go into the channels, so that each keeps its own statistics; the running ones move once."""
    x, weight, bias, mean, var, training, momentum, eps, cudnn = call.args
    if any(item is not None and item.dims for item in (weight, bias, mean, var)):
        raise NoRule
    scale, shift, mean, var = (None if item is None else item.tensor for item in (weight, bias, mean, var))
    if not training:
        return _fold(call, x, lambda t: torch.batch_norm(t, scale, shift, mean, var, False, momentum, eps, cudnn))
    full = call.tensor(x, full=True)  # [*dims, B, C, *rest]
    rows = full.reshape([-1, *x.shape]).transpose(0, 1)  # [B, R, C, *rest]
    count, channels = rows.shape[1], rows.shape[2]
    merged = rows.reshape([x.shape[0], count * channels, *x.shape[2:]])

    def tiled(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.expand([count, channels]).reshape([-1])

    out = torch.batch_norm(merged, tiled(scale), tiled(shift), None, None, True, momentum, eps, cudnn)
    if mean is not None and var is not None:
        # every row updates from the same old value; the mean of the updates is the update with the mean statistics
        keep = [0, *range(3, rows.dim())]
        batch_mean = rows.detach().mean(keep).mean(0)
        batch_var = rows.detach().var(keep, unbiased=True).mean(0)
        mean.lerp_(batch_mean.to(mean.dtype), momentum)
        var.lerp_(batch_var.to(var.dtype), momentum)
    out = out.reshape([x.shape[0], count, channels, *x.shape[2:]]).transpose(0, 1)
    return out.reshape([*call.sizes, *x.shape])


def _norm_affine(position: int) -> Callable[[Call], Any]:
    """``layer_norm``, ``group_norm``, ``instance_norm``…: fine as they are while their weights carry no samples."""

    def rule(call: Call) -> Any:
        x: Batched = call.args[0]
        others = [item for item in call.args[1:] if isinstance(item, Batched)]
        if any(item.dims for item in others):
            raise NoRule
        if position:
            return _fold_first(2)(call)
        return _with_dims(call, {0: ("input", x.tensor)})

    return rule


def _embedding(call: Call) -> Any:
    weight, index = call.args[0], call.args[1]
    if weight.dims:
        raise NoRule
    rest = call.args[2:]
    return call.invoke(weight.tensor, index.tensor, *rest, **call.kwargs)


def _gather(call: Call) -> Any:
    """``gather``, ``scatter``, ``scatter_add``…: every tensor operand gets every sample dim."""
    x: Batched = call.args[0]
    if x.ndim == 0:
        raise NoRule
    args: list[Any] = [call.tensor(item, full=True) if isinstance(item, Batched) else item for item in call.args]
    kwargs = {k: call.tensor(v, full=True) if isinstance(v, Batched) else v for k, v in call.kwargs.items()}
    args[1] = _negative(call.args[1], x.ndim)
    return call.invoke(*args, **kwargs)


def _index_select(call: Call) -> Any:
    x, dim, index = call.args
    if index.dims and not x.dims and x.ndim:
        place = dim % x.ndim
        found = x.tensor[(*[slice(None)] * place, call.tensor(index, 1))]  # [*S before dim, *dims, n, *S behind it]
        lead = range(len(index.dims))
        return Batched(found.movedim([place + i for i in lead], [*lead]) if place else found, index.dims)
    if index.dims:
        raise NoRule
    if x.ndim == 0:  # by the index 0 alone
        return x.tensor
    return torch.index_select(x.tensor, _negative(dim, x.ndim), index.tensor)


def _index(call: Call) -> Any:
    """``x[..., i, j]`` by tensors: advanced indices stand behind the sample dims, sampled ones with their rows."""
    x, indices = call.args[0], call.args[1]
    given = [i for i, item in enumerate(indices) if item is not None]
    if any(item is not None and item.tensor.dtype == torch.bool for item in indices):
        raise NoRule
    contiguous = given == list(range(given[0], given[-1] + 1))
    if not contiguous:
        raise NoRule
    head = [slice(None)] * given[0]
    if not any(indices[i].dims for i in given):
        rows = [slice(None)] * call.lead
        return call.tensor(x, full=True)[(*rows, *head, *(indices[i].tensor for i in given))]
    if given[0] != 0:
        raise NoRule
    ndim = max(indices[i].ndim for i in given)
    index = [call.tensor(indices[i], ndim if indices[i].dims else None) for i in given]
    if not x.dims:
        return x.tensor[tuple(index)]
    axes = [
        torch.arange(size, device=x.tensor.device).reshape([-1 if j == i else 1 for j in range(call.lead)] + [1] * ndim)
        for i, size in enumerate(call.sizes)
    ]
    return call.tensor(x, full=True)[(*axes, *index)]


def _factory(call: Call) -> Any:
    """``zeros_like`` and its kin read no values: one copy serves every sample."""
    template: Batched = call.args[0]
    args: list[Any] = [item.tensor if isinstance(item, Batched) else item for item in call.args]
    kwargs = {k: v.tensor if isinstance(v, Batched) else v for k, v in call.kwargs.items()}
    row = template.tensor
    for _ in range(call.lead):
        row = row.select(0, 0)
    args[0] = row
    return Batched(call.invoke(*args, **kwargs), ())


def _sdpa(call: Call) -> Any:
    query, key, value = call.args[:3]
    mask = call.arg(3, "attn_mask")
    ndim = max(query.ndim, key.ndim, value.ndim)
    tensors = [call.tensor(item, ndim, full=True) for item in (query, key, value)]
    rest = list(call.args[3:])
    kwargs = dict(call.kwargs)
    if mask is not None:
        full = call.tensor(mask, ndim if mask.dims else None)
        if len(rest) > 0:
            rest[0] = full
        else:
            kwargs["attn_mask"] = full
    return call.invoke(*tensors, *rest, **kwargs)


def _fold_recurrent(call: Call) -> Any:
    """``gru``/``lstm`` of whole sequences: samples go into the batch dim; the weights must carry none."""
    name = packet_name(call.op.target)
    x, hidden, params = call.args[0], call.args[1], call.args[2]
    batch_first = call.args[8]
    if any(p.dims for p in params) or x.ndim != 3:
        raise NoRule
    axis = 0 if batch_first else 1
    hidden_list = list(hidden) if isinstance(hidden, (tuple, list)) else [hidden]

    def fold(value: Batched, at: int) -> Tensor:
        full = call.tensor(value, full=True).movedim(call.lead + at, call.lead)  # [*dims, B, *rest]
        return full.reshape([-1, *full.shape[call.lead + 1 :]]).movedim(0, at)

    def unfold(out: Tensor, at: int, batch: int) -> Tensor:
        rows = out.movedim(at, 0)
        return rows.reshape([*call.sizes, batch, *rows.shape[1:]]).movedim(call.lead, call.lead + at)

    folded = [fold(h, 1) for h in hidden_list]
    state: Any = folded if name == "lstm" else folded[0]
    out = call.invoke(fold(x, axis), state, [p.tensor for p in params], *call.args[3:])
    batch = x.shape[axis]
    return (unfold(out[0], axis, batch), *(unfold(h, 1, batch) for h in out[1:]))


def _fold_cell(call: Call) -> Any:
    """``gru_cell``, ``lstm_cell`` and their like: samples go into the batch dim; the weights must carry none."""
    params = [item for item in call.args[2:] if isinstance(item, Batched)]
    if any(item.dims for item in params):
        raise NoRule
    x: Batched = call.args[0]
    state = call.args[1]

    def rows(value: Batched) -> Tensor:
        return call.tensor(value, full=True).reshape([-1, value.shape[-1]])

    folded = rows(state) if isinstance(state, Batched) else [rows(item) for item in state]
    rest = [item.tensor if isinstance(item, Batched) else item for item in call.args[2:]]
    out = call.invoke(rows(x), folded, *rest)
    return _map_tensors(lambda t: t.reshape([*call.sizes, *x.shape[:-1], t.shape[-1]]), out)


def _fold_classes(call: Call) -> Any:
    """``cross_entropy_loss`` and ``nll_loss`` of each element: samples go into the batch dim, classes stay second."""
    x, target = call.args[0], call.args[1]
    weight = call.arg(2, "weight")
    if call.arg(3, "reduction", 1) != 0 or weight is not None and weight.dims:
        raise NoRule
    lead = [1] if x.ndim == 1 else []  # the classes alone: the samples are the batch

    def rows(value: Batched) -> Tensor:
        shape = [*lead, *value.shape]
        return call.tensor(value, full=True).reshape([-1, *shape[1:]])

    rest = [item.tensor if isinstance(item, Batched) else item for item in call.args[2:]]
    kwargs = {key: item.tensor if isinstance(item, Batched) else item for key, item in call.kwargs.items()}
    out: Tensor = call.invoke(rows(x), rows(target), *rest, **kwargs)
    return out.reshape([*call.sizes, *call.out_shape])


def _unbind(call: Call) -> Any:
    x: Batched = call.args[0]
    return torch.unbind(x.tensor, _negative(call.arg(1, "dim", 0), x.ndim))


def _broadcast_tensors(call: Call) -> Any:
    tensors: Sequence[Batched] = call.args[0]
    shape = torch.broadcast_shapes(*(t.shape for t in tensors))
    return [call.tensor(t, len(shape), full=False).expand([*call.sizes, *shape]) for t in tensors]


def _multi_dim(call: Call) -> Any:
    """``diagonal`` and ``unfold``-like views with two dims."""
    x: Batched = call.args[0]
    offset = call.arg(1, "offset", 0)
    first, second = call.arg(2, "dim1", 0), call.arg(3, "dim2", 1)
    return torch.diagonal(x.tensor, offset, _negative(first, x.ndim), _negative(second, x.ndim))


def _trailing(call: Call) -> Any:
    """Operations on the last dims that broadcast over all in front: ``tril``, ``cholesky``, ``triangular_solve``…"""
    ndim = max(operand.ndim for operand in _operands(call))
    args, kwargs = _rebuild(call, lambda operand: call.tensor(operand, ndim if operand.dims else None))
    return call.invoke(*args, **kwargs)


def _repeat(call: Call) -> Any:
    x: Batched = call.args[0]
    sizes = list(call.args[1])
    padded = call.tensor(x, len(sizes))
    return padded.repeat([*[1] * call.lead, *sizes])


def _table(names: str, rule: Callable[[Call], Any]) -> dict[str, Callable[[Call], Any]]:
    return dict.fromkeys(names.split(), rule)


RULES: dict[str, Callable[[Call], Any]] = {
    **_table("sum mean amax amin logsumexp var std nansum nanmean count_nonzero", _reduce),
    **_table("norm linalg_vector_norm", _norm),
    **_table("max min median mode prod all any nanmedian aminmax", _max_min),
    **_table("argmax argmin", _along_dim(1)),
    **_table("softmax log_softmax _softmax _log_softmax cumsum cumprod logcumsumexp cummax cummin", _along_dim(1)),
    **_table("select", _along_dim(1)),
    **_table("sort argsort", _along_dim(1, default=-1)),
    **_table("topk kthvalue", _along_dim(2, default=-1)),
    **_table("split split_with_sizes chunk tensor_split", _along_dim(2, default=0)),
    **_table("unfold", _along_dim(1, "dimension")),
    **_table("glu", _along_dim(1, default=-1)),
    **_table("view reshape _unsafe_view flatten unflatten view_as reshape_as _reshape_alias ravel", _view),
    **_table("squeeze", _view),
    **_table("expand expand_as broadcast_to", _expand),
    **_table("permute", _permute),
    **_table("transpose t numpy_T mT swapaxes swapdims", _transpose),
    **_table("movedim moveaxis", _movedim),
    **_table("unsqueeze", _unsqueeze),
    **_table("flip", _flip),
    **_table("roll", _roll),
    **_table("cat concat concatenate", _cat),
    **_table("stack", _stack),
    **_table("slice", _slice),
    **_table("narrow", _narrow),
    **_table("slice_scatter select_scatter", _slice_scatter),
    **_table("pad constant_pad_nd", _pad),
    **_table("linear", _linear),
    **_table("matmul mm bmm mv", _matmul),
    **_table("addmm baddbmm", _addmm),
    **_table("dot vdot inner", _dot),
    **_table("einsum", _einsum),
    **_table("conv1d max_pool1d avg_pool1d adaptive_avg_pool1d conv_transpose1d", _fold_first(2)),
    **_table("conv2d max_pool2d avg_pool2d adaptive_avg_pool2d adaptive_max_pool2d conv_transpose2d", _fold_first(3)),
    **_table("upsample_nearest2d upsample_bilinear2d pixel_shuffle max_pool2d_with_indices", _fold_first(3)),
    **_table("conv3d max_pool3d avg_pool3d conv_transpose3d", _fold_first(4)),
    **_table("convolution", _convolution),
    **_table("batch_norm", _batch_norm),
    **_table("layer_norm rms_norm", _norm_affine(0)),
    **_table("group_norm instance_norm", _norm_affine(1)),
    **_table("embedding", _embedding),
    **_table("cross_entropy_loss nll_loss nll_loss_nd nll_loss2d", _class_loss),
    **_table("gather scatter scatter_add scatter_reduce", _gather),
    **_table("index_select", _index_select),
    **_table("index", _index),
    **_table("zeros_like ones_like full_like empty_like new_zeros new_ones new_full new_empty", _factory),
    **_table("rand_like randn_like randint_like", _factory),
    **_table("scaled_dot_product_attention", _sdpa),
    **_table("gru lstm rnn_tanh rnn_relu", _fold_recurrent),
    **_table("gru_cell lstm_cell rnn_tanh_cell rnn_relu_cell", _fold_cell),
    **_table("cross_entropy_loss nll_loss nll_loss_nd nll_loss2d", _fold_classes),
    **_table("unbind", _unbind),
    **_table("broadcast_tensors", _broadcast_tensors),
    **_table("diagonal", _multi_dim),
    **_table("tril triu cholesky linalg_cholesky linalg_solve_triangular linalg_inv inverse logdet det", _trailing),
    **_table("cholesky_solve cholesky_inverse linalg_det linalg_slogdet slogdet", _trailing),
    **_table("type_as", _type_as),
    **_table("repeat", _repeat),
}


def check_shape(op: Op, value: Value, dims: SampleDims) -> None:
    """A rule that got the shape wrong is our fault: say which operation."""
    if isinstance(op.type, TensorType) and isinstance(value, Batched) and value.shape != op.type.shape:
        raise LoweringError(
            f"%{op.name} ({op.op_name}, {op.loc}): batching over {list(value.dims)} gave {list(value.shape)} "
            f"where one draw has {list(op.type.shape)}"
        )

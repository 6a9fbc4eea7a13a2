"""Calls that are recorded as simpler ones of the same value.

sum(-x)              ->  -sum(x)        the sum has fewer elements to negate, backward too
-(-x)                ->  x              and x * -1, x / 1, a - (-x), also where the negated is a view of -x
x.permute(0, 1, 2)   ->  x              likewise movedim that moves nothing
x.detach()           ->  x              where it has no gradient
x[None][0]           ->  x
torch.tensor([…])    ->  a constant     made once, not at every step
ones_like(scalar)    ->  a constant     likewise, and what its argument needed goes
t[[0, 1, …, n - 1]]  ->  t              every row in order, a view: the rows of an enumerated index
x - zeros_like(x)    ->  x              a filled tensor is a number: a standard prior's mean and scale
x - logsumexp(x)     ->  log_softmax(x)  one kernel, as categoricals normalise their logits
sum(bce(x, t), -1)   ->  -log_prob_of_bits(x, t)     for many rows of x without gradient: one exponential an element
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from scg.backends import runtime
from scg.backends.log_ratio import LOG_RATIO_OF_BITS

if TYPE_CHECKING:
    from scg.backends.recorder import Recorder

_NEGATIONS = {"neg", "__neg__", "negative"}
_SUMS = {"sum", "mean"}
_VIEWS = {"detach", "reshape", "squeeze", "unsqueeze", "permute", "movedim"}
_OPPOSITE = {"add": torch.sub, "sub": torch.add}
_TABLES = {torch.tensor, torch.arange, torch.eye}
_FILLED = {"ones_like": 1, "zeros_like": 0}
_FILL = {"ones_like", "zeros_like", "full_like"}
_OF_ONE = {"neg", "log", "exp", "sqrt", "reciprocal", "square", "abs", "pow", "__pow__", "gt", "ge", "lt", "le"}
"""Of one tensor and numbers."""
_OF_TWO = {"add", "sub", "mul", "div", "__truediv__"}
_NOTHING = {"add": 0.0, "sub": 0.0, "mul": 1.0, "div": 1.0, "__truediv__": 1.0}
"""The second operand that changes nothing."""
_PRECISE = {torch.float32, torch.float64}
_LARGEST_TABLE = 1024
"""Elements of a constant; more of them are quicker made than read."""


class Peephole:
    """Remembers what the recorded calls so far have negated, normalised, filled, or made for a later one to join."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._negated: dict[int, Tensor] = {}
        self._normalizers: dict[int, tuple[Tensor, int]] = {}
        """Of results of logsumexp over one dim, which stays: of what, and the dim."""
        self._filled: dict[int, tuple[Tensor, Any]] = {}
        """Of tensors that hold one number: another one of their shape, and the number."""
        self._tables: dict[Any, Tensor] = {}
        self._true: set[int] = set()
        """Constants that are true."""
        self._expanded: dict[int, Tensor] = {}
        """What a tensor is an expansion of."""
        self._unsqueezed: dict[int, Tensor] = {}
        """What a tensor is with one more dim in front."""
        self._rank_one: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
        """What a tensor is the sum of: a tensor, and the product of a change with a weight."""
        self._cross_entropy: dict[int, tuple[Tensor, Tensor]] = {}
        """Logits and targets of the binary cross entropies without gradient."""

    def simpler(self, func: Callable[..., Any], name: str, args: Any, kwargs: dict[str, Any]) -> Any:
        """The result of an equal, simpler call; None where there is none."""
        if func in _TABLES:
            return self._table(func, args, kwargs)
        first = args[0] if args else None
        if not isinstance(first, Tensor):
            return None
        if name in _FILLED and first.dim() == 0 and not kwargs.get("requires_grad"):
            made = {key: kwargs.get(key) or getattr(first, key) for key in ("dtype", "device")}
            return self._table(torch.tensor, (_FILLED[name],), made)
        if name == "__getitem__" and type(args[1]) is int and args[1] == 0 and id(first) in self._unsqueezed:
            return self._recorder.handed_out(self._unsqueezed[id(first)])
        if name == "__getitem__":
            return self._all_rows(first, args[1])
        if (filled := self._of_filled(func, name, args, kwargs)) is not None:
            return filled
        if name == "logical_and" and not kwargs and any(id(arg) in self._true for arg in args):
            other = args[1] if id(first) in self._true else first
            return other if other.dtype == torch.bool else None
        if name == "where" and id(first) in self._true and len(args) == 3:
            return args[1] if isinstance(args[1], Tensor) and isinstance(args[2], float) else None
        if name == "sub" and len(args) == 2 and not kwargs and self._normalizers.get(id(args[1]), (None,))[0] is first:
            return self._recorder.call(torch.log_softmax, first, self._normalizers[id(args[1])][1])
        if not kwargs and len(args) == 2 and (opposite := self._opposite(name, first, args[1])) is not None:
            return opposite
        inner = self._negated.get(id(first))
        if inner is not None and name in _NEGATIONS:
            return inner
        if inner is not None and name in _SUMS:
            return self._recorder.call(torch.neg, self._recorder.call(func, inner, *args[1:], **kwargs))
        if name == "sum" and args[1:] and not kwargs and _adds_nothing(first, *args[1:]):
            return (
                self._recorder.handed_out(first)
                if args[2:] == (True,)
                else self._recorder.call(Tensor.squeeze, first, args[1])
            )
        if name == "sum" and id(first) in self._cross_entropy:
            return self._sum_of_bits(first, args[1:], kwargs)
        if kwargs:
            return None
        if name == "detach" and not first.requires_grad:
            return self._recorder.handed_out(first)
        return first if _moves_nothing(name, first, args[1:]) else None

    def recorded(self, func: Callable[..., Any], name: str, args: Any, kwargs: dict[str, Any], out: Any) -> None:
        """Takes note of a call."""
        if name in _NEGATIONS and isinstance(args[0], Tensor) and args[0].is_floating_point():
            self._negated[id(out)] = args[0]
        elif name in _VIEWS and id(args[0]) in self._negated and out.shape.numel() == args[0].shape.numel():
            self._negated[id(out)] = self._recorder.call(func, self._negated[id(args[0])], *args[1:], **kwargs)
        if name == "logsumexp" and args[2:] == (True,) and not torch.is_autocast_enabled(out.device.type):
            dims = args[1] if isinstance(args[1], (list, tuple)) else [args[1]]
            if len(dims) == 1:
                self._normalizers[id(out)] = (args[0], dims[0])
        if name in _FILL and isinstance(out, Tensor) and (out.dtype, out.device) == (args[0].dtype, args[0].device):
            number = _FILLED.get(name) if len(args) == 1 else args[1]
            if isinstance(number, (int, float)) and not out.requires_grad:
                self._filled[id(out)] = (args[0], number)
        if name == "expand":
            self._expanded[id(out)] = args[0]
        elif name == "addcmul" and len(args) == 3 and not out.requires_grad and _is_rank_one(*args):
            self._rank_one[id(out)] = args
        elif name == "__getitem__" and args[1] is None:
            self._unsqueezed[id(out)] = args[0]
        elif name == "binary_cross_entropy_with_logits" and not out.requires_grad and out.dtype in _PRECISE:
            logits, targets, *rest = args
            if rest == [None, None, 0] and out.dim() and id(targets) in self._expanded:
                self._cross_entropy[id(out)] = logits, self._expanded[id(targets)]

    def forget(self, tensor: Tensor) -> None:
        """Takes note that ``tensor`` was written into."""
        memory = tensor.untyped_storage()._cdata
        self._negated = {
            key: of
            for key, of in self._negated.items()
            if key != id(tensor) and of.untyped_storage()._cdata != memory  # it may be a view of it
        }
        self._normalizers = {
            key: found for key, found in self._normalizers.items() if key != id(tensor) and found[0] is not tensor
        }
        self._filled.pop(id(tensor), None)
        tables: list[dict[int, Any]] = [self._expanded, self._unsqueezed, self._rank_one, self._cross_entropy]
        for table in tables:
            for key, of in list(table.items()):
                if key == id(tensor) or any(part is tensor for part in (of if isinstance(of, tuple) else (of,))):
                    del table[key]

    def _opposite(self, name: str, left: Tensor, right: Any) -> Tensor | None:
        """The result of a call with one negation less."""
        if not left.is_floating_point() or (isinstance(right, Tensor) and not right.is_floating_point()):
            return None
        if name == "mul" and isinstance(right, (int, float)) and right == -1:
            return self._call(torch.neg, left)
        if name in _OPPOSITE and id(right) in self._negated:
            return self._call(_OPPOSITE[name], left, self._negated[id(right)])
        if name == "add" and isinstance(right, Tensor) and id(left) in self._negated:
            return self._call(torch.sub, right, self._negated[id(left)])
        return None

    def _of_filled(self, func: Callable[..., Any], name: str, args: Any, kwargs: dict[str, Any]) -> Tensor | None:
        """The result of a call on tensors that hold one number, without them; None where there are none."""
        if kwargs or not all(isinstance(arg, (Tensor, int, float)) for arg in args):
            return None
        of, *rest = args
        if name == "all" and not rest and id(of) in self._filled:
            return self._table(torch.tensor, (bool(self._filled[id(of)][1]),), {"device": of.device})
        if not of.is_floating_point():
            return None
        numbers = [self._filled[id(arg)][1] if id(arg) in self._filled else arg for arg in rest]
        if any(isinstance(number, Tensor) for number in numbers) or name not in _OF_ONE | _OF_TWO:
            return None
        from scg.backends.recorder import compile_time

        if id(of) in self._filled:
            like, number = self._filled[id(of)]
            if any(isinstance(arg, Tensor) and (arg.shape, arg.dtype) != (of.shape, of.dtype) for arg in rest):
                return None
            with compile_time():
                found = func(torch.tensor(number, dtype=of.dtype), *numbers)
                number = found.item()
            if found.dtype == of.dtype:
                return self._call(torch.full_like, like, number)
            made = self._call(torch.full_like, like, number, dtype=found.dtype)
            self._filled[id(made)] = (like, number)
            return made
        if name not in _OF_TWO or len(rest) != 1:
            return None
        if not isinstance(rest[0], Tensor):
            return self._recorder.handed_out(of) if numbers[0] == _NOTHING[name] else None
        if rest[0].dtype != of.dtype:
            return None
        if torch.broadcast_shapes(of.shape, rest[0].shape) != of.shape:
            return None
        if numbers[0] == _NOTHING[name]:
            return self._recorder.handed_out(of)
        return self._call(func, of, numbers[0])

    def _call(self, func: Callable[..., Any], *args: Any, **kwargs: Any) -> Tensor:
        made: Tensor = self._recorder.call(func, *args, **kwargs)
        return made

    def _sum_of_bits(self, entropy: Tensor, args: Any, kwargs: dict[str, Any]) -> Tensor | None:
        named = dict(zip(("dim", "keepdim"), args, strict=False)) | kwargs
        dim, keepdim = named.pop("dim", None), named.pop("keepdim", False)
        over = [*range(entropy.dim())] if dim is None or dim == [] else [dim] if isinstance(dim, int) else list(dim)
        over = [axis % entropy.dim() for axis in over]
        last = entropy.dim() - 1
        if named or last not in over:
            return None
        call = self._recorder.call
        logits, targets = self._cross_entropy[id(entropy)]
        if id(logits) in self._rank_one:
            before, change, weight = self._rank_one[id(logits)]
            before = call(Tensor.squeeze, before, 0) if before.dim() == change.dim() else before
            lead = call(Tensor.movedim, call(Tensor.squeeze, change, -1), 0, -1)
            weight = call(Tensor.reshape, weight, (weight.shape[0], weight.shape[-1]))
            grown = call(LOG_RATIO_OF_BITS, before, lead, weight, targets, None)
            found = call(torch.add, call(Tensor.movedim, grown, -1, 0), call(runtime.log_prob_of_bits, before, targets))
        else:
            found = call(runtime.log_prob_of_bits, logits, targets)
        if rest := [axis for axis in over if axis != last]:
            found = call(torch.sum, found, rest, keepdim=keepdim)
        if keepdim:
            found = call(Tensor.unsqueeze, found, -1)
        return call(torch.neg, found)  # type: ignore[no-any-return]

    def _all_rows(self, tensor: Tensor, index: Any) -> Tensor | None:
        """A view of ``tensor`` where ``index`` counts through all of its rows."""
        rows = index[0] if isinstance(index, tuple) and len(index) == 1 else index
        if not isinstance(rows, Tensor) or rows.dim() == 0 or tensor.dim() == 0 or rows.numel() != len(tensor):
            return None
        known = self._recorder.value_of(rows)
        if known is None or known.dtype != torch.int64:
            return None
        from scg.backends.recorder import compile_time

        with compile_time():
            if known.flatten().tolist() != [*range(len(tensor))]:
                return None
        view: Tensor = self._recorder.call(torch.Tensor.reshape, tensor, (*rows.shape, *tensor.shape[1:]))
        return view

    def _table(self, func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Tensor | None:
        plain = all(isinstance(item, (int, float, bool, list, tuple)) for item in args)
        if not plain or kwargs.get("requires_grad"):
            return None
        from scg.backends.recorder import compile_time

        with compile_time():
            made: Tensor = func(*args, **kwargs)
            if made.numel() > _LARGEST_TABLE:
                return None
            key = (made.dtype, made.device, made.shape, repr(made.tolist()))
        if key not in self._tables:
            self._tables[key] = self._recorder.constant(made)
            if key[-1] == "True":
                self._true.add(id(self._tables[key]))
        return self._tables[key]


def _adds_nothing(tensor: Tensor, dim: Any, keepdim: bool = False) -> bool:
    """Whether a sum goes along dims of size 1 alone."""
    over = [dim] if isinstance(dim, int) else dim
    many = tensor.is_floating_point() and tensor.dim() > 0 and bool(over)
    return many and all(tensor.shape[axis] == 1 for axis in over)


def _is_rank_one(before: Tensor, change: Tensor, weight: Tensor) -> bool:
    """``[*N, J]``, ``[rows, *N, 1]`` and ``[rows, 1…, J]``: each row moves all of ``N`` along one direction."""
    if change.dim() < 2 or weight.dim() != change.dim() or before.dim() not in (change.dim(), change.dim() - 1):
        return False
    along = weight.shape[0] * weight.shape[-1] == weight.numel() and before.shape[-1] == weight.shape[-1]
    fixed = before.shape if before.dim() < change.dim() else before.shape[1:]
    return along and before.numel() == fixed.numel() and change.shape == (len(weight), *fixed[:-1], 1)


def _moves_nothing(name: str, tensor: Tensor, where: Any) -> bool:
    if name == "permute":
        order = where[0] if len(where) == 1 and not isinstance(where[0], int) else where
        return list(order) == [*range(tensor.dim())]
    if name == "movedim" and len(where) == 2:
        source, target = ([item] if isinstance(item, int) else list(item) for item in where)
        return [dim % tensor.dim() for dim in source] == [dim % tensor.dim() for dim in target]
    return False

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
f(x, y).gather(0, i) ->  f(x.gather(0, i), y.gather(0, i))      of few elements: see `gathers`
sum(bce(x, t), -1)   ->  -log_prob_of_bits(x, t)     for many rows of x without gradient: one exponential an element
bernoulli(p)         ->  |ceil(p - rand)|  of many elements on a processor, where rand takes a third of the time
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from scg.backends import runtime
from scg.backends.gathers import ELEMENTWISE, gathered
from scg.backends.log_ratio import LOG_RATIO_OF_BITS

if TYPE_CHECKING:
    from scg.backends.recorder import Recorder

_NEGATIONS = {"neg", "__neg__", "negative"}
_SUMS = {"sum", "mean"}
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
_MANY_DRAWS = 1536
"""Elements from which on a few quick kernels take less time than the one that draws an element at a time."""
_VIEWS = {"detach", "expand", "expand_as", "reshape", "view", "unsqueeze", "squeeze", "movedim", "permute", "transpose"}


class _Call(NamedTuple):
    """A call on a tensor, not yet recorded."""

    func: Callable[..., Any]
    name: str
    args: Any
    kwargs: dict[str, Any]


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
        self._elementwise: dict[int, tuple[Any, ...]] = {}
        """Of results of elementwise calls: the function and its arguments."""
        self._cross_entropy: dict[int, tuple[Tensor, Tensor]] = {}
        """Logits and targets of the binary cross entropies without gradient."""
        self._probabilities: set[int] = set()
        """Sigmoids: from 0 to 1 whatever the parameters are."""
        self._sums: dict[int, Tensor] = {}
        """What a tensor is a sum of, along some dims."""

    def simpler(self, func: Callable[..., Any], name: str, args: Any, kwargs: dict[str, Any]) -> Any:
        """The result of an equal, simpler call; None where there is none."""
        if func in _TABLES:
            return self._table(func, args, kwargs)
        if not args or not isinstance(args[0], Tensor):
            return None
        call = _Call(func, name, args, kwargs)
        found = (rule(self, call) for rule in _RULES.get(name, ()))
        return next((result for result in found if result is not None), None)

    def summed(self, tensor: Tensor) -> Tensor:
        """What ``tensor`` is a sum of, along some dims; else itself."""
        return self._sums.get(id(tensor), tensor)

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
        if name == "sigmoid" or (name in _VIEWS and id(args[0]) in self._probabilities):
            self._probabilities.add(id(out))
        if name == "sum" and args[0].dtype == out.dtype:
            self._sums[id(out)] = args[0]
        if name in ELEMENTWISE and not kwargs and (len(args) < 5 or args[2:] == (None, None, 0)):
            self._elementwise[id(out)] = (func, *args)
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
        self._negated, self._sums = (
            {
                key: of
                for key, of in table.items()
                if key != id(tensor) and of.untyped_storage()._cdata != memory  # it may be a view of it
            }
            for table in (self._negated, self._sums)
        )
        self._normalizers = {
            key: found for key, found in self._normalizers.items() if key != id(tensor) and found[0] is not tensor
        }
        self._filled.pop(id(tensor), None)
        self._probabilities.discard(id(tensor))
        tables: list[dict[int, Any]] = [
            self._expanded,
            self._unsqueezed,
            self._rank_one,
            self._elementwise,
            self._cross_entropy,
        ]
        for table in tables:
            for key, of in list(table.items()):
                if key == id(tensor) or any(part is tensor for part in (of if isinstance(of, tuple) else (of,))):
                    del table[key]

    # -- rules ----------------------------------------------------------------------------------------------------
    def _scalar_filled(self, call: _Call) -> Tensor | None:
        first = call.args[0]
        if first.dim() or call.kwargs.get("requires_grad"):
            return None
        made = {key: call.kwargs.get(key) or getattr(first, key) for key in ("dtype", "device")}
        return self._table(torch.tensor, (_FILLED[call.name],), made)

    def _first_row(self, call: _Call) -> Tensor | None:
        first, index = call.args
        if type(index) is not int or index or id(first) not in self._unsqueezed:
            return None
        return self._recorder.handed_out(self._unsqueezed[id(first)])

    def _all_rows(self, call: _Call) -> Tensor | None:
        """A view of the tensor where the index counts through all of its rows."""
        tensor, index = call.args
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
        return self._call(torch.Tensor.reshape, tensor, (*rows.shape, *tensor.shape[1:]))

    def _of_filled(self, call: _Call) -> Tensor | None:
        """The result of a call on tensors that hold one number, without them."""
        func, name, (of, *rest), kwargs = call
        if kwargs or not all(isinstance(arg, (Tensor, int, float)) for arg in rest):
            return None
        if name == "all":
            known = not rest and id(of) in self._filled
            return self._table(torch.tensor, (bool(self._filled[id(of)][1]),), {"device": of.device}) if known else None
        if not of.is_floating_point():
            return None
        numbers = [self._filled[id(arg)][1] if id(arg) in self._filled else arg for arg in rest]
        if any(isinstance(number, Tensor) for number in numbers):
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

    def _and_true(self, call: _Call) -> Tensor | None:
        if call.kwargs or not any(id(arg) in self._true for arg in call.args):
            return None
        other: Tensor = call.args[1 if id(call.args[0]) in self._true else 0]
        return other if other.dtype == torch.bool else None

    def _where_true(self, call: _Call) -> Tensor | None:
        if id(call.args[0]) not in self._true or len(call.args) != 3:
            return None
        _, chosen, other = call.args
        return chosen if isinstance(chosen, Tensor) and isinstance(other, float) else None

    def _log_softmax(self, call: _Call) -> Tensor | None:
        if call.kwargs or len(call.args) != 2:
            return None
        of, dim = self._normalizers.get(id(call.args[1]), (None, 0))
        return self._call(torch.log_softmax, of, dim) if of is call.args[0] else None

    def _opposite(self, call: _Call) -> Tensor | None:
        """With one negation less."""
        if call.kwargs or len(call.args) != 2 or not call.args[0].is_floating_point():
            return None
        left, right = call.args
        if call.name == "mul":
            return self._call(torch.neg, left) if isinstance(right, (int, float)) and right == -1 else None
        if not isinstance(right, Tensor) or not right.is_floating_point():
            return None
        if id(right) in self._negated:
            return self._call(_OPPOSITE[call.name], left, self._negated[id(right)])
        if call.name == "add" and id(left) in self._negated:
            return self._call(torch.sub, right, self._negated[id(left)])
        return None

    def _negated_twice(self, call: _Call) -> Tensor | None:
        return self._negated.get(id(call.args[0]))

    def _sum_of_negated(self, call: _Call) -> Tensor | None:
        inner = self._negated.get(id(call.args[0]))
        if inner is None:
            return None
        return self._call(torch.neg, self._call(call.func, inner, *call.args[1:], **call.kwargs))

    def _sum_of_one(self, call: _Call) -> Tensor | None:
        """Along dims of size 1 alone."""
        tensor, *where = call.args
        if call.kwargs or not where or not tensor.is_floating_point() or tensor.dim() == 0:
            return None
        over = [where[0]] if isinstance(where[0], int) else where[0]
        if not over or any(tensor.shape[axis] != 1 for axis in over):
            return None
        keepdim = where[1:] == [True]
        return self._recorder.handed_out(tensor) if keepdim else self._call(Tensor.squeeze, tensor, where[0])

    def _sum_of_bits(self, call: _Call) -> Tensor | None:
        entropy, *where = call.args
        if id(entropy) not in self._cross_entropy:
            return None
        named = dict(zip(("dim", "keepdim"), where, strict=False)) | call.kwargs
        dim, keepdim = named.pop("dim", None), named.pop("keepdim", False)
        over = [*range(entropy.dim())] if dim is None or dim == [] else [dim] if isinstance(dim, int) else list(dim)
        over = [axis % entropy.dim() for axis in over]
        last = entropy.dim() - 1
        if named or last not in over:
            return None
        logits, targets = self._cross_entropy[id(entropy)]
        if id(logits) in self._rank_one:
            found = self._of_rank_one(*self._rank_one[id(logits)], targets)
        else:
            found = self._call(runtime.log_prob_of_bits, logits, targets)
        if rest := [axis for axis in over if axis != last]:
            found = self._call(torch.sum, found, rest, keepdim=keepdim)
        if keepdim:
            found = self._call(Tensor.unsqueeze, found, -1)
        return self._call(torch.neg, found)

    def _of_rank_one(self, before: Tensor, change: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        """Log-probability of bits at ``before + change * weight``, from the one before the change."""
        call = self._call
        before = call(Tensor.squeeze, before, 0) if before.dim() == change.dim() else before
        lead = call(Tensor.movedim, call(Tensor.squeeze, change, -1), 0, -1)
        weight = call(Tensor.reshape, weight, (weight.shape[0], weight.shape[-1]))
        grown = call(LOG_RATIO_OF_BITS, before, lead, weight, targets)
        return call(torch.add, call(Tensor.movedim, grown, -1, 0), call(runtime.log_prob_of_bits, before, targets))

    def _of_gathered(self, call: _Call) -> Tensor | None:
        made = self._elementwise.get(id(call.args[0]))
        return (
            None if made is None or call.kwargs else gathered(self._recorder.call, call.args[0], made, *call.args[1:])
        )

    def _without_gradient(self, call: _Call) -> Tensor | None:
        return None if call.kwargs or call.args[0].requires_grad else self._recorder.handed_out(call.args[0])

    def _unmoved(self, call: _Call) -> Tensor | None:
        tensor, *where = call.args
        return tensor if not call.kwargs and _moves_nothing(call.name, tensor, where) else None

    def _compared(self, call: _Call) -> Tensor | None:
        """1 where p exceeds a uniform number, NaN where it is NaN; as exact as ``torch.bernoulli``, of 53 bits too."""
        p = call.args[0]
        if call.kwargs or len(call.args) > 1 or id(p) not in self._probabilities:
            return None  # what may be no probability is refused at run time
        if not self._recorder.eager or p.device.type != "cpu" or p.numel() < _MANY_DRAWS:
            return None
        above = self._call(torch.sub, p, self._call(torch.rand_like, p, dtype=torch.float64))
        return self._call(Tensor.to, self._call(torch.abs, self._call(torch.ceil, above)), p.dtype)

    def _call(self, func: Callable[..., Any], *args: Any, **kwargs: Any) -> Tensor:
        made: Tensor = self._recorder.call(func, *args, **kwargs)
        return made

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


_Rule = Callable[[Peephole, _Call], "Tensor | None"]

_RULES: dict[str, tuple[_Rule, ...]] = {
    **dict.fromkeys(_FILLED, (Peephole._scalar_filled,)),
    **dict.fromkeys(("all", *_OF_ONE, *_OF_TWO), (Peephole._of_filled,)),
    **dict.fromkeys(("add", "mul"), (Peephole._of_filled, Peephole._opposite)),
    "sub": (Peephole._of_filled, Peephole._log_softmax, Peephole._opposite),
    "neg": (Peephole._of_filled, Peephole._negated_twice),
    **dict.fromkeys(_NEGATIONS - {"neg"}, (Peephole._negated_twice,)),
    "sum": (Peephole._sum_of_negated, Peephole._sum_of_one, Peephole._sum_of_bits),
    "mean": (Peephole._sum_of_negated,),
    "__getitem__": (Peephole._first_row, Peephole._all_rows),
    "logical_and": (Peephole._and_true,),
    "where": (Peephole._where_true,),
    "detach": (Peephole._without_gradient,),
    "gather": (Peephole._of_gathered,),
    **dict.fromkeys(("permute", "movedim"), (Peephole._unmoved,)),
    "bernoulli": (Peephole._compared,),
}
"""By the function's name, in the order in which they are tried."""

"""How bounds move through operations: one rule a kind of the operation table.

A *depth* tensor has the shape of a value; element ``a`` holds a number below zero, the smaller the further down the
bound of what ``a`` reads, or zero if ``a`` reads nothing of the site. Lower bounds are ``lo - FAR``, upper bounds
``-hi - FAR``, so that one rule serves both ends, a join is a minimum, and whatever pads with zeros pads with "nothing".
Each rule is the operation itself with sums and products replaced by minima::

    add(x, y)          -> minimum(x, y)
    flip(x, dims)      -> flip(x, dims)
    softmax(x, dim)    -> x.amin(dim, keepdim=True).expand(x.shape)
    cumsum(x, dim)     -> x.cummin(dim)
    mm(x, y)           -> minimum(x.amin(1)[:, None], y.amin(0)[None, :])
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, reduce
from typing import Any

import torch
from torch import Tensor

from scg.ir import Ref, TensorType, map_refs, refs_in
from scg.operations import Operation, packet_name

Shape = tuple[int, ...]
Depths = Sequence[Tensor | None]
"""One depth tensor an output; None: it reads nothing."""


class Unknown(Exception):
    """The rule cannot follow this use of the operation; the caller decomposes it or assumes that all reads all."""


@dataclass(frozen=True)
class Call:
    """One operation as its rule sees it: bound arguments, and depths instead of values."""

    op: Operation
    target: Callable[..., Any]
    named: Mapping[str, Any]
    """Arguments by their names in the schema."""
    types: Mapping[Ref, TensorType]
    """Of the tensors read."""
    depths: Mapping[Ref, Tensor]
    """Of those that the site influences."""
    constant: Callable[[Ref], Any]
    """The value of an input known at compile time, else None."""
    outputs: tuple[Shape, ...]

    def __getitem__(self, name: str) -> Any:
        return self.named.get(name)

    def shape(self, ref: Ref) -> Shape:
        return self.types[ref].shape

    def depth(self, name: str) -> Tensor:
        """Depth of the tensor argument ``name``: zeros where nothing is read."""
        return self.depth_of(self[name])

    def depth_of(self, ref: Any) -> Tensor:
        if not isinstance(ref, Ref):
            return nothing(())
        found = self.depths.get(ref)
        return found if found is not None else nothing(self.shape(ref))

    def tensors(self, *skip: str) -> list[Ref]:
        """The influenced tensor arguments, but those named."""
        refs = refs_in([value for name, value in self.named.items() if name not in skip])
        return [ref for ref in refs if ref in self.depths]

    def others(self, *skip: str) -> list[Tensor]:
        """Depths of the influenced tensor arguments, but those named."""
        return [self.depths[ref] for ref in self.tensors(*skip)]

    @property
    def out(self) -> Shape:
        return self.outputs[0]

    def numbers(self, name: str, count: int, default: int) -> list[int]:
        """An int-or-list argument of window operations as ``count`` numbers."""
        value = self[name]
        if value is None or value == []:
            return [default] * count
        if isinstance(value, int):
            return [value] * count
        return list(value) * (count if len(value) == 1 else 1)


# -- helpers on depths --------------------------------------------------------------------------------------------
@lru_cache(maxsize=1024)
def nothing(shape: Shape) -> Tensor:
    """The depth tensor of a value that reads nothing; kept, as rules never write."""
    return torch.zeros((), dtype=torch.float64, device="cpu").expand(shape)


def tight(x: Tensor) -> Tensor:
    """``x`` with size 1 along every dim it is constant over by its strides."""
    for dim, (size, stride) in enumerate(zip(x.shape, x.stride(), strict=True)):
        if stride == 0 and size > 1:
            x = x.narrow(dim, 0, 1)
    return x


def join(items: Iterable[Tensor], shape: Shape) -> Tensor:
    """The union of what several tensors, broadcast from the right, read."""
    return reduce(torch.minimum, map(tight, items), torch.zeros((), dtype=torch.float64, device="cpu")).expand(shape)


def squash(x: Tensor, dims: Sequence[int] | None) -> Tensor:
    """What all elements along ``dims`` read together, sizes 1 kept."""
    x = tight(x)
    if x.ndim == 0 or dims is not None and not len(dims):
        return x
    return x.amin(tuple(range(x.ndim)) if dims is None else tuple(dims), keepdim=True)


def put_left(x: Tensor, shape: Shape) -> Tensor:
    """Expands ``x``, aligned at its left, to ``shape``."""
    return x.reshape(x.shape + (1,) * (len(shape) - x.ndim)).expand(shape)


def everything(depths: Iterable[Tensor], outputs: Sequence[Shape]) -> Depths:
    """Every output element reads whatever any operand reads: the sound answer where nothing is known."""
    whole = reduce(torch.minimum, (tight(x).amin() for x in depths))
    return [whole.expand(shape) for shape in outputs]


def _dims(call: Call, ndim: int) -> list[int]:
    """The dims a reduction, mix or scan works on."""
    dims = call[call.op.dims] if isinstance(call.op.dims, str) else call.op.dims
    if dims is None or dims == []:
        return list(range(ndim))
    listed = [dims] if isinstance(dims, int) else dims
    return sorted({d % max(ndim, 1) for d in listed}) if ndim else []


# -- rules --------------------------------------------------------------------------------------------------------
def pointwise(call: Call) -> Depths:
    return [join(call.others(), shape) for shape in call.outputs]


def loss(call: Call) -> Depths:
    """Elementwise, and one number of all unless ``reduction`` is 0 (none)."""
    if call["reduction"] == 0:
        return pointwise(call)
    return everything(call.others(), call.outputs)


def composite(call: Call) -> Depths:
    raise Unknown("to be taken apart")


def choice(call: Call) -> Depths:
    """where(condition, self, other), masked_fill(self, mask, value): a constant mask says who is read."""
    name, yes, no = ("mask", "value", "self") if "mask" in call.named else ("condition", "self", "other")
    mask = call.constant(call[name]) if isinstance(call[name], Ref) else None
    if mask is None:
        return pointwise(call)
    return [torch.where(mask, call.depth(yes), call.depth(no)).expand(call.out)]


_DATA = frozenset({"self", "tensors", "src", "input"})
"""The arguments of movements whose elements are moved; the values of all others steer."""


_RESHAPES = frozenset("_unsafe_view flatten ravel reshape reshape_as unflatten view view_as view_copy".split())
"""Movements that keep the order of elements: a depth tensor is expanded, and could not always be viewed."""


def movement(call: Call) -> Depths:
    """The operation itself, on depths."""
    if packet_name(call.target) in _RESHAPES:
        return [call.depth("self").reshape(call.out)]

    def known(ref: Ref) -> Any:
        value = call.constant(ref)
        if value is None:
            raise Unknown(f"the value of %{ref} is not known when compiling")
        return value

    arguments = {n: map_refs(call.depth_of if n in _DATA else known, v) for n, v in call.named.items() if n != "other"}
    if "other" in call.named:  # only its shape counts: view_as, expand_as
        arguments["other"] = nothing(call.shape(call["other"]))
    if isinstance(arguments.get("value"), int | float):
        arguments["value"] = 0.0  # padding reads nothing
    schema = call.target._schema  # type: ignore[attr-defined]
    placed = [arguments.pop(arg.name) for arg in schema.arguments if not arg.kwarg_only]
    result = call.target(*placed, **arguments)
    return [result] if isinstance(result, Tensor) else list(result)


def reduction(call: Call) -> Depths:
    keepdim = bool(call["keepdim"])
    total = nothing(())
    for ref in call.tensors():
        x = call.depths[ref]
        dims = _dims(call, x.ndim)
        kept = squash(x, dims)
        if not keepdim:
            for d in reversed(dims):
                kept = kept.squeeze(d)
        total = torch.minimum(total, kept)
    if keepdim or total.ndim == len(call.out):
        return [total.expand(shape) for shape in call.outputs]
    raise Unknown("the result has another rank than a reduction's")


def mix(call: Call) -> Depths:
    """All along the dims read all along the dims; the output may have another size there (topk, fft)."""
    total = nothing(())
    for x in call.others():
        dims = range(2, x.ndim) if call.op.dims == "spatial" else _dims(call, x.ndim)
        total = torch.minimum(total, squash(x, list(dims)))
    if any(len(shape) != total.ndim for shape in call.outputs):
        raise Unknown("the result has another rank than its operand")
    return [total.expand(shape) for shape in call.outputs]


def scan(call: Call) -> Depths:
    x = call.depths[call.tensors()[0]]
    if x.ndim == 0 or x.stride(_dims(call, x.ndim)[0]) == 0:
        return [x for _ in call.outputs]
    return [x.cummin(_dims(call, x.ndim)[0]).values for _ in call.outputs]


# -- contractions
def contraction(call: Call) -> Depths:
    name = packet_name(call.target)
    if name == "einsum":
        terms, output = call["equation"].replace(" ", "").partition("->")[::2]
        labels, operands = terms.split(","), list(call["tensors"])
        if "->" not in call["equation"]:
            letters = sorted(set(terms) - set(",."))
            output = "..." * ("..." in terms) + "".join(c for c in letters if terms.count(c) == 1)
        return [_contract(call, zip(operands, labels, strict=True), output, ())]
    if name == "tensordot":
        return [_contract(call, *_tensordot(call))]
    if name == "matmul":
        return [_contract(call, *_matmul(call))]
    inputs, _, output = call.op.equation.partition("->")
    pairs = [(term.split() + [""])[:2] for term in inputs.split(",")]
    rest = call.others(*(argument for argument, _ in pairs))
    return [_contract(call, ((call[argument], labels) for argument, labels in pairs), output.strip(), rest)]


def _contract(call: Call, operands: Iterable[tuple[Any, str]], output: str, rest: Iterable[Tensor] = ()) -> Tensor:
    """Each operand is joined over the labels that the output lacks and laid along those it has."""
    named = output.replace("...", "")
    wide = len(call.out) - len(named)
    order = _spread(output, wide)
    parts = list(rest)
    for ref, labels in operands:
        if not isinstance(ref, Ref):
            continue
        if len(call.shape(ref)) < len(labels.replace("...", "")):
            raise Unknown("an operand of lower rank than the contraction's")
        if ref not in call.depths:
            continue
        x = tight(call.depths[ref])
        own = _spread(labels, x.ndim - len(labels.replace("...", "")))
        for label in sorted(set(own)):  # a repeated label reads the diagonal: keeping its hull is sound and simple
            while own.count(label) > 1:
                first = own.index(label)
                second = own.index(label, first + 1)
                x = x.expand(call.shape(ref)).diagonal(dim1=first, dim2=second).movedim(-1, 0)
                own = [label, *(o for i, o in enumerate(own) if i not in (first, second))]
        x = squash(x, [i for i, label in enumerate(own) if label not in order])
        for i in reversed(range(len(own))):
            if own[i] not in order:
                x = x.squeeze(i)
        own = [label for label in own if label in order]
        x = x.permute([own.index(label) for label in order if label in own])
        for i, label in enumerate(order):
            if label not in own:
                x = x.unsqueeze(i)
        parts.append(x)
    return join(parts, call.out)


def _spread(labels: str, wide: int) -> list[str]:
    """``...ij`` as one label a dim; the dims of an ellipsis are numbered from the right."""
    front, dots, back = labels.partition("...")
    numbers = [str(wide - i) for i in range(wide)] if dots else []
    return [*front, *numbers, *back]


def _matmul(call: Call) -> tuple[list[tuple[Any, str]], str]:
    left, right = call["self"], call["other"]
    a = "k" if len(call.shape(left)) == 1 else "...ik"
    b = "k" if len(call.shape(right)) == 1 else "...kj"
    return [(left, a), (right, b)], "..." + "i" * ("i" in a) + "j" * ("j" in b)


def _tensordot(call: Call) -> tuple[list[tuple[Any, str]], str]:
    left, right = call["self"], call["other"]
    n, m = len(call.shape(left)), len(call.shape(right))
    a = [chr(97 + i) for i in range(n)]
    b = [chr(97 + n + i) for i in range(m)]
    for i, j in zip(call["dims_self"], call["dims_other"], strict=True):
        b[j % m] = a[i % n]
    output = [c for c in a if c not in b] + [c for c in b if c not in a]
    return [(left, "".join(a)), (right, "".join(b))], "".join(output)


def kron(call: Call) -> Depths:
    n = len(call.out)
    left, right = (x.reshape((1,) * (n - x.ndim) + x.shape) for x in (call.depth("self"), call.depth("other")))
    for d in range(n):
        size = right.shape[d]
        right = right.repeat([left.shape[d] if i == d else 1 for i in range(n)])
        left = left.repeat_interleave(size, d)
    return [torch.minimum(left, right)]


# -- windows
def _window(x: Tensor, dim: int, out: int, span: int, stride: int, before: int, step: int) -> Tensor:
    """Joins the windows ``[o * stride - before, … + span)`` of every ``step``-th element; 0 beyond the edges."""
    if x.shape[dim] == 1 or x.stride(dim) == 0:
        return x.narrow(dim, 0, 1)
    x = x.movedim(dim, -1)
    after = (out - 1) * stride + span - (x.shape[-1] + before)
    x = torch.nn.functional.pad(x, (before, after)).unfold(-1, span, stride)[..., ::step].amin(-1)
    return x.movedim(-1, dim)


def _channels(x: Tensor, out_channels: int, groups: int) -> Tensor:
    """Dim 1: each output channel reads all input channels of its group."""
    if x.shape[1] == 1:
        return x
    x = x.unflatten(1, (groups, x.shape[1] // groups)).amin(2)
    return x.repeat_interleave(out_channels // groups, 1)


def convolution(call: Call) -> Depths:
    if call["transposed"]:
        return transposed_convolution(call)
    kernel = call.shape(call["weight"])[2:]
    n = len(kernel)
    out = call.out if len(call.out) == n + 2 else (1, *call.out)
    stride, dilation = call.numbers("stride", n, 1), call.numbers("dilation", n, 1)
    if isinstance(call["padding"], str):
        same = call["padding"] == "same"
        padding = [d * (k - 1) // 2 if same else 0 for d, k in zip(dilation, kernel, strict=True)]
    else:
        padding = call.numbers("padding", n, 0)

    def spatial(x: Tensor) -> Tensor:
        for i in range(n):
            span = dilation[i] * (kernel[i] - 1) + 1
            x = _window(x, 2 + i, out[2 + i], span, stride[i], padding[i], dilation[i])
        return x

    return [_convolve(call, n, spatial, out)]


def transposed_convolution(call: Call) -> Depths:
    kernel = call.shape(call["weight"])[2:]
    n = len(kernel)
    out = call.out if len(call.out) == n + 2 else (1, *call.out)
    stride, dilation, padding = (call.numbers(*a) for a in (("stride", n, 1), ("dilation", n, 1), ("padding", n, 0)))

    def spatial(x: Tensor) -> Tensor:
        for i in range(n):
            if x.shape[2 + i] == 1:
                continue
            reach = dilation[i] * (kernel[i] - 1)
            spaced = x.new_zeros([(s - 1) * stride[i] + 1 if d == 2 + i else s for d, s in enumerate(x.shape)])
            spaced = spaced.slice_scatter(x, 2 + i, 0, None, stride[i])
            x = _window(spaced, 2 + i, out[2 + i], reach + 1, 1, reach - padding[i], dilation[i])
        return x

    return [_convolve(call, n, spatial, out)]


def _convolve(call: Call, n: int, spatial: Callable[[Tensor], Tensor], out: Shape) -> Tensor:
    parts = []
    data = call["input"]
    if data in call.depths:
        x = tight(call.depths[data])
        x = x if x.ndim == n + 2 else x.unsqueeze(0)
        parts.append(_channels(spatial(x), out[1], call["groups"] or 1))
    weight = call["weight"]
    if weight in call.depths:
        # Of a transposed convolution the output channels are not the weight's first dim: join all.
        mixed = len(call.outputs) > 1 or call.op.kind == "transposed_convolution" or call["transposed"]
        dims = None if mixed else range(1, n + 2)
        parts.append(squash(call.depths[weight], dims if dims is None else list(dims)).reshape(1, -1, *[1] * n))
    if isinstance(call["bias"], Ref) and call["bias"] in call.depths:
        parts.append(tight(call.depths[call["bias"]]).reshape(1, -1, *[1] * n))
    return join(parts, out).reshape(call.out)


def pool(call: Call) -> Depths:
    (x,) = call.others()
    name = packet_name(call.target) or ""
    n = next(k for k in (1, 2, 3) if f"{k}d" in name)
    kernel = call.numbers("kernel_size", n, 1)
    padding, dilation = call.numbers("padding", n, 0), call.numbers("dilation", n, 1)
    stride = kernel if call["stride"] in (None, []) else call.numbers("stride", n, 1)
    x = tight(x)
    for i in range(n):
        dim = x.ndim - n + i
        x = _window(x, dim, call.out[dim], dilation[i] * (kernel[i] - 1) + 1, stride[i], padding[i], dilation[i])
    return [x.expand(shape) for shape in call.outputs]


def adaptive_pool(call: Call) -> Depths:
    (x,) = call.others()
    name = packet_name(call.target) or ""
    n = next(k for k in (1, 2, 3) if f"{k}d" in name)
    x = tight(x)
    for dim in range(x.ndim - n, x.ndim):
        size, out = x.shape[dim], call.out[dim]
        if size > 1:
            bounds = [(i * size // out, -(-(i + 1) * size // out)) for i in range(out)]
            x = torch.stack([x.narrow(dim, a, b - a).amin(dim) for a, b in bounds], dim)
    return [x.expand(shape) for shape in call.outputs]


def resize(call: Call) -> Depths:
    (x,) = call.others()
    return [squash(x, range(2, x.ndim)).expand(call.out)]


# -- indexing: what is known of the indices is followed, along an unknown index everything is read
def loosen(x: Tensor) -> Tensor:
    """The same depths with stride 0 along every dim over which they do not vary."""
    for dim, size in enumerate(x.shape):
        if size > 1 and x.stride(dim) != 0 and bool((x == x.narrow(dim, 0, 1)).all()):
            x = x.narrow(dim, 0, 1).expand(x.shape)
    return x


def index(call: Call) -> Depths:
    """x[i, j]: a known index picks; along an unknown one the whole dim is read, and so is the index itself."""
    entries = list(call["indices"])
    shape = call.shape(call["self"])
    picks: list[Tensor | None] = []
    unknown: list[int] = []
    dim = 0
    for entry in entries:
        if entry is None:
            picks.append(None)
            dim += 1
            continue
        value = call.constant(entry)
        if value is not None and value.dtype in (torch.bool, torch.uint8):
            picks.extend(value.nonzero(as_tuple=True))
            dim += value.ndim
            continue
        if value is None:
            if call.types[entry].dtype in (torch.bool, torch.uint8):
                raise Unknown("a mask that is not known when compiling")
            unknown.append(dim)
            value = torch.zeros(call.shape(entry), dtype=torch.int64, device="cpu")
        picks.append(value)
        dim += 1
    x = squash(call.depth("self"), unknown).expand(shape)
    result = x[tuple(slice(None) if pick is None else pick for pick in picks)]
    if steering := [call.depths[e] for e in entries if e is not None and e in call.depths]:
        placed = [i for i, pick in enumerate(picks) if pick is not None]
        common = torch.broadcast_shapes(*(pick.shape for pick in picks if pick is not None))
        adjacent = placed == list(range(placed[0], placed[-1] + 1))
        start = placed[0] if adjacent else 0
        own = join(steering, common)
        result = torch.minimum(result, own.reshape(common + (1,) * (result.ndim - start - len(common))))
    return [result]


def gather(call: Call) -> Depths:
    x, places = call.depth("self"), call["index"]
    shape = call.shape(places)
    value = call.constant(places)
    dim = call["dim"] % max(x.ndim, 1)
    if x.ndim == 0:
        return everything(call.others(), call.outputs)
    if value is None:
        x = squash(x, [dim]).expand(x.shape)
        value = torch.zeros(shape, dtype=torch.int64, device="cpu")
    return [torch.minimum(x.gather(dim, value), call.depth_of(places))]


def index_select(call: Call) -> Depths:
    x, places = call.depth("self"), call["index"]
    dim = call["dim"] % max(x.ndim, 1)
    value = call.constant(places)
    if x.ndim == 0:
        return everything(call.others(), call.outputs)
    x = squash(x, [dim]) if value is None else x.index_select(dim, value)
    own = call.depth_of(places).reshape([-1] + [1] * (x.ndim - 1 - dim))
    return [join([x, own], call.out)]


def embedding(call: Call) -> Depths:
    table, places = call.depth("weight"), call["indices"]
    value = call.constant(places)
    rows = squash(table, [0]).squeeze(0) if value is None else table[value]
    return [join([rows, call.depth_of(places).unsqueeze(-1)], call.out)]


def spread(call: Call) -> Depths:
    return [put_left(call.depth("self"), call.out)]


def scatter(call: Call) -> Depths:
    """self with src written (or added, reduced) along ``dim`` at index."""
    x, source = call.depth("self"), call.depth_of(call["src"])
    value, dim = call.constant(call["index"]), call["dim"] % max(x.ndim, 1)
    if x.ndim == 0:
        return everything(call.others(), call.outputs)
    shape = call.shape(call["index"])
    source = source[tuple(slice(n) for n in shape)] if source.ndim else source.expand(shape)
    source = torch.minimum(source, call.depth("index"))
    if value is None:
        source = squash(source, [dim])
        padded = torch.zeros([1 if d == dim else n for d, n in enumerate(call.out)], dtype=torch.float64, device="cpu")
        padded[tuple(slice(None if d == dim else n) for d, n in enumerate(shape))] = source.expand(
            [1 if d == dim else n for d, n in enumerate(shape)]
        )
        return [join([x, padded], call.out)]
    if packet_name(call.target) == "scatter" and call["reduce"] is None:
        x = x.scatter(dim, value, 0.0)
    return [x.scatter_reduce(dim, value, source.contiguous(), "amin")]


def index_write(call: Call) -> Depths:
    """self with slices of source added, copied or filled in along ``dim`` at index."""
    x, places = call.depth("self"), call["index"]
    value, dim = call.constant(places), call["dim"] % max(x.ndim, 1)
    if x.ndim == 0:
        return everything(call.others(), call.outputs)
    written = call["source"] if call["source"] is not None else call["value"]
    source = join(
        [call.depth_of(written), call.depth_of(places).reshape([-1] + [1] * (x.ndim - 1 - dim))],
        tuple(math.prod(call.shape(places)) if d == dim else n for d, n in enumerate(x.shape)),
    )
    if value is None:
        return [join([x, squash(source, [dim])], call.out)]
    value = value.reshape(-1)
    if packet_name(call.target) in ("index_copy", "index_fill"):
        x = x.index_fill(dim, value, 0.0)
    return [x.index_reduce(dim, value, source.contiguous(), "amin")]


def index_put(call: Call) -> Depths:
    """self with values written at indices; an unknown index may write anywhere along its dim."""
    x = call.depth("self")
    entries = list(call["indices"])
    values = [None if e is None else call.constant(e) for e in entries]
    if any(e is not None and v is None for e, v in zip(entries, values, strict=True)):
        written = everything([*call.others("self"), nothing(())], [call.out])[0]
        assert written is not None
        return [join([x, written], call.out)]
    at = tuple(slice(None) if v is None else v for v in values)
    places = torch.arange(math.prod(x.shape), device="cpu").reshape(x.shape)[at]
    if not call["accumulate"]:
        x = x.index_put(
            [v if v is not None else None for v in values], torch.zeros((), dtype=torch.float64, device="cpu")
        )
    source = call.depth("values").expand(places.shape).reshape(-1)
    return [x.reshape(-1).scatter_reduce(0, places.reshape(-1), source, "amin").reshape(call.out)]


# -- layers
def layer_norm(call: Call) -> Depths:
    x = squash(call.depth("input"), range(-len(call["normalized_shape"]), 0))
    return [join([x, *call.others("input")], call.out), *(x.expand(shape) for shape in call.outputs[1:])]


def batch_norm(call: Call) -> Depths:
    x = call.depth("input")
    per_channel = [tight(depth).reshape(-1, *[1] * (x.ndim - 2)) for depth in call.others("input")]
    training = call["training"] or call["use_input_stats"]
    if packet_name(call.target) == "instance_norm":
        x = squash(x, range(2, x.ndim)) if training else x
    elif training:
        x = squash(x, [0, *range(2, x.ndim)])
    first = join([x, *per_channel], call.out)
    whole = [x, *per_channel]
    rest = [everything(whole, [shape])[0] for shape in call.outputs[1:]]
    return [first, *rest]


def group_norm(call: Call) -> Depths:
    x = call.depth("input")
    groups = call["num_groups"] or call["group"]
    per_channel = [tight(depth).reshape(-1, *[1] * (x.ndim - 2)) for depth in call.others("input")]
    grouped = x.unflatten(1, (groups, x.shape[1] // groups))
    own = squash(grouped, range(2, grouped.ndim))  # [N, groups, 1, ...]
    spread = own.expand([*own.shape[:2], x.shape[1] // groups, *own.shape[3:]]).flatten(1, 2)
    statistics = tight(own).flatten(2)[..., 0]
    return [join([spread, *per_channel], call.out), *(statistics.expand(shape) for shape in call.outputs[1:])]


def recurrent(call: Call) -> Depths:
    """gru, lstm: elements of the batch apart, time forwards (unless bidirectional), features all with all."""
    if call["input"] is None or call["batch_sizes"] is not None:
        raise Unknown("a packed sequence")
    time, batch = (1, 0) if call["batch_first"] else (0, 1)
    whole = [squash(call.depths[ref], None) for ref in refs_in([call["params"]]) if ref in call.depths]
    states = [call.depths[ref] for ref in refs_in([call["hx"]]) if ref in call.depths]
    if len(call.shape(call["input"])) != 3:
        raise Unknown("no batch dim")
    own = squash(call.depth("input"), [2])  # [time, batch, 1]
    for state in states:  # [layers, batch, features]
        start = squash(state, [0, 2])
        own = torch.minimum(own, start.movedim(1, batch))
    own = reduce(torch.minimum, [w.reshape(()) for w in whole], own)
    if call["bidirectional"]:
        own = squash(own, [time])
    elif own.shape[time] > 1:
        own = own.cummin(time).values
    last = squash(own, [time]).movedim(batch, 1).reshape(1, -1, 1)
    return [own.expand(call.outputs[0]), *(last.expand(shape) for shape in call.outputs[1:])]


def cell(call: Call) -> Depths:
    """One step of a recurrent layer: features all with all, weights everywhere."""
    inputs = refs_in([call["input"], call["hx"]])
    parts = [squash(call.depths[ref], [-1]) for ref in inputs if ref in call.depths]
    parts += [squash(call.depths[ref], None).reshape(()) for ref in call.tensors() if ref not in inputs]
    return [join(parts, shape) for shape in call.outputs]


def attention(call: Call) -> Depths:
    """out[l] reads q[l], every key and value (if causal, those up to l), and row l of the mask."""
    query, key, value = call["query"], call["key"], call["value"]
    if call["enable_gqa"]:
        raise Unknown("grouped heads")
    causal = bool(call["is_causal"])
    operands = [(query, "...le"), (call["attn_mask"], "...ls")]
    parts = [_contract(call, operands, "...lv")]
    for ref, labels in ((key, "...se"), (value, "...sv")):
        if ref not in call.depths:
            continue
        if not causal:
            parts.append(_contract(call, [(ref, labels)], "...lv"))
            continue
        x = call.depths[ref].cummin(-2).values
        rows = torch.arange(call.out[-2], device="cpu").clamp(max=x.shape[-2] - 1)
        x = x.index_select(-2, rows)
        parts.append(x.amin(-1, keepdim=True) if ref == key else x)
    first = join(parts, call.out)
    if len(call.outputs) > 1:
        return [first, *everything(call.others(), call.outputs[1:])]
    return [first]


def matrix(call: Call) -> Depths:
    """The trailing dims of each operand are read as a whole; leading dims are a batch, broadcast."""
    n = call.op.trailing
    if any(len(call.shape(ref)) < n for ref in call.tensors()):
        raise Unknown("an operand that is no matrix")
    wholes = [
        squash(x, range(x.ndim - n, x.ndim)).reshape(x.shape[:-n] if x.ndim > n else ())
        for x in map(tight, call.others())
    ]
    return [put_left(reduce(torch.minimum, wholes), shape) for shape in call.outputs]


def solve(call: Call) -> Depths:
    """A X = B: each system as a whole; B may be a batch of vectors."""
    shapes = [call.shape(call["A"]), call.shape(call["B"])]
    vector = len(shapes[1]) == 1 or shapes[1] == shapes[0][:-1]
    parts = []
    for name, trailing in (("A", 2), ("B", 1 if vector else 2)):
        x = squash(call.depth(name), range(-trailing, 0))
        parts.append(x.reshape(x.shape[:-trailing]))
    batch = reduce(torch.minimum, parts)
    return [put_left(batch, shape) for shape in call.outputs]


def search(call: Call) -> Depths:
    """bucketize(values, boundaries), searchsorted(sequence, values): each value among the whole of a sequence."""
    ordered = call.depth("boundaries" if "boundaries" in call.named else "sorted_sequence")
    if call["sorter"] is not None:
        raise Unknown("a sorter")
    return [join([squash(ordered, [-1]), call.depth("self")], call.out)]


def whole(call: Call) -> Depths:
    return everything(call.others(), call.outputs)


def no_reading(call: Call) -> Depths:
    return [None for _ in call.outputs]


RULES: dict[str, Callable[[Call], Depths]] = {
    "pointwise": pointwise,
    "choice": choice,
    "movement": movement,
    "reduction": reduction,
    "mix": mix,
    "contraction": contraction,
    "scan": scan,
    "convolution": convolution,
    "transposed_convolution": transposed_convolution,
    "pool": pool,
    "adaptive_pool": adaptive_pool,
    "resize": resize,
    "index": index,
    "gather": gather,
    "index_select": index_select,
    "embedding": embedding,
    "spread": spread,
    "scatter": scatter,
    "index_write": index_write,
    "index_put": index_put,
    "layer_norm": layer_norm,
    "batch_norm": batch_norm,
    "group_norm": group_norm,
    "recurrent": recurrent,
    "cell": cell,
    "attention": attention,
    "matrix": matrix,
    "kron": kron,
    "solve": solve,
    "search": search,
    "whole": whole,
    "loss": loss,
    "composite": composite,
    "nothing": no_reading,
}
"""The rule of each kind of operation."""

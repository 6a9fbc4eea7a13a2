"""Rows of a linear operation, each with one change of its operand: the result without a change, and what it adds.

    linear(z, w)   [G, B, H]   base[B, H] + change[B, G] * w[H, g]
    einsum("bnc,hnc->bh", z, w)   [N, B, H]   base[B, H] + change[B, n, C] @ w[H, n, C]
    z.sum(-1)      [G, B]      base[B] + change[B, G]

A rank-one update where the operation would be evaluated at every row: D times less work for D rows.
"""

from __future__ import annotations

import math
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from scg.backends.log_ratio import LOG_RATIO_OF_CLASS
from scg.backends.recorder import compile_time, record_call, record_constant
from scg.backends.sample_dims import Batched, SampleDims
from scg.ir import Graph, Op, Ref
from scg.operations import bind, is_linear, lookup, packet_name

_MEMBER = "~member"
"""Label of the positions that change together in one row; all labels but names of sample dims begin with a tilde."""


@dataclass(frozen=True)
class Change:
    """What rows change of one value."""

    ref: Ref
    amount: Batched
    """The change of every position, ``[*dims | *S]``; a row makes that of its own positions."""
    axes: tuple[int, ...]
    """Dims of ``S`` along which positions belong to different rows."""
    index: Tensor
    """Positions along ``axes``, flattened, that each row changes.  ``[rows, members]``"""
    names: tuple[str, ...]
    """Sample dims that the rows make up."""
    size: float | None = None
    """The absolute value of every change, where it is known."""


@dataclass(frozen=True)
class RankOne(Batched):
    """Rows ``[rows, *dims | *batch, size]`` that each move a value along one direction."""

    change: Batched = field(kw_only=True)
    """How far each row does.  ``[*dims | *batch, rows]``"""
    weight: Tensor = field(kw_only=True)
    """The directions.  ``[rows, size]``"""
    size: float | None = field(kw_only=True)
    """The absolute value of every change, where it is known."""


def linear_rows(
    graph: Graph, node: Op, change: Change, value: Callable[[Ref], Batched], base: Batched, dims: SampleDims
) -> Batched | None:
    """The value of ``node`` in all rows; None where it has to be evaluated in each.

    Args:
        graph: of ``node``.
        node: the operation.
        change: of its one operand that changes.
        value: its other operands.
        base: its value without any change.
        dims: the sample dims, those of the rows included.
    """
    if node.inputs.count(change.ref) != 1 or not is_linear(node, {change.ref}):
        return None
    if packet_name(node.target) in ("sum", "mean"):
        return _reduced(graph, node, change, base, dims)
    product = product_of(graph, node, change.ref)
    return None if product is None else _multiplied(product, change, value(product.other), base, dims)


def class_rows(node: Op, own: Mapping[str, Any], value: Callable[[Ref], Batched]) -> Batched | None:
    """The rows of a cross entropy whose logits are moved along one direction each; None for other operations.

    Args:
        node: the operation.
        own: values with rows.
        value: those without any change.
    """
    if packet_name(node.target) != "cross_entropy_loss":
        return None
    named = bind(node)
    logits, target = own.get(named["self"]), named["target"]
    plain = named.get("weight") is None and not named.get("reduction", 1) and not named.get("label_smoothing", 0.0)
    if not isinstance(logits, RankOne) or logits.ndim > 2 or not plain or target in own:
        return None
    classes, base, before = value(target), value(Ref(node.name)), value(named["self"])
    rest = logits.dims[1:]
    if logits.change.dims != rest or base.dims != rest or before.dims != rest or classes.tensor.is_floating_point():
        return None
    counts = classes.tensor != named.get("ignore_index", -100)
    index = classes.tensor.clamp(0, logits.shape[-1] - 1)
    grown = record_call(
        LOG_RATIO_OF_CLASS, before.tensor, logits.change.tensor, logits.weight, index, logits.size
    )  # [*rest | B, rows]
    return Batched(base.tensor - grown.movedim(-1, 0) * counts, logits.dims)


# -- products ---------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Product:
    """A sum of products of two operands: one label a dim of each and of the result."""

    own: tuple[str, ...]
    other: Ref
    others: tuple[str, ...]
    out: tuple[str, ...]


def product_of(graph: Graph, node: Op, ref: Ref) -> Product | None:
    """How ``node`` multiplies ``ref`` with its other operand; None where it does not."""
    found = _equation(graph, node)
    if found is None:
        return None
    terms, out = found
    own = [term for term in terms if term[0] == ref]
    rest = [term for term in terms if term[0] != ref]
    if len(own) != 1 or len(rest) != 1:
        return None
    (_, letters), (other, others) = own[0], rest[0]
    count = [graph[name].tensor.ndim for name in (ref, other)]
    if "..." in letters + others and "..." not in out:
        return None
    labels = [_labels(text, n) for text, n in zip((letters, others), count, strict=True)]
    result = _labels(out, node.tensor.ndim)
    if labels[0] is None or labels[1] is None or result is None:
        return None
    sizes = dict(zip(labels[1], graph[other].tensor.shape, strict=True))
    here = zip(labels[0], graph[ref].tensor.shape, strict=True)
    if any(label not in result and sizes.get(label, size) != size for label, size in here):
        return None  # einsum broadcasts a dim of size 1 that it sums over
    return Product(labels[0], other, labels[1], result)


def _equation(graph: Graph, node: Op) -> tuple[list[tuple[Ref, str]], str] | None:
    """The two factors with their letters, and those of the result."""
    named, op = bind(node), lookup(node.target)
    if named.get("alpha", 1) != 1 or named.get("beta", 1) != 1 or op is None:
        return None
    name = packet_name(node.target)
    if name == "einsum":
        inputs, arrow, out = named["equation"].replace(" ", "").partition("->")
        return (list(zip(named["tensors"], inputs.split(","), strict=True)), out) if arrow else None
    if name == "matmul":
        left, right = named["self"], named["other"]
        one, two = (graph[ref].tensor.ndim == 1 for ref in (left, right))
        letters = "k" if one else "...ik", "k" if two else "...kj"
        return [(left, letters[0]), (right, letters[1])], ("..." + "i" * (not one) + "j" * (not two))
    if op.kind != "contraction" or not op.equation:
        return None
    inputs, _, out = op.equation.partition("->")
    terms = [term.split() for term in inputs.split(",")][:2]
    return [(named[factor], letters) for factor, letters in terms], out.strip()


def _labels(letters: str, ndim: int) -> tuple[str, ...] | None:
    """One label a dim; those of ``...`` count from the right, as they are broadcast."""
    if "..." not in letters:
        return tuple(f"~{letter}" for letter in letters) if len(letters) == ndim else None
    left, right = letters.split("...")
    count = ndim - len(left) - len(right)
    middle = map(str, reversed(range(count)))
    return tuple(f"~{letter}" for letter in (*left, *middle, *right)) if count >= 0 else None


def _multiplied(product: Product, change: Change, other: Batched, base: Batched, dims: SampleDims) -> Batched | None:
    if len(change.axes) != 1:
        return None
    summed = product.own[change.axes[0]]
    alone = {*product.own, *product.others} - {*product.out}
    if alone != {summed} or summed not in product.others:
        return None
    lead = dims.union(change.amount.dims, other.dims, base.dims, change.names)
    want = (*lead, *product.out)
    one = _by_row(change.amount, product.own, [summed], change, dims)
    two = _by_row(other, product.others, [summed], change, dims)
    before = dims.align(base, lead, len(product.out))
    if change.index.shape[1] == 1:
        added = torch.addcmul(before, *(_in_order(_placed(part, want)) for part in (one, two)))
        with compile_time():
            whole = torch.equal(change.index, torch.arange(change.amount.shape[change.axes[0]])[:, None])
        plain = whole and lead[1:] == change.amount.dims and product.own == (*product.out[:-1], summed)
        if not plain or not product.out or other.dims or {*product.others} != {summed, product.out[-1]}:
            return Batched(added, lead)
        matrix = other.tensor if product.others[0] == summed else other.tensor.t()
        return RankOne(added, lead, change=change.amount, weight=matrix, size=change.size)
    letter = dict(zip(dict.fromkeys([*one.labels, *two.labels]), string.ascii_letters, strict=False))
    have = [label for label in want if label in letter]
    texts = ["".join(letter[label] for label in labels) for labels in (one.labels, two.labels, have)]
    added = torch.einsum(f"{texts[0]},{texts[1]}->{texts[2]}", one.tensor, two.tensor)
    return Batched(before + _placed(_Labelled(added, tuple(have)), want), lead)


def _in_order(tensor: Tensor) -> Tensor:
    """Contiguous: it is read once for every row, and says how the result is laid out."""
    return tensor if tensor.is_contiguous() else tensor.clone(memory_format=torch.contiguous_format)


# -- sums -------------------------------------------------------------------------------------------------------------
def _reduced(graph: Graph, node: Op, change: Change, base: Batched, dims: SampleDims) -> Batched | None:
    named, ndim = bind(node), graph[change.ref].tensor.ndim
    if named.get("dtype") is not None:
        return None
    over = named.get("dim")
    over = [over] if isinstance(over, int) else list(over or range(ndim))
    over = [dim % ndim for dim in over]
    if not set(change.axes) <= set(over):
        return None
    labels = tuple(f"~{dim}" for dim in range(ndim))
    rows = _by_row(change.amount, labels, [labels[dim] for dim in change.axes], change, dims)
    out = tuple(label for dim, label in enumerate(labels) if dim not in over)
    if named.get("keepdim"):
        out = tuple(label if dim not in over else f"1~{dim}" for dim, label in enumerate(labels))
    gone = [i for i, label in enumerate(rows.labels) if label == _MEMBER or label in labels and label not in out]
    added = rows.tensor.sum(gone) if gone else rows.tensor
    if packet_name(node.target) == "mean":
        added = added / math.prod(graph[change.ref].tensor.shape[dim] for dim in over)
    lead = dims.union(change.amount.dims, base.dims, change.names)
    kept = tuple(label for i, label in enumerate(rows.labels) if i not in gone)
    return Batched(dims.align(base, lead, len(out)) + _placed(_Labelled(added, kept), (*lead, *out)), lead)


# -- tensors with labelled dims ---------------------------------------------------------------------------------------
@dataclass(frozen=True)
class _Labelled:
    tensor: Tensor
    labels: tuple[str, ...]


def _by_row(value: Batched, labels: Sequence[str], axes: Sequence[str], change: Change, dims: SampleDims) -> _Labelled:
    """The dims ``axes`` replaced by those of the rows, and where a row has several positions, one for these."""
    have = (*value.dims, *labels)
    rest = [i for i, label in enumerate(have) if label not in axes]
    order = [*rest, *(have.index(label) for label in axes)]
    tensor = value.tensor if order == sorted(order) else value.tensor.permute(order)
    tensor = tensor.flatten(len(rest)) if len(axes) > 1 else tensor
    with compile_time():
        flat = change.index.reshape(-1)
        start, count = int(flat[0]), len(flat)
        in_order = torch.equal(flat, torch.arange(start, start + count))
    if in_order:
        tensor = tensor if count == tensor.shape[-1] else tensor.narrow(-1, start, count)
    else:
        tensor = tensor.index_select(-1, record_constant(lambda: flat.to(value.tensor.device)))
    several = change.index.shape[1] > 1
    sizes = [*dims.sizes(change.names), *([change.index.shape[1]] if several else [])]
    tensor = tensor.reshape([*tensor.shape[:-1], *sizes])
    return _Labelled(tensor, (*(have[i] for i in rest), *change.names, *([_MEMBER] if several else [])))


def _placed(value: _Labelled, want: Sequence[str]) -> Tensor:
    """The tensor with its dims in the order of ``want``, of size 1 for labels it lacks."""
    order = [value.labels.index(label) for label in want if label in value.labels]
    tensor = value.tensor if order == sorted(order) else value.tensor.permute(order)
    sizes = dict(zip([value.labels[i] for i in order], tensor.shape, strict=True))
    return tensor.reshape([sizes.get(label, 1) for label in want])

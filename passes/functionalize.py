"""In-place writes become values: afterwards no two names share memory.

    before   %x = op f32[3]  clone(%y)                after   %x = op f32[3]  clone(%y)
             %s = op f32[]   select.int(%x, 0, 0)             %s = op f32[]   select.int(%x, 0, 0)
             %m = op f32[]   mul_.Tensor(%s, 2)               %m = op f32[]   mul.Tensor(%s, 2)
                                                              %x_select_scatter = op f32[3] select_scatter(%x, %m, 0, 0)
             %t = op f32[]   sum(%x)                          %t = op f32[]   sum(%x_select_scatter)

A write through a view gives its base a new value (``select_scatter``, ``slice_scatter``, the inverse of a transpose…),
and every other view of the written region is taken anew from that value where it is read next.

Every name is read with the value and the gradient it has in eager PyTorch, so the expectation is unchanged. A write
into one of the user's buffers remains as one ``copy_`` at the end; other writes to the outside are refused.
"""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from scg.errors import TraceError
from scg.ir import (
    Dist,
    Graph,
    Input,
    Node,
    Op,
    Param,
    Ref,
    Sample,
    TensorType,
    map_refs,
    refs_in,
)
from scg.operations import bind, is_impure
from scg.passes.aliasing import Fakes, Memory, Region
from scg.passes.in_place import functional_arguments, functional_form, is_write
from scg.passes.rewriter import Rewriter, infer_type, is_op
from scg.verifier import is_effect

aten = torch.ops.aten


def functionalize(graph: Graph) -> Graph:
    """Replaces every in-place write (``add_``, ``x[0] = …``, ``out=``) by a new value of what it writes to."""
    if _is_functional(graph):
        return graph
    return _Functionalizer(graph).run()


def _is_functional(graph: Graph) -> bool:
    """Whether nothing is written, but for buffers after everything else has been computed."""
    writes = [is_write(node) for node in graph]
    first = writes.index(True) if True in writes else len(writes)
    return all(is_effect(graph, node) for node in list(graph)[first:])


def _counters(graph: Graph) -> set[str] | None:
    """What the writes read and are, if each has a buffer to itself: no other memory need be followed then.

    Such is the number of batches that a normalization layer counts.
    """
    returned = set(refs_in((graph.objective, graph.outputs)))
    storages = [graph.tensors[node.path].untyped_storage()._cdata for node in graph.of(Param)]
    names: set[str] = set()
    for node in graph.of(Op):
        if not is_write(node):
            continue
        refs = functional_form(node)[1]
        written = graph[refs[0]]
        readers = [*graph.users[written.name], *graph.users[node.name]]
        if (
            not isinstance(written, Param)
            or len(refs) > 1
            or node.inputs.count(node.inputs[0]) > 1
            or readers != [node.name]
            or returned & {written.name, node.name}
            or storages.count(graph.tensors[written.path].untyped_storage()._cdata) > 1
        ):
            return None
        names |= {node.name, *node.inputs}
    return names


# -- tensors and writes ----------------------------------------------------------------------------------------------


@dataclass(eq=False)
class _Handle:
    """One tensor of the user's program: a view of its memory, and the node that last held its value."""

    type: TensorType
    region: Region
    memory: Memory
    ref: Ref
    seen: int
    """How many of the program's writes ``ref`` knows of."""
    parent: _Handle | None = None
    view: Node | None = None
    """How it is taken from its parent; in the names of the old graph."""
    picked: bool = False
    """Whether it lies somewhere in ``region``, by an index that is a tensor."""


@dataclass(frozen=True)
class _Write:
    memory: Memory
    region: Region
    node: Node


# -- the pass --------------------------------------------------------------------------------------------------------


class _Functionalizer:
    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.new = Rewriter(graph)
        self.handles: dict[str, _Handle] = {}
        self.writes: list[_Write] = []
        self.born: dict[str, int] = {}
        """How many writes came before each node."""
        self.counters = _counters(graph)
        """If all writes are to buffers that nothing else reads: these and what is written; else None."""
        self.fakes = Fakes(graph, runs=self.counters is None)

    def run(self) -> Graph:
        for node in self.graph:
            self.born[node.name] = len(self.writes)
            if self.counters is not None and node.name not in self.counters:
                self.new.add(node)
            elif isinstance(node, Op) and is_write(node):
                self._write(node)
            else:
                self._compute(node)
        for ref in (self.graph.objective, *refs_in(self.graph.outputs)):
            self.new.substitute(ref, self._read(ref))
        for param in self.graph.of(Param):
            self._update(param)
        return self.new.finish()

    # -- nodes that write nothing -----------------------------------------------------------------------------------

    def _compute(self, node: Node) -> None:
        fake = self.fakes.add(node)
        if isinstance(node, Op) and is_impure(node):
            self._check_statistics(node)
        picks = isinstance(node, Op) and node.picks
        parent = self.handles[node.inputs[0]] if picks else self._parent(node, fake)
        if (
            parent is not None
            and isinstance(node, Op)
            and not picks
            and Region.of(fake) == parent.region
            and not is_op(node, aten.detach)
        ):
            self.handles[node.name] = parent  # the same tensor under another name
            return
        ref = self.new.add(node.rewire(self._read))
        if isinstance(fake, Tensor):
            if picks and parent is not None:
                self.fakes.share(fake, parent.memory)
            memory = self.fakes.memory(fake)
            picked = parent is not None and (picks or parent.picked)
            region = parent.region if parent is not None and picked else Region.of(fake)
            view = self._view(node) if parent is not None else None
            seen = self.born[_source(node, self.graph).name]
            self.handles[node.name] = _Handle(node.tensor, region, memory, ref, seen, parent, view, picked)

    def _parent(self, node: Node, fake: Any) -> _Handle | None:
        """The input of ``node`` whose memory it shares; the same tensor rather than another view of it."""
        if not isinstance(fake, Tensor):
            return None
        inputs = [self.handles[ref] for ref in _source(node, self.graph).inputs if ref in self.handles]
        memory, region = self.fakes.memory(fake), Region.of(fake)
        sharing = [handle for handle in inputs if handle.memory is memory]
        return min(sharing, key=lambda handle: handle.region != region, default=None)

    def _view(self, node: Node) -> Node:
        """``node`` as an operation on its parent: an output of a split is a slice of what was split."""
        split = _source(node, self.graph)
        if split is node:
            return node
        assert isinstance(node, Op) and isinstance(split, Op)
        index, outputs = node.args[1], self.fakes[split.name]
        if is_op(split, aten.broadcast_tensors):
            return dataclasses.replace(
                node, target=aten.expand.default, args=(split.args[0][index], list(node.tensor.shape))
            )
        if is_op(split, aten.unbind):
            return dataclasses.replace(node, target=aten.select.int, args=(split.args[0], bind(split)["dim"], index))
        if is_op(split, *_SPLITS):
            sizes = zip(node.tensor.shape, self.graph[split.args[0]].tensor.shape, strict=True)
            dim = next(dim for dim, (part, whole) in enumerate(sizes) if part != whole)
            start = sum(part.shape[dim] for part in outputs[:index])
            args = (split.args[0], dim, start, start + node.tensor.shape[dim])
            return dataclasses.replace(node, target=aten.slice.Tensor, args=args)
        return split

    def _check_statistics(self, node: Op) -> None:
        for handle in (self.handles[ref] for ref in node.inputs if ref in self.handles):
            owner, write = handle.memory.owner, self._last_write(handle.memory)
            if owner is not None and write is not None:
                raise TraceError(
                    f"{node.loc}: {node.op_name} updates {_name_of(owner)}, which was written in place before "
                    f"({write.loc}). Write it after this layer, or outside the model's call."
                )

    def _last_write(self, memory: Memory) -> Node | None:
        return next((write.node for write in reversed(self.writes) if write.memory is memory), None)

    # -- reading ----------------------------------------------------------------------------------------------------

    def _read(self, ref: Ref) -> Ref:
        """The node that holds the value of ``ref`` now."""
        if ref in self.handles:
            return self._current(self.handles[ref])
        node = self.graph[ref]
        if isinstance(node, Dist):
            # a distribution reads its parameters when it is used, not when it is made
            params = tuple(map(self._read, node.params))
            made = self.new.nodes[self.new.read(ref)]
            if isinstance(made, Dist) and made.params != params:
                name = self.new.fresh(f"{node.name}_now")
                self.new.substitute(ref, self.new.add(dataclasses.replace(node, name=name, params=params)))
        return self.new.read(ref)

    def _current(self, handle: _Handle) -> Ref:
        missed = [write for write in self.writes[handle.seen :] if write.memory is handle.memory]
        if any(write.region.overlaps(handle.region) for write in missed):
            view = handle.view
            if not isinstance(view, Op) or not isinstance(view.type, TensorType):
                raise _unclear(view or handle.memory.owner, missed[-1].node)
            self._check_index(view)
            name = self.new.fresh(f"{view.name}_now")
            handle.ref = self.new.add(dataclasses.replace(view.rewire(self._read), name=name))
        handle.seen = len(self.writes)
        return handle.ref

    def _check_index(self, view: Op) -> None:
        """A view by a tensor stays where it was taken: that tensor must not have changed."""
        if view.picks:
            (index,) = (self.handles[ref] for ref in refs_in(view.args[1]))
            for write in self.writes[self.born[view.name] :]:
                if write.memory is index.memory:
                    raise _unclear(view, write.node)

    # -- writing ----------------------------------------------------------------------------------------------------

    def _write(self, node: Op) -> None:
        target, refs = functional_form(node)
        written = [self.handles[ref] for ref in refs]
        for handle in written:
            self._check_write(handle, node)
        self._run_write(node, refs)
        if is_op(node, aten.copy_) and self._is_there(node.args[1], written[0]):
            self.handles[node.name] = written[0]
            return
        for handle, value in zip(written, self._values(node, target, written), strict=True):
            self._assign(handle, value, node)
        if not isinstance(node.type, tuple):
            self.handles[node.name] = written[0]

    def _is_there(self, source: Ref, handle: _Handle) -> bool:
        """Whether ``source`` shows the handle's own elements: ``x[0] += 1`` ends in copying ``x[0]`` to itself."""
        other = self.handles[source]
        if other.picked or handle.picked:
            return other is handle
        return other.memory is handle.memory and other.region == handle.region

    def _check_write(self, handle: _Handle, node: Op) -> None:
        owner = handle.memory.owner
        if isinstance(owner, Input) or (isinstance(owner, Param) and owner.role != "buffer"):
            raise TraceError(
                f"{node.loc}: {node.op_name} writes into {_name_of(owner)}, which lives outside the model's call. "
                f"Write into a copy (`.clone()`), or use the operation that returns a new tensor."
            )
        if handle.memory.obscure is not None:
            raise _unclear(handle.memory.obscure, node)

    def _run_write(self, node: Op, refs: list[Ref]) -> None:
        """What PyTorch makes of the write: it may refuse, or resize what is given as ``out=``."""
        try:
            self.fakes.run(node)
        except RuntimeError as error:
            raise TraceError(f"{node.loc}: {node.op_name} cannot write there: {error}") from None
        for ref in refs:
            have, want = tuple(self.fakes[ref].shape), self.handles[ref].type.shape
            if have != want:
                raise TraceError(
                    f"{node.loc}: {node.op_name} resizes its result from {list(want)} to {list(have)}. "
                    f"Give `out=` the right shape, or use the returned tensor."
                )

    def _values(self, node: Op, target: Callable[..., Any] | None, written: list[_Handle]) -> list[Ref]:
        """The new values of what ``node`` writes: ``target`` of its arguments, or else its source."""
        if target is None:
            return [self._source_of(node, written[0])]
        args, kwargs = map_refs(self._read, functional_arguments(node, target))
        if is_op(node, *_NOISE) and self._may_require_grad(args[0]):
            args = (self.new.op(aten.detach.default, args[0], at=node), *args[1:])  # of it only the shape is read
        type = infer_type(target, args, kwargs, self.new.type_of)
        if len(written) > 1:
            outputs = self.new.op(target, *args, at=node, name=node.name, type=type, **kwargs)
            values = [self.new.op(operator.getitem, outputs, i, at=node) for i in range(len(written))]
            return [self._fit(value, handle, node) for value, handle in zip(values, written, strict=True)]
        name = node.name if type == written[0].type else self.new.fresh(f"{node.name}_wide")
        return [self._fit(self.new.op(target, *args, at=node, name=name, type=type, **kwargs), written[0], node)]

    def _source_of(self, node: Op, handle: _Handle) -> Ref:
        """What ``copy_``, ``fill_`` or ``zero_`` writes, in the dtype and shape of the handle."""
        source = 0 if is_op(node, aten.zero_) else node.args[1]
        if isinstance(source, Ref):
            return self._fit(self._read(source), handle, node)
        type = handle.type
        return self.new.op(
            aten.full.default, list(type.shape), source, at=node, name=node.name, type=type,
            dtype=type.dtype, device=type.device,
        )  # fmt: skip

    def _fit(self, value: Ref, handle: _Handle, node: Op) -> Ref:
        """``value`` with the dtype, device and shape of the handle: a write never changes those."""
        have, want = self.new.nodes[value].tensor, handle.type
        if (have.dtype, have.device) != (want.dtype, want.device):
            cast = dataclasses.replace(want, shape=have.shape)
            value = self.new.op(aten.to.device, value, want.device, want.dtype, at=node, type=cast)
        if have.ndim > want.ndim:  # a source may have more leading dims, all of size 1
            value = self.new.op(aten.reshape.default, value, list(have.shape[have.ndim - want.ndim :]), at=node)
        if self.new.shape(value) != want.shape:
            value = self.new.op(aten.expand.default, value, list(want.shape), at=node, type=want)
        return value

    def _assign(self, handle: _Handle, value: Ref, node: Op) -> None:
        """Gives the handle, and everything it is a view of, its new value."""
        values = [(handle, value)]
        while handle.parent is not None:
            value = self._put(handle, handle.parent, value, node)
            handle = handle.parent
            values.append((handle, value))
        self.writes.append(_Write(handle.memory, values[0][0].region, node))
        for changed, value in values:
            changed.ref, changed.seen = value, len(self.writes)

    def _put(self, handle: _Handle, parent: _Handle, value: Ref, node: Op) -> Ref:
        """The new value of ``parent``, which is ``value`` in the part that the handle shows."""
        view, whole = handle.view, parent.type
        if not isinstance(view, Op):  # a cost, a declared dependence, a replayed site: the identity
            return value
        if is_op(view, aten.detach):
            return self._put_detached(value, parent, view, node)
        if is_op(view, *_PERMUTES):
            return self.new.op(aten.permute.default, value, _inverse(view, whole.ndim), at=node, type=whole)
        same_size = math.prod(handle.type.shape) == math.prod(whole.shape) and handle.type.dtype == whole.dtype
        if is_op(view, *_RESHAPES) and same_size:
            return self.new.op(aten.reshape.default, value, list(whole.shape), at=node, type=whole)
        if view.picks:
            self._check_index(view)
            index = map_refs(self._read, view.args[1])
            return self.new.op(aten.index_put.default, self._current(parent), index, value, at=node, type=whole)
        scatter = next((scatter for packet, scatter in _PARTS.items() if is_op(view, packet)), None)
        if scatter is None:
            raise _unclear(view, node)
        place = tuple(bind(view).values())[1:]
        if is_op(view, aten.narrow):
            dim, start, length = place
            place = (dim, start, start + length) if start != -length else (dim, start, None)
        return self.new.op(scatter, self._current(parent), value, *place, at=node, type=whole)

    def _put_detached(self, value: Ref, parent: _Handle, view: Op, node: Op) -> Ref:
        """A write behind a detach changes the value and not the gradient: the same where there is none."""
        if self._may_require_grad(self._current(parent)):
            raise TraceError(
                f"{node.loc}: {node.op_name} writes under no_grad, or behind a detach ({view.loc}), into a tensor that "
                f"a gradient flows through. Write into a copy (`.clone()`), or outside of no_grad."
            )
        return self.new.op(aten.detach.default, value, at=node) if self._may_require_grad(value) else value

    def _may_require_grad(self, ref: Ref) -> bool:
        stack, seen = [str(ref)], set[str]()
        while stack:
            node = self.new.nodes[stack.pop()]
            if node.name in seen or is_op(node, aten.detach):
                continue
            seen.add(node.name)
            if isinstance(node, Sample) or (isinstance(node, (Input, Param)) and node.requires_grad):
                return True
            stack.extend(node.inputs)
        return False

    def _update(self, param: Param) -> None:
        """One ``copy_`` at the end for a buffer that was written."""
        handle = self.handles.get(param.name)
        write = self._last_write(handle.memory) if handle is not None else None
        if handle is None or write is None or handle.memory.owner is not param:
            return
        value = self._current(handle)
        above = self.graph.with_nodes(self.new.nodes.values()).ancestors([value])
        site = next(
            (name for name in self.new.nodes if name in above and isinstance(self.new.nodes[name], Sample)), None
        )
        if site is not None:
            raise TraceError(
                f"{write.loc}: the buffer {param.path} is written with a value that depends on the site {site!r}, "
                f"which may be drawn several times in a call. Return the value and update the buffer after the call; "
                f"a running baseline is an option of the score_function estimator."
            )
        if self._may_require_grad(value):
            value = self.new.op(aten.detach.default, value, at=write)
        name = self.new.fresh(f"{param.name}_update")
        self.new.op(aten.copy_.default, Ref(param.name), value, at=write, name=name, type=param.type)


# -- what operations do to memory ------------------------------------------------------------------------------------

_RESHAPES = (
    aten.view, aten._unsafe_view, aten.reshape, aten.flatten, aten.unflatten, aten.view_as, aten.reshape_as,
    aten.squeeze, aten.unsqueeze, aten.ravel, aten.expand, aten.expand_as, aten.broadcast_to, aten.atleast_1d,
    aten.atleast_2d, aten.atleast_3d, aten.alias,
)  # fmt: skip
"""Views of all elements in row-major order (as far as their number stays)."""
_PERMUTES = (
    aten.permute, aten.transpose, aten.t, aten.numpy_T, aten.mT, aten.movedim, aten.moveaxis, aten.swapaxes,
    aten.swapdims,
)  # fmt: skip
_SPLITS = (
    aten.split, aten.split_with_sizes, aten.chunk, aten.tensor_split, aten.hsplit, aten.vsplit, aten.dsplit,
    aten.unsafe_split, aten.unsafe_split_with_sizes, aten.unsafe_chunk,
)  # fmt: skip
_PARTS = {
    aten.select: aten.select_scatter.default,
    aten.slice: aten.slice_scatter.default,
    aten.narrow: aten.slice_scatter.default,
    aten.diagonal: aten.diagonal_scatter.default,
}
"""Views of some elements, and what puts a part back into the whole."""
_NOISE = (
    aten.bernoulli_, aten.normal_, aten.uniform_, aten.exponential_, aten.geometric_, aten.log_normal_, aten.cauchy_,
    aten.random_,
)  # fmt: skip
"""Writes that read no more than the shape of what was there."""


def _source(node: Node, graph: Graph) -> Node:
    """The operation that made ``node``: of one output, that of all of them."""
    return graph[node.args[0]] if isinstance(node, Op) and node.target is operator.getitem else node


def _inverse(view: Op, ndim: int) -> list[int]:
    """The permutation that undoes ``view``, found by permuting dims of distinct sizes."""
    shown = view.target(torch.empty(tuple(range(ndim)), device="meta"), *view.args[1:], **view.kwargs)
    return [tuple(shown.shape).index(dim) for dim in range(ndim)]


def _name_of(owner: Node) -> str:
    if isinstance(owner, Input):
        return f"the argument {owner.path}"
    assert isinstance(owner, Param)
    return f"the {owner.role} {owner.path}" if owner.role != "constant" else f"the captured tensor {owner.path}"


def _unclear(other: Node | None, write: Node) -> TraceError:
    assert other is not None and isinstance(write, Op)
    return TraceError(
        f"{write.loc}: {write.op_name} writes into memory that %{other.name} ({other.loc}) may share, and what this "
        f"changes cannot be told. Write into a copy (`.clone()`), or use the operation that returns a new tensor."
    )

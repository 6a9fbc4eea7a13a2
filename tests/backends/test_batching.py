"""Every operation of the table on values with sample dims equals a loop over the samples."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from scg.backends.batching import GROUPS, RULES, Batcher
from scg.backends.sample_dims import Batched, SampleDim, SampleDims
from scg.ir import Op, map_refs
from scg.operations import OPERATIONS, is_impure, is_random
from tests.analysis.examples import ATEN, Example, example, examples, floats, ints
from tests.analysis.tools import run

DIMS = SampleDims([SampleDim("K", 3, "iid"), SampleDim("r", 2, "enumerated", order=1)])


def _choices(names: list[str]) -> Iterator[dict[str, tuple[str, ...]]]:
    """Which input carries which dims: each alone, all together, and two with different dims."""
    for name in names:
        yield {name: ("K",)}
    if len(names) > 1:
        yield dict.fromkeys(names, ("K", "r"))
        yield {names[0]: ("K",), names[1]: ("r",)}
        yield {names[0]: ("r",), names[1]: ("K",)}


def _vary(x: Tensor, dims: tuple[str, ...]) -> Tensor:
    """``x`` with different values in each row.  # [*dims, *S]"""
    sizes = DIMS.sizes(dims)
    rows = []
    for i in range(torch.Size(sizes).numel()):
        if x.dtype == torch.bool:
            rows.append(x ^ (torch.arange(x.numel()).reshape(x.shape) % 3 == i % 3))
        elif x.is_floating_point() or x.is_complex():
            rows.append(x * (1 - 0.07 * i))
        elif x.numel() > 1:
            rows.append(x.flatten().roll(i).reshape(x.shape))
        else:
            rows.append(x)
    return torch.stack(rows).reshape(*sizes, *x.shape)


def _looped(op: Op, inputs: Mapping[str, Batched], constants: Mapping[str, Tensor], dims: tuple[str, ...]) -> Any:
    """The operation once a row, stacked."""
    results = []
    for index in itertools.product(*(range(size) for size in DIMS.sizes(dims))):
        at = dict(zip(dims, index, strict=True))
        row = {name: value.tensor[tuple(at[d] for d in value.dims)].clone() for name, value in inputs.items()}
        results.append(run(op, {**row, **constants}))

    def stack(*items: Tensor) -> Tensor:
        return torch.stack(items).reshape(*DIMS.sizes(dims), *items[0].shape)

    if isinstance(results[0], Tensor):
        return stack(*results)
    return tuple(stack(*items) for items in zip(*results, strict=True) if isinstance(items[0], Tensor))


def _unchanging(op: Op) -> bool:
    """Is the operation a function of its arguments, so that rows can be compared?"""
    return not is_random(op) and not is_impure(op)


def _agree(case: Example, carried: dict[str, tuple[str, ...]]) -> None:
    inputs = {
        name: Batched(_vary(x, carried[name]), carried[name]) if name in carried else Batched(x)
        for name, x in case.inputs.items()
    }
    constants = {node.name: case.graph.tensors[node.path] for node in case.graph if node.kind == "param"}  # type: ignore[attr-defined]
    dims = DIMS.union(*carried.values())
    wrapped = {**inputs, **{name: Batched(value) for name, value in constants.items()}}
    args, kwargs = map_refs(wrapped.__getitem__, (tuple(case.op.args), dict(case.op.kwargs)))
    got = Batcher(DIMS).run(case.op, args, kwargs)
    want = _looped(case.op, inputs, constants, dims)
    values = [got] if isinstance(got, Batched) else [item for item in got if isinstance(item, Batched)]
    for value, expected in zip(values, [want] if isinstance(want, Tensor) else want, strict=True):
        full = DIMS.align(value, dims, full=True)
        torch.testing.assert_close(full, expected, rtol=1e-9, atol=1e-9, equal_nan=True)


@pytest.mark.parametrize("name", list(OPERATIONS))
def test_batched_equals_a_loop(name: str) -> None:
    for case in examples(name):
        if not _unchanging(case.op) or name.startswith("empty") or name.startswith("new_empty"):
            continue
        for carried in _choices(list(case.inputs)):
            try:
                _agree(case, carried)
            except Exception as error:
                error.add_note(f"{case.op}  with {carried}")
                raise


@pytest.mark.parametrize(
    ("target", "args"),
    [
        (ATEN.group_norm.default, (floats(4, 4), 2)),  # its first dim is the batch dim, however few there are
        (ATEN.instance_norm.default, (floats(2, 4, 5), None, None, None, None, True, 0.1, 1e-5, False)),
        (ATEN.var.default, (floats(4), False)),
        (ATEN.var.default, (floats(3, 4), True)),
        (ATEN.std.default, (floats(3, 4), False)),
        (ATEN.all.default, (floats(),)),
        (ATEN.any.default, (floats(),)),
        (ATEN.nansum.default, (torch.tensor(torch.nan),)),
        (ATEN.matmul.default, (floats(4), floats(2, 4, 3))),
        (ATEN.matmul.default, (floats(2, 3, 4), floats(4))),
        (ATEN.linear.default, (floats(4), floats(3, 4), floats(3))),
        (ATEN.cross_entropy_loss.default, (floats(3), torch.tensor(1), None, 0)),
        (ATEN.cross_entropy_loss.default, (floats(2, 3, 4), floats(2, 3, 4), floats(3), 0)),
        (ATEN.lstm_cell.default, (floats(2, 3), [floats(2, 4), floats(2, 4)], floats(16, 3), floats(16, 4))),
        (ATEN.movedim.intlist, (floats(2, 3), [], [])),
        (ATEN.conv1d.default, (floats(3, 5), floats(4, 3, 2))),
        (ATEN.to.dtype, (floats(2, 3, 4, 4), torch.float32, False, False, torch.channels_last)),  # a format for rank 4
        (ATEN.cat.default, ([floats(0), floats(0)],)),
        (ATEN.vdot.default, (torch.complex(floats(4), floats(4) - 1), torch.complex(floats(4) + 1, floats(4)))),
        (ATEN.embedding.default, (floats(5, 2), ints(2, 3), 1)),
        (ATEN.as_strided_scatter.default, (floats(4), floats(2), [2], [2], 1)),  # counts from where the storage starts
    ],
)
def test_forms_beside_those_of_the_table(target: Any, args: tuple[Any, ...]) -> None:
    case = example(target, args, known=False)
    for carried in _choices(list(case.inputs)):
        _agree(case, carried)


@pytest.mark.parametrize("target", [ATEN.clone.default, ATEN.contiguous.default, ATEN._to_copy.default])
def test_a_memory_format_is_one_of_each_row(target: Any) -> None:
    case = example(target, (floats(2, 3, 4, 4),), {"memory_format": torch.channels_last})
    for carried in _choices(list(case.inputs)):
        _agree(case, carried)


@pytest.mark.parametrize(
    ("target", "args", "sampled"),
    [
        (ATEN.clamp.Tensor, (floats(4), floats(4) - 0.5, floats(4)), [2]),  # torch's own fails where the last is larger
        (ATEN.embedding.default, (floats(5, 2), ints(2, 3), 1), [0, 1]),  # the row for padding gets none
    ],
)
def test_gradients_equal_those_of_a_loop(target: Any, args: tuple[Any, ...], sampled: list[int]) -> None:
    rows = {i: _vary(args[i], ("K",)) for i in sampled}
    leaves = [rows.get(i, x) for i, x in enumerate(args) if isinstance(x, Tensor)]
    leaves = [x.requires_grad_(x.is_floating_point()) for x in leaves]
    wrapped = [Batched(x, ("K",) if i in rows else ()) for i, x in enumerate(leaves)]
    rest = args[len(leaves) :]
    got = Batcher(DIMS).run(Op(name="y", target=target), (*wrapped, *rest), {}).tensor
    want = torch.stack([target(*(x[k] if i in rows else x for i, x in enumerate(leaves)), *rest) for k in range(3)])
    wrt = [x for x in leaves if x.requires_grad]
    found, wanted = (torch.autograd.grad((y * y).sum(), wrt) for y in (got, want))
    torch.testing.assert_close(found, wanted)


def test_every_operation_has_one_rule() -> None:
    names = [name for group in GROUPS for names, _ in group for name in names.split()]
    assert len(names) == len(RULES)
    assert all(hasattr(ATEN, name) for name in names)


def test_a_custom_operator_is_no_aten_operator_of_the_same_name() -> None:
    @torch.library.custom_op("scg_test::sum", mutates_args=())
    def twice(x: Tensor, *, by: float) -> Tensor:
        return x * by

    x = Batched(_vary(floats(4), ("K",)), ("K",))
    target = torch.ops.scg_test.sum.default
    for value in (x, Batched(floats(4))):
        got = Batcher(DIMS).run(Op(name="y", target=target), (value,), {"by": 2.0})
        assert got.dims == value.dims
        torch.testing.assert_close(got.tensor, value.tensor * 2)

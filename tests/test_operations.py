"""Every entry of the operation table against the operation itself: influence by perturbation, linearity, continuity."""

from __future__ import annotations

import warnings
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from scg.analysis import influence
from scg.ir import Op, Ref, TensorType
from scg.operations import OPERATIONS, bind, is_discontinuous, is_impure, is_linear, is_random, lookup, table
from tests.analysis.examples import Example, examples
from tests.analysis.tools import compare, evaluate

ATEN = torch.ops.aten
# How many random numbers they consume depends on the values, so that a nudge shifts the noise of other elements.
UNSTEADY = {"_sample_dirichlet", "_standard_gamma", "binomial", "multinomial", "poisson", "rrelu"}
# Their result is whatever memory held.
UNDEFINED = {"empty_like", "new_empty", "new_empty_strided"}
# They accept no values outside a narrow range.
NARROW = {"bernoulli", "binary_cross_entropy", "normal"}
# Their labels are floats, but only 1 and -1 are any.
LABELLED = {"hinge_embedding_loss"}

pytestmark = pytest.mark.filterwarnings("ignore")


@cache
def calls(name: str) -> list[Example]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return list(examples(name))


def test_the_table_is_large_and_mostly_tried() -> None:
    assert len(OPERATIONS) >= 500
    untried = [name for name, op in OPERATIONS.items() if op.kind != "nothing" and not calls(name)]
    assert len(untried) < 40, untried


@pytest.mark.parametrize("name", sorted(set(OPERATIONS) - UNSTEADY - UNDEFINED))
def test_influence_of_each_entry_is_sound(name: str) -> None:
    for case in calls(name):
        found = influence(case.graph, list(case.inputs))
        if OPERATIONS[name].kind not in ("whole", "composite"):
            assert not found.fallbacks, case.op
        amounts = (0.05, -0.05) if name in NARROW else (0.7, -1.3)
        violations, _, _ = compare(case.graph, case.inputs, found, amounts)
        assert not violations, case.op


def _moved(case: Example, names: list[str], share: float) -> Tensor:
    """The output where the named inputs went ``share`` of the way to other values."""
    inputs = dict(case.inputs)
    for name in names:
        x = inputs[name]
        inputs[name] = x + share * (0.9 * (x.flip(0) if x.ndim else x + 0.3) + 0.02 - x)
    result = evaluate(case.graph, inputs)["y"]
    return torch.cat([t.reshape(-1) for t in result]) if isinstance(result, tuple | list) else result


@pytest.mark.parametrize("name", [name for name, op in OPERATIONS.items() if op.linear])
def test_linear_entries_are_affine(name: str) -> None:
    for case in calls(name):
        floating = [n for n, x in case.inputs.items() if x.dtype.is_floating_point]
        for group in OPERATIONS[name].linear:
            named = list(bind(case.op).values())
            inside = {str(ref) for i in group if i < len(named) for ref in _refs(named[i])}
            chosen = [n for n in floating if n in inside]
            if OPERATIONS[name].separate:
                chosen = chosen[:1]
            if not chosen or not is_linear(case.op, {Ref(n) for n in chosen}):
                continue
            start, middle, end = (_moved(case, chosen, share) for share in (0.0, 0.5, 1.0))
            torch.testing.assert_close(middle, (start + end) / 2, msg=lambda text: f"{case.op}: {text}")  # noqa: B023


def _refs(value: object) -> list[Ref]:
    if isinstance(value, Ref):
        return [value]
    return [ref for item in value for ref in _refs(item)] if isinstance(value, list | tuple) else []


@pytest.mark.parametrize("name", [n for n, op in OPERATIONS.items() if not op.discontinuous and op.kind != "nothing"])
def test_smooth_entries_do_not_jump(name: str) -> None:
    if name in UNSTEADY | UNDEFINED | LABELLED:
        return
    for case in calls(name):
        floating = [n for n, x in case.inputs.items() if x.dtype.is_floating_point]
        if not floating or not isinstance(case.op.type, TensorType) or is_discontinuous(case.op):
            continue
        before = _moved(case, floating, 0.0)
        for share in (0.0, 0.3, 0.7):
            one, other = _moved(case, floating, share), _moved(case, floating, share + 1e-9)
            if before.dtype == torch.float64 and bool(one.isfinite().all()):
                torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5, msg=lambda t: f"{case.op}: {t}")  # noqa: B023


def op(target: object, *args: object, dtype: torch.dtype = torch.float32, **kwargs: object) -> Op:
    return Op(name="y", type=TensorType(dtype, (3,)), target=target, args=args, kwargs=kwargs)  # type: ignore[arg-type]


A, B, C = Ref("a"), Ref("b"), Ref("c")


def test_is_linear() -> None:
    assert is_linear(op(ATEN.add.Tensor, A, B), {A, B})
    assert is_linear(op(ATEN.mul.Tensor, A, B), {B})
    assert not is_linear(op(ATEN.mul.Tensor, A, B), {A, B})
    assert not is_linear(op(ATEN.mul.Tensor, A, A), {A})
    assert is_linear(op(ATEN.div.Tensor, A, B), {A})
    assert not is_linear(op(ATEN.div.Tensor, A, B), {B})
    assert not is_linear(op(ATEN.div.Tensor_mode, A, B, rounding_mode="floor"), {A})
    assert is_linear(op(ATEN.where.self, A, B, C), {B, C})
    assert not is_linear(op(ATEN.where.self, A, B, C), {A, B})
    assert is_linear(op(ATEN.stack.default, [A, B]), {A, B})
    assert is_linear(op(ATEN.linear.default, A, B, C), {A, C})
    assert not is_linear(op(ATEN.linear.default, A, B, C), {A, B})
    assert is_linear(op(ATEN.einsum.default, "i,i->i", [A, B]), {B})
    assert not is_linear(op(ATEN.einsum.default, "i,i->i", [A, B]), {A, B})
    assert not is_linear(op(ATEN.detach.default, A), {A})
    assert is_linear(op(ATEN.embedding.default, A, B), {A})
    assert not is_linear(op(ATEN.embedding.default, A, B, 0), {A})
    assert not is_linear(op(ATEN.dropout.default, A, 0.5, True), {A})
    assert is_linear(op(ATEN.dropout.default, A, 0.5, False), {A})
    assert not is_linear(op(ATEN.sum.default, A, dtype=torch.int64), {A})
    assert not is_linear(op(ATEN.cdist.default, A, B), {A})


def test_is_discontinuous() -> None:
    assert is_discontinuous(op(ATEN.round.default, A))
    assert is_discontinuous(op(ATEN.gt.Scalar, A, 0, dtype=torch.bool))
    assert is_discontinuous(op(ATEN.div.Tensor_mode, A, B, rounding_mode="floor"))
    assert is_discontinuous(op(ATEN.to.dtype, A, torch.int64, dtype=torch.int64))
    assert not is_discontinuous(op(ATEN.relu.default, A))
    assert not is_discontinuous(op(ATEN.isnan.default, A, dtype=torch.bool))
    assert not is_discontinuous(op(ATEN.sort.default, A))
    assert not is_discontinuous(op(torch.autograd.Function.apply, A))


def test_random_and_impure() -> None:
    assert is_random(op(ATEN.rand_like.default, A))
    assert is_random(op(ATEN.dropout.default, A, 0.5, True))
    assert not is_random(op(ATEN.dropout.default, A, 0.5, False))
    assert not is_random(op(ATEN.scaled_dot_product_attention.default, A, A, A))
    assert is_impure(op(ATEN.batch_norm.default, A, None, None, B, C, True, 0.1, 1e-5, False))
    assert not is_impure(op(ATEN.batch_norm.default, A, None, None, B, C, False, 0.1, 1e-5, False))
    assert is_impure(op(ATEN.add_.Tensor, A, B))


def test_lookup_prefers_the_overload_and_falls_back_on_tags() -> None:
    assert lookup(ATEN.max.other) == OPERATIONS["max.other"]
    assert lookup(ATEN.max.dim) == OPERATIONS["max"]
    assert lookup(len) is None
    inferred = lookup(ATEN.special_bessel_j0.default)
    assert inferred is not None and inferred.kind == "pointwise" and inferred.discontinuous


def test_the_documented_table_is_the_one_in_the_code() -> None:
    page = (Path(__file__).parents[1] / "docs" / "operations.md").read_text()
    assert table() in page, (
        "write it anew: python -c 'import scg.operations as o; print(o.page())' > docs/operations.md"
    )

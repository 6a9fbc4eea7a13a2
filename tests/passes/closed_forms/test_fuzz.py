"""Random polynomials in random draws: the compiled loss is the expectation that sympy finds."""

from __future__ import annotations

from typing import Any

import pytest
import sympy
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import scg
from scg.passes.closed_forms.forms import ORDERS
from tests.passes.closed_forms.test_forms import RAW, A, B, a, b

z = sympy.Symbol("z")
Tree = tuple[Any, ...]
"""``("z",)``, ``("number", 0.5)``, or an operation and its operands."""

LEAVES = st.one_of(st.just(("z",)), st.sampled_from([-1.5, -0.5, 0.25, 2.0]).map(lambda number: ("number", number)))
TREES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.tuples(st.sampled_from(["add", "sub", "mul"]), inner, inner),
        st.tuples(st.just("square"), inner),
        st.tuples(st.just("cube"), inner),
        st.tuples(st.just("half"), inner),
    ),
    max_leaves=6,
)


def degree(tree: Tree) -> int:
    """The highest power that is met on the way."""
    parts = [degree(part) for part in tree[1:]] if tree[0] not in ("z", "number") else []
    powers = {"z": 1, "number": 0, "mul": sum(parts), "square": 2 * sum(parts), "cube": 3 * sum(parts)}
    return powers.get(tree[0], max(parts, default=0))


POLYNOMIALS = TREES.filter(lambda tree: degree(tree) <= ORDERS)
OPERATIONS: dict[str, Any] = {
    "add": lambda x, y: x + y,
    "sub": lambda x, y: x - y,
    "mul": lambda x, y: x * y,
    "square": lambda x: x**2,
    "cube": lambda x: x**3,
    "half": lambda x: x / 2,
}


def evaluate(tree: Tree, outcome: Any) -> Any:
    """The tree at a tensor or a symbol."""
    if tree[0] == "z":
        return outcome
    return tree[1] if tree[0] == "number" else OPERATIONS[tree[0]](*(evaluate(part, outcome) for part in tree[1:]))


def by_sympy(tree: Tree, name: str) -> list[float]:
    """The expectation, and its derivatives in the two parameters."""
    raw = RAW[name][1]
    powers = sympy.Poly(evaluate(tree, z), z).terms()
    total = sum((sympy.nsimplify(factor) * raw(k) for (k,), factor in powers), sympy.Integer(0))
    numbers = {a: sympy.nsimplify(A), b: sympy.nsimplify(B)}
    return [float(sympy.sympify(expr).subs(numbers).evalf(30)) for expr in (total, total.diff(a), total.diff(b))]


def check(tree: Tree, name: str) -> None:
    params = [torch.tensor([value], dtype=torch.float64, requires_grad=True) for value in (A, B)]

    def model() -> Tensor:
        outcome = RAW[name][0](*params).sample()
        return (evaluate(tree, outcome) + 0.0 * outcome).sum()

    compiled = scg.compile(model, closed_forms=True)
    loss = compiled()
    assert not any(site.credits for site in compiled.graph.sites.values()), compiled.graph
    grads = torch.autograd.grad(loss + 0 * sum(params).sum(), params)  # type: ignore[union-attr]
    found = [float(loss.detach()), *(float(g) for g in grads)]
    torch.testing.assert_close(found, by_sympy(tree, name), rtol=1e-9, atol=1e-9)


@settings(max_examples=10, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(POLYNOMIALS, st.sampled_from(sorted(RAW)))
def test_random_polynomials(tree: Tree, name: str) -> None:
    check(tree, name)


@pytest.mark.slow
@settings(max_examples=500, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(POLYNOMIALS, st.sampled_from(sorted(RAW)))
def test_many_random_polynomials(tree: Tree, name: str) -> None:
    check(tree, name)

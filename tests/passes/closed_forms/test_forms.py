"""Moments and divergences against sympy and numerical integration."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import sympy
import torch
from sympy.functions.combinatorial.numbers import stirling
from torch import Tensor
from torch.distributions import (
    Bernoulli,
    Beta,
    Dirichlet,
    Distribution,
    Exponential,
    Gamma,
    Laplace,
    Normal,
    OneHotCategorical,
    Poisson,
    Uniform,
)

from scg.passes.closed_forms.forms import MOMENTS, ORDERS, CentralMoment, has_divergence, has_entropy

a, b, t = sympy.symbols("a b t", positive=True)
A, B = 0.7, 1.9


def _from_mgf(mgf: sympy.Expr) -> Callable[[int], sympy.Expr]:
    """Raw moments, as coefficients of the series of a moment generating function."""
    factors = [sympy.series(factor, t, 0, ORDERS + 1).removeO() for factor in sympy.Mul.make_args(mgf)]
    series = sympy.Poly(sympy.expand(sympy.prod(factors)), t)
    return lambda k: sympy.factorial(k) * series.coeff_monomial(t**k)


RAW: dict[str, tuple[Callable[[Tensor, Tensor], Distribution], Callable[[int], Any]]] = {
    "Normal": (Normal, _from_mgf(sympy.exp(a * t + b**2 * t**2 / 2))),
    "Laplace": (Laplace, _from_mgf(sympy.exp(a * t) / (1 - b**2 * t**2))),
    "Gamma": (Gamma, lambda k: sympy.rf(a, k) / b**k),
    "Exponential": (lambda x, y: Exponential(y), lambda k: sympy.factorial(k) / b**k),
    "Beta": (Beta, lambda k: sympy.rf(a, k) / sympy.rf(a + b, k)),
    "Uniform": (Uniform, lambda k: (b ** (k + 1) - a ** (k + 1)) / ((k + 1) * (b - a))),
    "Poisson": (lambda x, y: Poisson(y), lambda k: sum(stirling(k, i) * b**i for i in range(k + 1))),
    "Bernoulli": (lambda x, y: Bernoulli(probs=x), lambda k: a if k else sympy.Integer(1)),
}
"""The distribution by two parameters, and its k-th raw moment."""


@pytest.mark.parametrize("name", RAW)
def test_central_moments_are_those_of_sympy(name: str) -> None:
    make, raw = RAW[name]
    x, y = (torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (A, B))
    dist = make(x, y)
    mean = raw(1)
    for order in range(2, ORDERS - 2):
        wanted = sum(sympy.binomial(order, i) * raw(i) * (-mean) ** (order - i) for i in range(order + 1))
        numbers = [expr.subs({a: sympy.Rational(7, 10), b: sympy.Rational(19, 10)}).evalf(30)
                   for expr in (wanted, sympy.diff(wanted, a), sympy.diff(wanted, b))]  # fmt: skip
        found = CentralMoment(order)(dist) + 0 * (x + y)  # a number has a gradient too
        grads = torch.autograd.grad(found, [x, y])
        got = [found.detach(), *grads]
        torch.testing.assert_close([float(g) for g in got], [float(n) for n in numbers], rtol=1e-9, atol=1e-9)


def test_elements_of_a_dirichlet_are_beta_and_those_of_a_one_hot_bernoulli() -> None:
    c = torch.tensor([0.6, 1.4, 2.3], dtype=torch.float64)
    for order in range(2, 6):
        wanted = CentralMoment(order)(Beta(c, c.sum() - c))
        torch.testing.assert_close(CentralMoment(order)(Dirichlet(c)), wanted)
        shares = c / c.sum()
        wanted = CentralMoment(order)(Bernoulli(probs=shares))
        torch.testing.assert_close(CentralMoment(order)(OneHotCategorical(probs=shares)), wanted)


def test_what_torch_cannot_say_is_not_known() -> None:
    from torch.distributions import Cauchy, Independent, MultivariateNormal, StudentT, VonMises

    assert not CentralMoment(2).known(Cauchy) and not CentralMoment(2).known(StudentT)  # may be infinite
    assert CentralMoment(2).known(MultivariateNormal) and not CentralMoment(3).known(MultivariateNormal)
    assert not CentralMoment(ORDERS + 1).known(Normal)
    assert has_entropy(Normal) and not has_entropy(Poisson) and not has_entropy(VonMises)
    assert has_divergence(Normal, Normal) and not has_divergence(VonMises, Normal)
    assert not any(issubclass(Independent, family) for family in MOMENTS)

"""Every estimator at extreme parameters: logits of +-30, probabilities 0 and 1, in float32 and under autocast.

The gradient is finite, or compiling says clearly why the estimator cannot be used. Estimators are taken from the
registry, with their defaults: a new one is tested by being there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import (
    Bernoulli,
    Binomial,
    Categorical,
    Distribution,
    Exponential,
    Gamma,
    Geometric,
    Laplace,
    Normal,
    OneHotCategorical,
    Poisson,
)

import scg
from scg.errors import EstimatorError
from scg.estimators.double_cv import DoubleCV
from tests.estimators.finite_noise import FiniteDisARM, FiniteUnorderedSet
from tests.law2 import assert_unbiased
from tests.problems import Problem

SAMPLES = 4
STEPS = 3
INF = math.inf

Make = Callable[[Tensor], Distribution]

BITS = [[30.0, -30.0], [-30.0, -30.0], [30.0, 0.0], [0.0, 0.0]]
ONES = [[1.0, 0.0], [0.0, 0.0], [1.0, 0.5], [0.5, 0.5]]
SCORES = [[[30.0, -30.0, 0.0]] * 2, [[0.0, 0.0, 0.0], [-30.0, -30.0, 30.0]]]
IMPOSSIBLE = [[[-INF, 0.3, 0.0]] * 2, [[0.0, -INF, -INF], [0.0, 30.0, -INF]]]
SHARES = [[[0.0, 1.0, 0.0]] * 2, [[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]]]
SCALES = [[-7.0, 7.0], [0.0, 7.0], [-7.0, 0.0]]
"""Logarithms of positive parameters."""

DISCRETE: dict[str, tuple[Make, Any]] = {
    "Bernoulli-logits": (lambda p: Bernoulli(logits=p), BITS),
    "Bernoulli-probs": (lambda p: Bernoulli(probs=p), ONES),
    "Categorical-logits": (lambda p: Categorical(logits=p), SCORES),
    "Categorical-masked": (lambda p: Categorical(logits=p), IMPOSSIBLE),
    "Categorical-probs": (lambda p: Categorical(probs=p), SHARES),
    "OneHotCategorical-logits": (lambda p: OneHotCategorical(logits=p), SCORES),
    "OneHotCategorical-masked": (lambda p: OneHotCategorical(logits=p), IMPOSSIBLE),
    "OneHotCategorical-probs": (lambda p: OneHotCategorical(probs=p), SHARES),
    "Binomial-logits": (lambda p: Binomial(3, logits=p), BITS),
    "Binomial-probs": (lambda p: Binomial(3, probs=p), ONES),
    "Geometric": (lambda p: Geometric(logits=p), [[15.0, -10.0], [0.0, 10.0]]),  # at 30 only one outcome has a density
    "Poisson": (lambda p: Poisson(p.exp()), SCALES),
}
CONTINUOUS: dict[str, tuple[Make, Any]] = {
    "Normal-loc": (lambda p: Normal(100 * p, 1.0), BITS),
    "Normal-scale": (lambda p: Normal(0.0, p.exp()), SCALES),
    "Laplace": (lambda p: Laplace(p, p.exp()), SCALES),
    "Exponential": (lambda p: Exponential(p.exp()), SCALES),
    "Gamma": (lambda p: Gamma(p.exp(), (-p).exp()), [[-2.0, 5.0], [0.0, 0.0]]),
}
SITES = DISCRETE | CONTINUOUS
TABLE = torch.tensor([[1.0, -2.0, 0.5], [0.3, 0.1, -1.0]])
WEIGHT = torch.tensor([0.7, -1.3])


def cost(z: Tensor, index: bool, one_hot: bool) -> Tensor:
    """One cost for the two elements of each row.  ``[B, 2, …] -> [B]``"""
    if index:
        z = torch.stack([TABLE[0][z[:, 0]], TABLE[1][z[:, 1]]], -1)
    elif one_hot:
        z = (z * TABLE).sum(-1)
    return ((WEIGHT * z).sum(-1) - 0.3) ** 2


def gradient(estimator: str, make: Make, values: Any, autocast: bool, density: bool) -> Tensor | None:
    """The gradient of some steps together; None where the estimator says that it does not fit."""
    parameter = nn.Parameter(torch.tensor(values))
    scale = torch.ones(())

    def model() -> Tensor:
        q = make(parameter * scale)
        z = q.sample()
        loss = cost(z, isinstance(q, Categorical), isinstance(q, OneHotCategorical))
        return (loss + 0.1 * q.log_prob(z).sum(-1) if density else loss).mean()

    try:
        compiled = scg.compile(model, estimator=estimator, samples=SAMPLES, example_inputs=())
    except EstimatorError as error:
        assert repr(estimator) in str(error)
        return None
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        for _ in range(STEPS):
            loss = compiled()
            assert bool(loss.isfinite()), loss
            loss.backward()
    assert parameter.grad is not None
    return parameter.grad


QUICK = (
    "Bernoulli-logits",
    "Bernoulli-probs",
    "Categorical-masked",
    "OneHotCategorical-masked",
    "OneHotCategorical-probs",
)


def _cases() -> Iterator[Any]:
    for estimator in scg.ESTIMATORS:
        for site in SITES:
            for density in (True, False):
                slow = site not in QUICK or not density
                name = f"{estimator}-{site}-{'density' if density else 'plain'}"
                yield pytest.param(estimator, site, density, marks=[pytest.mark.slow] if slow else [], id=name)


@pytest.mark.parametrize(("estimator", "site", "density"), list(_cases()))
def test_finite_at_extreme_parameters(estimator: str, site: str, density: bool) -> None:
    torch.manual_seed(0)
    found = gradient(estimator, *SITES[site], autocast=False, density=density)
    assert found is None or bool(found.isfinite().all()), found


LAYERS: dict[str, Make] = {
    "Bernoulli": lambda p: Bernoulli(logits=p),
    "Categorical": lambda p: Categorical(logits=p.unflatten(-1, (2, 3))),
    "OneHotCategorical": lambda p: OneHotCategorical(probs=torch.softmax(p.unflatten(-1, (2, 3)), -1)),
    "Normal": lambda p: Normal(p, 1.0),
    "Exponential": lambda p: Exponential(torch.nn.functional.softplus(p.float()) + 1e-4),
}


@pytest.mark.parametrize(
    "site", [pytest.param(name, marks=[pytest.mark.slow] if i else []) for i, name in enumerate(LAYERS)]
)
@pytest.mark.parametrize("estimator", scg.ESTIMATORS)
def test_finite_under_autocast(estimator: str, site: str) -> None:
    torch.manual_seed(0)
    make, x = LAYERS[site], torch.randn(5, 4)
    layer, decoder = nn.Linear(4, 2 if site not in ("Categorical", "OneHotCategorical") else 6), nn.Linear(2, 3)

    def model(x: Tensor) -> Tensor:
        q = make(layer(x) * 20)  # bfloat16
        z = q.sample()
        index, one_hot = isinstance(q, Categorical), isinstance(q, OneHotCategorical)
        code = TABLE.gather(1, z.T).T if index else (z * TABLE).sum(-1) if one_hot else z
        return (decoder(code) ** 2).sum(-1).mean() + 0.1 * q.log_prob(z).sum(-1).mean()

    with torch.autocast("cpu", torch.bfloat16):
        try:
            compiled = scg.compile(model, estimator=estimator, samples=SAMPLES, example_inputs=(x,))
        except EstimatorError as error:
            assert repr(estimator) in str(error)
            return
        for _ in range(STEPS):
            compiled(x).backward()
    for parameter in (*layer.parameters(), *decoder.parameters()):
        assert parameter.grad is not None and bool(parameter.grad.isfinite().all())


FINITE: dict[str, Any] = {
    "disarm": FiniteDisARM(),
    "unordered_set": FiniteUnorderedSet(samples=2),
    "double_cv": DoubleCV(samples=2),
}
"""Of estimators with continuous noise or more than one draw, what can be summed."""


@pytest.mark.parametrize("estimator", [name for name, cls in scg.ESTIMATORS.items() if cls.unbiased])
@pytest.mark.parametrize("family", [Categorical, OneHotCategorical])
def test_unbiased_with_impossible_outcomes(estimator: str, family: Any) -> None:
    """Categories without probability, first, in the middle and last: none that is possible may get lost behind them."""
    scores = [[0.3, -INF, 0.9, -INF, 0.1], [-INF, 0.2, -0.4, 0.0, -INF]]
    logits = nn.Parameter(torch.tensor(scores, dtype=torch.float64))
    table = torch.tensor([1.0, -2.0, 0.5, 4.0, 3.0], dtype=torch.float64)

    def model() -> Tensor:
        z = family(logits=logits).sample()
        return ((table[z] if family is Categorical else (z * table).sum(-1)) ** 2).sum()

    try:
        assert_unbiased(Problem(model), estimator=FINITE.get(estimator, estimator))
    except EstimatorError as error:
        assert repr(estimator) in str(error)
    except AssertionError as error:
        if "is not finite noise" not in str(error):
            raise
        pytest.skip(f"{estimator}: its noise is continuous; tested by quadrature elsewhere")

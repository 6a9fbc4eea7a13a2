"""LAX: exact by Gauss-Hermite quadrature, right for every family it takes, and trained in the same backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli, Cauchy, Exponential, Gumbel, Laplace, LogNormal, Normal, Weibull
from torch.utils._python_dispatch import TorchDispatchMode

import scg
from scg.estimators.lax import Lax

aten = torch.ops.aten


class GivenNormal(TorchDispatchMode):
    """Hands out the noise of normal draws."""

    def __init__(self, noise: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._noise = noise

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is aten.normal.Tensor_Tensor:
            return args[0] + args[1] * self._noise
        return func(*args, **(kwargs or {}))


def test_mean_is_the_gradient() -> None:
    nodes, weights = (torch.tensor(a) for a in np.polynomial.hermite_e.hermegauss(80))
    weights = weights / weights.sum()
    loc = nn.Parameter(torch.full((80,), 0.7, dtype=torch.float64))
    scale = nn.Parameter(torch.full((80,), 1.3, dtype=torch.float64))
    torch.manual_seed(0)
    compiled = scg.compile(
        lambda: ((Normal(loc, scale).sample() - 0.2) ** 2).sum(), estimator="lax", example_inputs=()
    ).double()
    with compiled.frozen():
        compiled()
        with GivenNormal(nodes):
            loss = compiled()
    by_loc, by_scale = torch.autograd.grad(loss, [loc, scale])
    assert float((weights * by_loc).sum()) == pytest.approx(2 * 0.5, abs=1e-7)
    assert float((weights * by_scale).sum()) == pytest.approx(2 * 1.3, abs=1e-7)


FAMILIES: dict[str, tuple[Callable[..., Any], tuple[float, ...]]] = {
    "normal": (Normal, (0.7, 1.3)),
    "log_normal": (LogNormal, (0.1, 0.4)),
    "laplace": (Laplace, (-0.4, 0.8)),
    "exponential": (Exponential, (1.4,)),
    "cauchy": (Cauchy, (0.3, 0.6)),
    "gumbel": (Gumbel, (0.2, 0.9)),
    "weibull": (Weibull, (0.9, 1.7)),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family: str) -> None:
    """Against the pathwise gradient, from many elements that share no cost."""
    make, values = FAMILIES[family]
    count = 100_000
    found = []
    for estimator in ("lax", "reparam"):
        params = [nn.Parameter(torch.full((count,), value, dtype=torch.float64)) for value in values]
        torch.manual_seed(0)
        compiled = scg.compile(
            lambda params=params: torch.tanh(make(*params).sample() - 0.5).sum(), estimator=estimator, example_inputs=()
        ).double()
        found.append(torch.autograd.grad(compiled(), params))
    for lax, reparam in zip(*found, strict=True):
        error = (lax.var() + reparam.var()).sqrt() / count**0.5
        assert abs(float(lax.mean() - reparam.mean())) < 5 * float(error)


def test_a_jump_below_is_legal_and_training_lowers_the_variance() -> None:
    torch.manual_seed(0)
    loc = nn.Parameter(torch.zeros(500))
    compiled = scg.compile(
        lambda: (Normal(loc, 1.0).sample() > 0.5).float().sum() * 3 + (loc * 0).sum(), estimator=Lax(hidden=16),
        example_inputs=(),
    )  # fmt: skip
    before = scg.gradient_samples(compiled, n=40, seed=1)["loc"]
    optimizer = torch.optim.Adam(compiled.estimator_parameters(), lr=0.02)
    for _ in range(300):
        optimizer.zero_grad()
        compiled().backward()
        optimizer.step()
    after = scg.gradient_samples(compiled, n=40, seed=2)["loc"]
    assert float(after.var()) < 0.7 * float(before.var())
    exact = 3 * torch.exp(torch.tensor(-0.125)) / (2 * torch.pi) ** 0.5
    for samples in (before, after):
        assert abs(float(samples.mean() - exact)) < 5 * float(samples.std()) / samples.numel() ** 0.5


def test_discrete_draws_are_refused() -> None:
    logits = nn.Parameter(torch.zeros(()))
    with pytest.raises(scg.EstimatorError, match="distribution function"):
        scg.compile(lambda: Bernoulli(logits=logits).sample(), estimator="lax", example_inputs=())

"""Mohamed et al. 2020, section 3: costs of a Normal at mean and scale one, the variance of three estimators."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.distributions import Normal

from benchmarks.papers.setting import Figure, gradients, near
from scg.estimators import ESTIMATORS

KNOWN: dict[str, tuple[Callable[[Tensor], Tensor], float, dict[str, float]]] = {
    "(x + 3)^2": (lambda x: (x + 3) ** 2, 8.0, {"score_function": 495.0, "reparam": 4.0, "measure_valued": 17.487}),
    "x^2": (lambda x: x**2, 2.0, {"score_function": 30.0, "reparam": 4.0, "measure_valued": 1.093}),
    "exp(-x^2)": (lambda x: torch.exp(-(x**2)), -0.2758,
                  {"score_function": 0.1758, "reparam": 0.2117, "measure_valued": 0.01257}),
    "cos x": (lambda x: torch.cos(x), -0.5104,
              {"score_function": 0.324, "reparam": 0.2677, "measure_valued": 0.028}),
    "cos 5x": (lambda x: torch.cos(5 * x), 1.8e-5,
               {"score_function": 0.5, "reparam": 12.5, "measure_valued": 0.2957}),
}  # fmt: skip
"""Cost to its gradient in the mean and each estimator's variance, by quadrature."""


def run(quick: bool = False) -> Iterator[Figure]:
    replicas = 5_000 if quick else 1_000_000
    within = 0.5 if quick else 0.02
    for name, (cost, gradient, variances) in KNOWN.items():
        for estimator, variance in variances.items():
            made = ESTIMATORS["score_function"](baseline=None) if estimator == "score_function" else estimator
            if estimator == "measure_valued":
                made = ESTIMATORS[estimator](coupled=True)

            def program(mean: Tensor, cost: Callable[[Tensor], Tensor] = cost) -> Tensor:
                return cost(Normal(mean, torch.ones_like(mean)).sample())

            found = gradients(program, 1.0, replicas, estimator=made)
            error = math.sqrt(variance / replicas)
            yield near(f"{name}: gradient by {estimator}", gradient, float(found.mean()), 1e-3, 5 * error)
            yield near(f"{name}: variance of {estimator}", variance, float(found.var()), within)

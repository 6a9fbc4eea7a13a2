"""E[(b - p0)^2] of one Bernoulli: the variances of REINFORCE, leave-one-out, ARM and DisARM in closed form.

Yin and Zhou 2019; Dong, Mnih and Tucker 2020; Dimitriev and Zhou 2021, whose figure at p0 = 0.49, theta = 0 these are.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch.distributions import Bernoulli

from benchmarks.papers.setting import Figure, gradients, near
from scg.estimators import ESTIMATORS

P0 = 0.49


def cost(theta: Tensor) -> Tensor:
    return (Bernoulli(logits=theta).sample() - P0) ** 2


def run(quick: bool = False) -> Iterator[Figure]:
    replicas = 2_000 if quick else 400_000
    within = 0.5 if quick else 0.03
    for theta in (0.0, -2.0):
        p = 1 / (1 + math.exp(-theta))
        v, m, d = p * (1 - p), min(p, 1 - p), 1 - 2 * P0
        f0, f1 = P0**2, (1 - P0) ** 2
        plain = ESTIMATORS["score_function"](baseline=None)
        known: dict[str, tuple[dict[str, Any], float]] = {
            "REINFORCE": ({"estimator": plain}, v * ((1 - p) * f1 + p * f0) ** 2),
            **{f"leave-one-out, K = {k}": ({"estimator": "score_function", "samples": k},
               d**2 * v / k * (1 - v * (4 * k - 6) / (k - 1))) for k in (2, 4, 8)},
            "ARM": ({"estimator": "arm"}, d**2 * (2 / 3 * (1 / 8 - (1 / 2 - m) ** 3) - v**2)),
            "DisARM": ({"estimator": "disarm"}, d**2 * m * (1 - m) ** 2 * (1 / 2 - m)),
            "unordered set, k = 2": ({"estimator": "unordered_set"}, 0.0),
            "measure-valued": ({"estimator": "measure_valued"}, 0.0),
        }  # fmt: skip
        for name, (options, variance) in known.items():
            found = gradients(cost, theta, replicas, **options)
            yield near(f"variance of {name} at theta = {theta:g}", variance, float(found.var()), within)

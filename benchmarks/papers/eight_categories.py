"""Three Bernoullis with one logit as an 8-way categorical: Liu et al. 2019, section 5.1; Kool et al. 2020, section 5.1.

The variances are exact sums over all outcomes; the papers' figures are draws of the same.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.distributions import Categorical

from benchmarks.papers.setting import Figure, gradients, near
from scg.estimators import ESTIMATORS

GOALS = (0.6, 0.51, 0.48)
BITS = torch.cartesian_prod(*[torch.tensor([0.0, 1.0], dtype=torch.float64)] * 3)  # [8, 3]
COSTS = ((BITS - torch.tensor(GOALS, dtype=torch.float64)) ** 2).sum(1)

LEAVE_ONE_OUT = {
    0.0: {2: 7.2750e-3, 3: 3.2000e-3, 4: 1.9875e-3, 8: 7.5804e-4},
    -4.0: {2: 3.8102e-4, 3: 2.4578e-4, 4: 1.8228e-4, 8: 8.9962e-5},
}
UNORDERED = {
    0.0: {2: 6.1125e-3, 3: 2.2625e-3, 4: 1.1308e-3, 8: 0.0},
    -4.0: {2: 2.9782e-5, 3: 8.0711e-6, 4: 1.0555e-6, 8: 0.0},
}
REINFORCE = {0.0: 0.438420, -4.0: 0.0335568}


def cost(eta: Tensor) -> Tensor:
    log_p = torch.nn.functional.logsigmoid(eta)[:, None, None], torch.nn.functional.logsigmoid(-eta)[:, None, None]
    logits = torch.where(BITS > 0, *log_p).sum(-1)  # [N, 8]
    return COSTS[Categorical(logits=logits).sample()]


def run(quick: bool = False) -> Iterator[Figure]:
    replicas, steps = (2_000, 1) if quick else (20_000, 8)
    within = 1.0 if quick else 0.05
    for eta in (0.0, -4.0):
        plain = ESTIMATORS["score_function"](baseline=None)
        found = gradients(cost, eta, replicas, steps, estimator=plain)
        yield near(f"variance of REINFORCE at eta = {eta:g}", REINFORCE[eta], float(found.var()), within)
        for k, variance in LEAVE_ONE_OUT[eta].items():
            found = gradients(cost, eta, replicas, steps, estimator="score_function", samples=k)
            yield near(f"variance of leave-one-out, K = {k}, at eta = {eta:g}", variance, float(found.var()), within)
        for k, variance in UNORDERED[eta].items():
            found = gradients(cost, eta, replicas, steps, estimator=ESTIMATORS["unordered_set"](samples=k))
            yield near(f"variance of unordered set, k = {k}, at eta = {eta:g}", variance, float(found.var()), within)

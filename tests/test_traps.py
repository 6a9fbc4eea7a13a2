"""Programs that mix the elements of one site: the estimated gradient, summed over all draws, is the exact one.

Each is credited element by element, so that a relation that says too little would show as a bias.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Bernoulli

import scg
from scg.estimators.score_function import ScoreFunction
from tests.law2 import expected_estimate

DTYPE = torch.float64
A = torch.tensor([1.0, 2.0, -1.5], dtype=DTYPE)
PERM = torch.tensor([2, 0, 1])
TABLE = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=DTYPE)


def _conv() -> nn.Conv1d:
    torch.manual_seed(0)
    return nn.Conv1d(1, 1, 2, padding=1, dtype=DTYPE)


CONV, NORM = _conv(), nn.BatchNorm1d(2, dtype=DTYPE)


def _in_place(z: Tensor) -> Tensor:
    y = z.clone()
    y[1:] = z[:-1] * 2
    y[0] = y[2] + 1
    y.view(3, 1).mul_(A[:, None])
    return (y**2).mean()


def _look_ups_are_views(z: Tensor) -> Tensor:
    i, j = z[:2].sum().long(), (z[1:].sum() + 1).long() % 3
    y = torch.arange(12.0, dtype=DTYPE).reshape(3, 2, 2)
    row, other = y[i], y[:, z[0].long()]
    row.mul_(2)  # writes into y, and so into `other`
    y[j, 1] = 3 * z[0] + other[0]
    y[..., z[2].long()] -= 1
    y[i - 1] += row  # minus one is the last
    return (y * torch.arange(12.0, dtype=DTYPE).reshape(3, 2, 2)).sum() * row[0, 1] + other.prod()


def _visited(z: Tensor) -> Tensor:
    left, total = A.clone(), torch.zeros((), dtype=DTYPE)
    for k in z.cumsum(0).long() % 3:
        total = total + left[k] ** 2
        left[k] = 0.1
    return total * left.prod()


TRAPS: dict[str, Callable[[Tensor], Tensor]] = {
    "centred": lambda z: ((z - z.mean(0)) ** 2 * A).mean(),
    "roll": lambda z: (torch.roll(z, 1) * z * A).mean(),
    "flip": lambda z: (z.flip(0) * z * A).mean(),
    "permuted": lambda z: (z[PERM] * z * A).mean(),
    "cumsum": lambda z: (z.cumsum(0) ** 2 * A).mean(),
    "softmax over the batch": lambda z: (z.softmax(0) * A).mean(),
    "sort": lambda z: (z.sort(0)[0] * A).mean(),
    "topk": lambda z: (z * A).topk(2)[0].sum(),
    "matmul over the batch": lambda z: (z[None] @ z[:, None]).squeeze() ** 2,
    "rotated cat": lambda z: (torch.cat([z[1:], z[:1]]) * z * A).mean(),
    "interleaving reshape": lambda z: ((torch.stack([z, 2 * z]).reshape(3, 2).t() * A) ** 2).mean(),
    "gather": lambda z: (z.gather(0, PERM) * A * z).mean(),
    "scatter": lambda z: (torch.zeros(3, dtype=DTYPE).scatter(0, PERM, z * A) * z).mean(),
    "scatter_add": lambda z: (torch.zeros(2, dtype=DTYPE).scatter_add(0, PERM % 2, z * A) ** 2).mean(),
    "conv over the batch": lambda z: (CONV(z[None, None]) ** 2).mean(),
    "max_pool over the batch": lambda z: (F.max_pool1d((z * A)[None, None], 2, 1) * 2).mean(),
    "layer_norm": lambda z: (F.layer_norm(z, (3,)) * A).mean(),
    "as_strided": lambda z: (torch.as_strided(z.clone(), (2, 2), (1, 1)) ** 2).sum(1).mean(),
    "pad": lambda z: (F.pad(z, (1, 0))[:3] * z * A).mean(),
    "unfold": lambda z: z.unfold(0, 2, 1).prod(-1).mean(),
    "repeat_interleave": lambda z: (z.repeat_interleave(2)[1:4] * A * z).mean(),
    "kron": lambda z: ((torch.kron(z, torch.ones(2, dtype=DTYPE)).reshape(2, 3) * A) ** 2).mean(),
    "cdist": lambda z: torch.cdist(z[:, None], z[:, None] * A[:, None]).mean(),
    "batch_norm": lambda z: (NORM(torch.stack([z, z * z * 2], 1))[:, 0] * A).mean(),
    "in-place": _in_place,
    "look-ups are views": _look_ups_are_views,
    "look-ups are written": _visited,
    "look-up by samples": lambda z: TABLE[(z[:2] + 2 * z[1:]).long()].prod() * z[2],
    "einsum": lambda z: (torch.einsum("i,j->ij", z, z).sum(0) ** 2).mean(),
    "stack of pieces": lambda z: torch.stack([z[0] * z[1], z[1] * 2, z[2] ** 2]).mean(),
    "fused loss": lambda z: F.binary_cross_entropy_with_logits(z * A, torch.ones(3, dtype=DTYPE)),
    "cross entropy": lambda z: F.cross_entropy(z[:, None] * A, torch.tensor([0, 2, 1])),
    "logsumexp": lambda z: torch.logsumexp(z * A, 0),
    "where": lambda z: torch.where(z > 0.5, A, 2 * A).sum() + z.prod(),
    "norm": lambda z: (z * A).norm(),
    "variance": lambda z: (z * A).var(),
}

ESTIMATORS: dict[str, dict[str, Any]] = {
    "plain": {"estimator": ScoreFunction(baseline=None)},
    "leave_one_out": {"estimator": ScoreFunction(baseline="leave_one_out"), "samples": 2},
    "own draws": {"estimator": ScoreFunction(samples=2)},
    "enumerate": {"estimator": "enumerate"},
}


@pytest.mark.parametrize("options", ESTIMATORS.values(), ids=list(ESTIMATORS))
@pytest.mark.parametrize("name", list(TRAPS))
def test_exact(name: str, options: dict[str, Any]) -> None:
    w = nn.Parameter(torch.tensor([0.3, -0.5, 0.8], dtype=DTYPE))
    trap = TRAPS[name]

    def loss() -> Tensor:
        z = Bernoulli(logits=w).sample()
        return trap(z)

    compiled = scg.compile(loss, **options)
    compiled()
    value, gradient = expected_estimate(compiled, {"w": w})
    exact_value, exact_gradient = scg.exact(loss)
    torch.testing.assert_close(value, exact_value)
    torch.testing.assert_close(gradient["w"], exact_gradient["w"])

"""Small finite programs with several estimators side by side, for law 2."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli, Categorical

from tests.law2 import assert_unbiased
from tests.problems import PROBLEMS, Problem

HERE = "here"
"""Stands for the estimator under test."""

CHAIN: dict[str, dict[str, str]] = {
    "upstream": {"a": HERE, "*": "score_function"},
    "downstream": {"c": HERE, "*": "score_function"},
    "both": {"*": HERE},
    "around_enumerated": {"b": "enumerate", "*": HERE},
    "below_enumerated": {"a": "enumerate", "*": HERE},
    "above_enumerated": {"c": "enumerate", "*": HERE},
}
"""Which site of `tests.problems.chain` has which estimator."""

PROGRAMS = (
    "diamond", "some_costs", "upstream_costs", "tied_batch", "flattened_dims", "mixed_batch", "sampled_mask",
    "detached", "learned_coefficient", "changing_mask", "shared_logits", "independent_elbo",
)  # fmt: skip
"""Of `tests.problems`: shared costs, vector sites with tied dims, coefficients that change."""


def smooth_costs(name: str) -> bool:
    """Whether all paths of the program are differentiable."""
    return name not in ("detached", "not_differentiable", "opaque_cost")


def assert_unbiased_in_chain(estimator: Any, mix: str, **options: Any) -> None:
    """Law 2 on the chain of three with ``estimator`` at some of its sites."""
    given = {name: estimator if spec == HERE else spec for name, spec in CHAIN[mix].items()}
    assert_unbiased(PROBLEMS["chain"](), estimators=given, **options)


def problems(*more: str, without: tuple[str, ...] = ()) -> Iterator[str]:
    """Names of the programs, and ``more``."""
    yield from (name for name in (*PROGRAMS, *more) if name not in without)


class _Tied(nn.Module):
    """``[B, D]`` with one cost for each row of ``D``."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([[0.3, -0.8], [1.1, 0.2]], dtype=torch.float64))
        self.v = nn.Parameter(torch.tensor([0.7, -1.6], dtype=torch.float64))

    def forward(self) -> Tensor:
        z = Bernoulli(logits=self.w).sample()
        return ((z @ self.v - 0.4) ** 2).mean() + 0.3 * torch.exp(z).sum()


def tied_rows() -> Problem:
    """A batch of vectors, tied over the batch: elements of different examples may change in the same row."""
    return Problem(_Tied(), bits=4)


class _CategoricalChain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([0.4, -0.9, 0.2], dtype=torch.float64))
        self.table = nn.Parameter(
            torch.tensor([[0.3, 1.2, -0.7], [-0.8, 0.1, 0.9], [0.2, -0.4, 0.6]], dtype=torch.float64)
        )

    def forward(self) -> Tensor:
        top = Categorical(logits=self.w).sample()
        bottom = Categorical(logits=self.table[top]).sample()
        return (self.table[top, bottom] - 0.2) ** 2 * (1 + bottom) + 2.0 * self.w[top]


def categorical_chain() -> Problem:
    """Three outcomes above three, a cost of both and one of the upper."""
    return Problem(_CategoricalChain(), bits=4)

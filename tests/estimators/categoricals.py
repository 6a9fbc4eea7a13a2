"""Small programs with categorical sites, for law 2 of the estimators that are made for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli, Categorical, Independent, OneHotCategorical

import scg
from tests.estimators.mixes import categorical_chain
from tests.problems import PROBLEMS, Problem

HERE = "here"
"""Stands for the estimator under test."""


def _parameter(*values: Any) -> nn.Parameter:
    return nn.Parameter(torch.tensor(values, dtype=torch.float64))


class _Index(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w, self.table = _parameter(0.2, -0.3, 0.5), _parameter(1.0, -2.0, 0.7)

    def forward(self) -> Tensor:
        return (self.table[Categorical(logits=self.w).sample()] - 0.4) ** 2


def one_index() -> Problem:
    """One draw looks up a learned table."""
    return Problem(_Index())


class _Shared(nn.Module):
    def __init__(self, probs: bool) -> None:
        super().__init__()
        self.probs = probs
        self.w = _parameter([0.2, -0.3, 0.5], [1.0, 0.1, -0.8])
        self.table = _parameter([1.0, -2.0, 0.7], [0.3, 0.6, -1.1], [-0.4, 0.9, 0.2])

    def forward(self) -> Tensor:
        q = Categorical(probs=self.w.exp()) if self.probs else Categorical(logits=self.w)
        z = q.sample()  # [2]
        return self.table[z[0], z[1]] ** 2 + self.w[0, 1] * z[1]


def shared_cost() -> Problem:
    """Two elements meet in one cost, one has another of its own."""
    return Problem(_Shared(probs=False), bits=4)


def from_probabilities() -> Problem:
    """The same, of probabilities that do not sum to one."""
    return Problem(_Shared(probs=True), bits=4)


class _Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = _parameter([[0.2, -0.3], [1.0, 0.1]], [[0.4, 0.0], [-0.8, 0.5]])
        self.v = _parameter([0.7, -1.2], [0.4, 2.0])

    def forward(self) -> Tensor:
        z = OneHotCategorical(logits=self.w).sample()  # [B, D | 2]
        return (((z * self.v).sum((-1, -2)) - 0.4) ** 2).mean() + 0.3 * torch.exp(z[..., 0]).sum()


def tied_vectors() -> Problem:
    """A batch of vectors, tied over the batch."""
    return Problem(_Tied(), bits=4)


class _Jumps(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = _parameter(0.2, -0.3, 0.5)

    def forward(self) -> Tensor:
        z = OneHotCategorical(logits=self.w).sample()
        return (z.argmax(-1) > 0).to(z.dtype) * 2 + torch.round(1.3 * z[1] + 0.4 * z[2])


def jumps() -> Problem:
    """Comparison, argmax and rounding of a one-hot draw."""
    return Problem(_Jumps())


@scg.opaque(shape=lambda z: z.shape, dtype=torch.float64, batch_dims=1)
def _reward(z: Tensor) -> Tensor:
    return torch.from_numpy((z.numpy() - 0.7) ** 2)


class _Opaque(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = _parameter([0.2, -0.3, 0.5], [1.0, 0.1, -0.8])

    def forward(self) -> Tensor:
        return scg.cost(_reward(Categorical(logits=self.w).sample()), "reward").mean()


def opaque_reward() -> Problem:
    """A reward computed by numpy, tied over a batch."""
    return Problem(_Opaque(), bits=4)


class _Elbo(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enc, self.dec = _parameter([0.4, -0.8, 0.1], [0.2, 0.6, -0.5]), _parameter(1.5, -1.0, 0.3)

    def forward(self) -> Tensor:
        q = Independent(Categorical(logits=self.enc), 1)
        z = q.sample()  # [2]
        nll = -Bernoulli(logits=self.dec[z].sum()).log_prob(torch.ones((), dtype=torch.float64))
        return nll + q.log_prob(z)


def categorical_elbo() -> Problem:
    """The sites' own log density is a cost; `Independent` joins two of them."""
    return Problem(_Elbo(), bits=4)


class _Below(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w, self.v = _parameter(0.2, -0.3, 0.5), _parameter(0.4, -0.6, 1.1)

    def forward(self) -> Tensor:
        z = Categorical(logits=self.w).sample()
        y = Bernoulli(logits=self.v[z]).sample()
        return (y - 0.3) ** 2 * (1 + z) + self.v[z]


def bernoulli_below() -> Problem:
    """An index picks the logit of a Bernoulli."""
    return Problem(_Below(), bits=3)


PROGRAMS: dict[str, Callable[[], Problem]] = {
    make.__name__: make
    for make in (
        one_index, shared_cost, from_probabilities, tied_vectors, jumps, opaque_reward, categorical_elbo,
        PROBLEMS["integer_index"], PROBLEMS["one_hot"],
    )
}  # fmt: skip

MIXES: dict[str, tuple[Callable[[], Problem], dict[str, Any]]] = {
    "upstream": (categorical_chain, {"top": HERE, "bottom": "score_function"}),
    "downstream": (categorical_chain, {"top": "score_function", "bottom": HERE}),
    "both": (categorical_chain, {"*": HERE}),
    "below enumerated": (categorical_chain, {"top": "enumerate", "bottom": HERE}),
    "above enumerated": (categorical_chain, {"top": HERE, "bottom": "enumerate"}),
    "above a Bernoulli": (bernoulli_below, {"z": HERE, "y": "score_function"}),
    "above local expectation": (bernoulli_below, {"z": HERE, "y": "local_expectation"}),
}
"""Programs with two sites, and who has which estimator."""


def mixed(mix: str, estimator: Any) -> tuple[Problem, dict[str, Any]]:
    """The program of a mix, and its sites' estimators with ``estimator`` in its place."""
    make, given = MIXES[mix]
    return make(), {site: estimator if spec == HERE else spec for site, spec in given.items()}

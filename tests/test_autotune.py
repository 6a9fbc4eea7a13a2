"""autotune: finds what an exhaustive grid finds, and never a biased estimator unless allowed."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli, Categorical, Normal, kl_divergence

import scg
from scg.measure.sites import every_estimator
from tests.test_compare import Mixed


class VAE(nn.Module):
    """20 bits an example: too many to sum."""

    def __init__(self, pixels: int = 32, bits: int = 20) -> None:
        super().__init__()
        self.enc, self.dec = nn.Linear(pixels, bits), nn.Linear(bits, pixels)

    def forward(self, x: Tensor) -> Tensor:
        q = Bernoulli(logits=self.enc(x))
        z = q.sample()
        nll = -Bernoulli(logits=self.dec(z)).log_prob(x).sum(-1)
        return (nll + kl_divergence(q, Bernoulli(logits=torch.zeros_like(q.logits))).sum(-1)).mean()


class Policy(nn.Module):
    """Three actions in a row, each with noise between, and a reward that is a table."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(4, 3)
        self.reward: Tensor
        self.register_buffer("reward", torch.randn(3, 3, generator=torch.Generator().manual_seed(1)))

    def forward(self, state: Tensor) -> Tensor:
        loss = torch.zeros(len(state))
        before = torch.zeros(len(state), dtype=torch.long)
        for _ in range(3):
            state = Normal(state, 0.1).sample()
            a = Categorical(logits=self.net(state)).sample()
            loss = loss - self.reward[before, a]
            state = state + 0.3 * torch.nn.functional.one_hot(a, 4)
            before = a
        return loss.mean()


MODELS: dict[str, tuple[Any, Tensor]] = {
    "vae": (VAE, (torch.rand(20, 32, generator=torch.Generator().manual_seed(0)) < 0.4).float()),
    "policy": (Policy, torch.randn(16, 4, generator=torch.Generator().manual_seed(0))),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_as_good_as_an_exhaustive_grid(name: str) -> None:
    make, x = MODELS[name]
    model = make()
    samples = (1, 2, 4)
    start = time.perf_counter()
    tuned = scg.autotune(model, x, samples=samples, budget=40, progress=False)
    assert time.perf_counter() - start < 60
    mine = tuned.arguments["estimators"] or "auto"
    grid = scg.compare(
        model, x, estimators=[mine, *every_estimator()], samples=samples, time_budget=60, progress=False
    )  # fmt: skip
    chosen = next(row for row in grid.rows if dict(row.setting.estimators) == (mine if mine != "auto" else {})
                  and row.setting.samples == tuned.arguments["samples"])  # fmt: skip
    assert chosen.work <= 1.3 * grid.best.work, f"{tuned}\n{grid}"


def test_each_site_gets_its_own() -> None:
    tuned = scg.autotune(
        Mixed(), budget=6, samples=(2,), estimators=["reparam", "score_function", "straight_through", "disarm"],
        progress=False,
    )  # fmt: skip
    sites = tuned.compile(Mixed(), example_inputs=()).graph.sites
    assert sites["z"].estimator == "reparam" and sites["b"].estimator in ("disarm", "enumerate")
    assert all(row.unbiased for row in tuned.comparison.rows)
    assert "chosen" in str(tuned)


def test_a_biased_estimator_needs_leave() -> None:
    options: dict[str, Any] = {"estimators": ["straight_through"], "budget": 30, "samples": (1,), "progress": False}
    strict, free = (scg.autotune(Mixed(), allow_biased=yes, **options).comparison for yes in (False, True))
    assert [row.setting.label for row in strict.rows] == ["as compiled", "auto"][: len(strict.rows)]
    assert "straight_through" in [row.setting.label for row in free.rows]


def test_an_unknown_criterion_is_a_near_miss() -> None:
    with pytest.raises(scg.EstimatorError, match="did you mean 'work'"):
        scg.autotune(Mixed(), criterion="wrk")


def test_a_compiled_module_takes_part_with_what_it_uses() -> None:
    compiled = scg.compile(Mixed(), estimators={"b": "arm"})
    tuned = scg.autotune(compiled, budget=1, estimators=["score_function"], samples=(1,), progress=False)
    assert "as compiled" in [row.setting.label for row in tuned.comparison.rows]


def test_an_exact_gradient_needs_one_draw() -> None:
    logits = torch.nn.Parameter(torch.zeros(3))

    def model() -> Tensor:
        return (Categorical(logits=logits).sample() - 0.4).square()

    tuned = scg.autotune(model, budget=2, estimators=["enumerate"], samples=(8, 4, 1), progress=False)
    assert tuned.choice.work == 0 and tuned.arguments["samples"] == 1

"""RODEO: exact over all draws of two copies whatever its network says, and trained by the variance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli, Categorical

import scg
from scg.estimators.base import SiteInfo
from scg.estimators.rodeo import Rodeo
from scg.exact import Walk
from tests.estimators.finite_noise import moments
from tests.estimators.mixes import tied_rows
from tests.law2 import ForcedDraws, assert_unbiased, expected_estimate
from tests.problems import PROBLEMS


@dataclass(frozen=True)
class Started(Rodeo):
    """`Rodeo` with a network that says something from the start."""

    hidden: int = 3

    def make_state(self, site: SiteInfo, batch_dims: tuple[int, ...], draws: int) -> nn.Module:
        state = super().make_state(site, batch_dims, draws).double()
        with torch.no_grad():
            for index, parameter in enumerate(state.parameters()):
                count = parameter.numel()
                parameter.copy_(torch.linspace(-0.9, 1.3 + 0.2 * index, count).reshape(parameter.shape))
        return state


SLOW = (
    "learned_coefficient",
    "some_costs",
    "shared_logits",
    "tied_batch",
    "detached",
    "mixed_batch",
    "annealed_beta",
    "closed_form_kl",
    "not_differentiable",
)
PROGRAMS = ("upstream_costs", "closure", "one_hot", *SLOW)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in PROGRAMS]
)
def test_unbiased(name: str) -> None:
    problem = PROBLEMS[name]()
    assert_unbiased(problem, estimator=Started(), estimators=problem.estimators, samples=2)


@pytest.mark.parametrize(
    "estimators",
    [{"top": Started(), "*": "enumerate"}, {"bottom": Started(), "*": "enumerate"},
     {"bottom": Started(), "*": "score_function"},
     pytest.param({"top": Started(), "*": "score_function"}, marks=pytest.mark.slow),
     pytest.param({"*": Started()}, marks=pytest.mark.slow),
     pytest.param({"top": Started(), "bottom": "double_cv"}, marks=pytest.mark.slow)],
)  # fmt: skip
def test_unbiased_beside_others(estimators: dict[str, Any]) -> None:
    assert_unbiased(PROBLEMS["score_below_enumerated"](), estimators=estimators, samples=2)


@pytest.mark.slow
def test_unbiased_with_three_draws() -> None:
    assert_unbiased(PROBLEMS["some_costs"](), estimator=Started(), samples=3)


@pytest.mark.slow
def test_tied_rows() -> None:
    assert_unbiased(tied_rows(), estimator=Started(), samples=2)


def _toy(logits: Tensor) -> Any:
    def loss() -> Tensor:
        return (Bernoulli(logits=logits).sample().sum() - 0.7) ** 3

    return loss


def test_it_starts_as_leave_one_out() -> None:
    logits = nn.Parameter(torch.tensor([0.3, -0.7], dtype=torch.float64))
    found = []
    for estimator in ("rodeo", "score_function"):
        compiled = scg.compile(_toy(logits), estimator=estimator, samples=2, example_inputs=()).double()
        with compiled.frozen():
            found.append(moments(compiled, {"logits": logits})["logits"])
    torch.testing.assert_close(found[0], found[1])


def test_it_learns_the_gradient_of_the_variance() -> None:
    logits = nn.Parameter(torch.tensor([0.3, -0.7], dtype=torch.float64))
    compiled = scg.compile(_toy(logits), estimator=Started(), samples=2, example_inputs=())
    compiled()
    learned = dict(compiled.named_parameters())
    learned = {name: p for name, p in learned.items() if name.startswith("estimators.")}

    def second_moment() -> float:
        total = 0.0
        walk = Walk()
        with compiled.frozen():
            compiled()
            while walk.more():
                with ForcedDraws(walk) as draws:
                    estimate = compiled()
                (g,) = torch.autograd.grad(estimate, logits)
                total += draws.probability * float((g**2).sum())
        return total

    _, gradient = expected_estimate(compiled, learned)
    for name, parameter in learned.items():
        flat = parameter.detach().view(-1)
        before = float(flat[-1])
        ends = []
        for step in (1e-5, -1e-5):
            flat[-1] = before + step
            ends.append(second_moment())
        flat[-1] = before
        slope = (ends[0] - ends[1]) / 2e-5
        assert float(gradient[name].view(-1)[-1]) == pytest.approx(slope, rel=1e-5, abs=1e-8), name


@pytest.mark.slow
def test_training_lowers_the_variance() -> None:
    torch.manual_seed(0)
    logits = nn.Parameter(torch.tensor([0.3, -0.7, 0.1], dtype=torch.float64))
    compiled = scg.compile(_toy(logits), estimator="rodeo", samples=2, example_inputs=()).double()

    def variance() -> float:
        with compiled.frozen():
            return float(moments(compiled, {"logits": logits})["logits"][1].sum())

    before = variance()
    optimizer = torch.optim.Adam(compiled.estimator_parameters(), lr=0.01)
    for _ in range(2000):
        optimizer.zero_grad()
        compiled().backward()
        optimizer.step()
    assert variance() < 0.5 * before


def test_training_touches_the_network_alone() -> None:
    logits = nn.Parameter(torch.tensor([0.3, -0.7], dtype=torch.float64))
    compiled = scg.compile(_toy(logits), estimator=Started(), samples=2, example_inputs=())
    torch.manual_seed(3)
    compiled().backward()
    assert logits.grad is not None and all(p.grad is not None for p in compiled.estimator_parameters())
    trained = logits.grad.clone()
    logits.grad = None
    torch.manual_seed(3)
    with compiled.frozen():
        compiled().backward()
    torch.testing.assert_close(logits.grad, trained, rtol=0, atol=1e-14)


def test_refusals_say_why() -> None:
    logits = nn.Parameter(torch.zeros(2))
    with pytest.raises(scg.EstimatorError, match="samples=2"):
        scg.compile(lambda: Bernoulli(logits=logits).sample().sum(), estimator="rodeo", example_inputs=())
    with pytest.raises(scg.EstimatorError, match="draw from OneHotCategorical"):
        scg.compile(lambda: Categorical(logits=logits).sample().float(), estimator="rodeo", samples=2)()
    with pytest.raises(ValueError, match="hidden=0 must be at least 1"):
        Rodeo(hidden=0)

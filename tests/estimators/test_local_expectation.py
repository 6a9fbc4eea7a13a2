"""Local expectation and its relatives: exact over all draws, packed rows, only the slice below evaluated."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli, Categorical, Normal
from torch.overrides import TorchFunctionMode

import scg
from tests.estimators.mixes import CHAIN, assert_unbiased_in_chain, problems, tied_rows
from tests.law2 import assert_unbiased
from tests.problems import PROBLEMS, Problem

FAMILY = ("local_expectation", "bitflip")
"""The estimators of any finite support that evaluate single changes."""


@pytest.mark.parametrize(
    "name", list(problems("one_hot", "integer_index", "binomial", "not_differentiable", "opaque_cost"))
)
@pytest.mark.parametrize("estimator", FAMILY)
def test_unbiased(name: str, estimator: str) -> None:
    problem = PROBLEMS[name]()
    assert_unbiased(problem, estimator=estimator, estimators=problem.estimators)


@pytest.mark.parametrize(
    "name", ["some_costs", "upstream_costs", "tied_batch", "diamond", "shared_logits", "one_hot", "learned_coefficient",
             "binomial", pytest.param("closed_form_kl", marks=pytest.mark.slow),
             pytest.param("not_differentiable", marks=pytest.mark.slow)],
)  # fmt: skip
def test_indecater_is_unbiased(name: str) -> None:
    assert_unbiased(PROBLEMS[name](), estimator="indecater")


@pytest.mark.parametrize("mix", ["upstream", "downstream", "around_enumerated"])
def test_indecater_is_unbiased_beside_others(mix: str) -> None:
    assert_unbiased_in_chain("indecater", mix)


@pytest.mark.parametrize("mix", CHAIN)
@pytest.mark.parametrize("estimator", FAMILY)
def test_unbiased_beside_others(mix: str, estimator: str) -> None:
    assert_unbiased_in_chain(estimator, mix)


@pytest.mark.parametrize("estimator", FAMILY)
def test_unbiased_with_two_draws(estimator: str) -> None:
    assert_unbiased(PROBLEMS["some_costs"](), estimator=estimator, samples=2)
    assert_unbiased(PROBLEMS["upstream_costs"](), estimator=estimator, samples=2)


@pytest.mark.parametrize("credit", ["node", "none"])
def test_coarse_credit_forbids_packing(credit: str) -> None:
    assert_unbiased(PROBLEMS["tied_batch"](), estimator="local_expectation", credit=credit)


@pytest.mark.parametrize("estimator", FAMILY)
def test_tied_rows(estimator: str) -> None:
    assert_unbiased(tied_rows(), estimator=estimator)


class _Wide(nn.Module):
    """``[B, D]`` latents, a decoder below, a network above."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(6, 3), nn.Linear(3, 6)

    def forward(self, x: Tensor) -> Tensor:
        z = Bernoulli(logits=self.encoder(torch.tanh(x))).sample()
        return ((self.decoder(z) - x) ** 2).sum(-1).mean()


class LinearCalls(TorchFunctionMode):
    """Notes the shape of every linear layer's output."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") == "linear":
            self.shapes.append(tuple(out.shape))
        return out


def test_packed_rows_and_nothing_above_is_evaluated_again() -> None:
    x = torch.randn(5, 6)
    compiled = scg.compile(_Wide(), estimator="local_expectation", example_inputs=(x,))
    assert compiled._latest is not None
    with LinearCalls() as calls:
        compiled(x).backward()
    assert calls.shapes == [(5, 3), (5, 6)]  # encoder and decoder once: D rows (not B * D) are updates of rank one
    rows = [node for node in compiled._latest.program.module.graph.nodes if node.target is torch.addcmul]
    assert len(rows) == 1
    nodes = [str(node.target) for node in compiled._latest.program.module.graph.nodes]
    assert sum("tanh" in node for node in nodes) == 1
    assert sum("bernoulli" in node for node in nodes) == 1


def test_a_constant_in_the_cost_changes_nothing() -> None:
    logits = nn.Parameter(torch.tensor([0.2, -0.3, 0.5, 0.1], dtype=torch.float64))
    values = torch.tensor([1.0, -2.0, 0.7, 3.0], dtype=torch.float64)

    def gradient(constant: float) -> Tensor:
        def loss() -> Tensor:
            return (values[Categorical(logits=logits).sample((1,))] ** 2 + constant).sum()

        compiled = scg.compile(loss, estimator="local_expectation")
        torch.manual_seed(0)
        (found,) = torch.autograd.grad(compiled(), logits)
        return found

    torch.testing.assert_close(gradient(100.0), gradient(0.0), rtol=0, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_finite_at_the_edges(dtype: torch.dtype) -> None:
    logits = nn.Parameter(torch.tensor([-30.0, 30.0, 0.0], dtype=dtype))
    probs = nn.Parameter(torch.tensor([0.0, 1.0, 0.5], dtype=dtype))

    def loss() -> Tensor:
        z, y = Bernoulli(logits=logits).sample(), Bernoulli(probs=probs).sample()
        return ((z.sum() - 0.3) * (y.sum() - 2.2)) ** 2

    scg.compile(loss, estimator="local_expectation")().backward()
    for parameter in (logits, probs):
        assert parameter.grad is not None and bool(parameter.grad.isfinite().all())


def test_an_impossible_outcome_with_infinite_cost_counts_nothing() -> None:
    logits = nn.Parameter(torch.tensor([0.2, -0.3, -float("inf")], dtype=torch.float64))
    values = torch.tensor([1.0, -2.0, float("inf")], dtype=torch.float64)

    def loss() -> Tensor:
        return values[Categorical(logits=logits).sample((1,))].sum()

    (found,) = torch.autograd.grad(scg.compile(loss, estimator="local_expectation")(), logits)
    p = torch.softmax(logits.detach(), 0)[:2]
    torch.testing.assert_close(found[:2], p[0] * p[1] * torch.tensor([3.0, -3.0], dtype=torch.float64))


def test_refusals_say_why() -> None:
    mean = nn.Parameter(torch.zeros(()))

    def continuous() -> Tensor:
        return Normal(mean, 1.0).sample() ** 2

    def replayed(z: Tensor) -> Tensor:
        return (scg.sample(Bernoulli(logits=mean), "z", value=z) - 0.3) ** 2

    def stateful() -> Tensor:
        z = Bernoulli(logits=mean).sample()
        return _environment(z)

    cases: list[tuple[Any, tuple[Any, ...], str]] = [
        (continuous, (), "no finite support"),
        (replayed, (torch.tensor(1.0),), "replayed"),
        (stateful, (), "stateful"),
    ]
    for model, args, reason in cases:
        with pytest.raises(scg.EstimatorError, match=reason):
            scg.compile(model, estimator="local_expectation", example_inputs=args)


@scg.opaque(pure=False)
def _environment(z: Tensor) -> Tensor:
    return z * 2


@pytest.mark.parametrize("estimator", ["bitflip", "stochastic_ad"])
def test_one_of_a_matrix_is_picked(estimator: str) -> None:
    """Elements of two dims meet in one cost, those of the third do not."""
    logits = nn.Parameter(torch.linspace(-1, 1, 8, dtype=torch.float64).reshape(2, 2, 2))

    def model() -> Tensor:
        z = Bernoulli(logits=logits).sample()
        return ((z.sum((0, 2)) - 1.2) ** 3 + z.prod(0).prod(-1)).sum()

    assert_unbiased(Problem(model), estimator=estimator)

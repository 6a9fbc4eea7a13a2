"""Replayed draws: importance weights are exact over the logging policy, clipped and group-relative ones as defined."""

from __future__ import annotations

import itertools
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli

import scg
from scg.estimators.baselines import Constant, LeaveOneOut
from scg.estimators.clipped_surrogate import ClippedSurrogate
from scg.estimators.group_relative import GroupRelative, Standardised
from scg.estimators.importance_weighted import ImportanceWeighted
from scg.estimators.learned import Learned
from scg.estimators.score_function import ScoreFunction
from scg.estimators.targets import TDLambda

LOGGED = torch.tensor([0.3, 0.6, 0.5], dtype=torch.float64)
"""What the logging policy drew ones with."""


def reward(action: Tensor, dims: str) -> Tensor:
    """Of three actions ``[3]``: one for each, one for each that sees those before it, or one of all."""
    if dims == "tied":
        return torch.exp(action * torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64))
    if dims == "causal":
        return (action.cumsum(0) - 0.7) ** 2
    return (action.sum() - 1.3) ** 2 + action[0] * action[2]


class Logged(nn.Module):
    def __init__(self, dims: str) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.tensor([0.4, -0.2, 0.9], dtype=torch.float64))
        self.dims = dims

    def forward(self, action: Tensor, seen: Tensor, behaviour: Tensor) -> Tensor:
        a = scg.sample(Bernoulli(logits=self.logits), "a", value=action)
        return scg.depends(seen, on=a, dims=(self.dims,) if seen.dim() else ()).sum()


class Drawn(Logged):
    """The same program, its actions drawn by the policy itself."""

    def forward(self) -> Tensor:  # type: ignore[override]
        return reward(Bernoulli(logits=self.logits).sample(), self.dims).sum()


@pytest.mark.parametrize("baseline", [None, Constant(1.7)], ids=["none", "constant"])
@pytest.mark.parametrize("dims", ["tied", "causal", "mixed"])
def test_importance_weights_are_unbiased(dims: str, baseline: Any) -> None:
    """Summed over everything the logging policy may have drawn, the estimate is the exact gradient of the policy."""
    model = Logged(dims)
    compiled = scg.compile(model, estimator=ImportanceWeighted(baseline))
    total = torch.zeros(3, dtype=torch.float64)
    for bits in itertools.product((0.0, 1.0), repeat=3):
        action = torch.tensor(bits, dtype=torch.float64)
        behaviour = Bernoulli(LOGGED).log_prob(action)
        loss = compiled(action, reward(action, dims), behaviour)
        total += behaviour.sum().exp() * torch.autograd.grad(loss, model.logits)[0]
    torch.testing.assert_close(total, scg.exact(Drawn(dims))[1]["logits"], rtol=1e-10, atol=1e-12)


def test_importance_weights_refuse_what_they_cannot_weigh() -> None:
    with pytest.raises(scg.EstimatorError, match="not replayed"):
        scg.compile(Drawn("tied"), estimator="importance_weighted", example_inputs=())
    example = (LOGGED.round(), LOGGED, LOGGED)
    with pytest.raises(scg.EstimatorError, match="'old', which is no input"):
        scg.compile(Logged("tied"), estimator=ImportanceWeighted(behaviour="old"), example_inputs=example)

    def two(a: Tensor, b: Tensor, seen: Tensor, behaviour: Tensor) -> Tensor:
        first = scg.sample(Bernoulli(logits=weights), "first", value=a)
        second = scg.sample(Bernoulli(logits=weights), "second", value=b)
        return scg.depends(scg.depends(seen, on=first, dims=("tied",)), on=second, dims=("tied",)).sum()

    weights = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    with pytest.raises(scg.EstimatorError, match="another site"):
        scg.compile(two, estimator="importance_weighted", example_inputs=(*example[:1], *example))


@pytest.mark.parametrize("dims", ["tied", "mixed"])
def test_clipped_surrogate_is_the_textbook_formula(dims: str) -> None:
    model = Logged(dims)
    compiled = scg.compile(model, estimator=ClippedSurrogate(Constant(0.9), clip=0.1))
    for bits in itertools.product((0.0, 1.0), repeat=3):
        action = torch.tensor(bits, dtype=torch.float64)
        behaviour = Bernoulli(LOGGED).log_prob(action)
        (got,) = torch.autograd.grad(compiled(action, reward(action, dims), behaviour), model.logits)
        ratio = (Bernoulli(logits=model.logits).log_prob(action) - behaviour).exp()
        gain = -(reward(action, dims) - 0.9)  # of a reward, which PPO maximises
        objective = torch.min(ratio * gain, ratio.clamp(0.9, 1.1) * gain).sum()
        (want,) = torch.autograd.grad(-objective, model.logits)
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


def test_clipped_surrogate_with_generalised_advantages() -> None:
    class Value(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.v = nn.Parameter(torch.tensor([0.3, -0.4, 0.8], dtype=torch.float64))

        def forward(self) -> Tensor:
            return self.v

    model, value = Logged("causal"), Value()
    estimator = ClippedSurrogate(Learned(value, inputs=(), target=TDLambda(0.7)))
    compiled = scg.compile(model, estimator=estimator)
    action = torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64)
    behaviour, costs, v = Bernoulli(LOGGED).log_prob(action), reward(action, "causal"), value.v.detach()
    (got,) = torch.autograd.grad(compiled(action, costs, behaviour), model.logits)
    delta = costs + torch.cat([v[1:], v[:1] * 0]) - v
    advantage = torch.stack([sum((0.7**k * delta[t + k] for k in range(3 - t)), delta[0] * 0) for t in range(3)])
    ratio = (Bernoulli(logits=model.logits).log_prob(action) - behaviour).exp()
    loss = torch.max(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage).sum()
    torch.testing.assert_close(got, torch.autograd.grad(loss, model.logits)[0], rtol=1e-10, atol=1e-12)


class Answers(nn.Module):
    """Groups of four answers ``[P, 4, T]``, with a reward each."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.tensor([0.3, -0.2, 0.5], dtype=torch.float64))

    def forward(self, tokens: Tensor, seen: Tensor, lengths: Tensor, behaviour: Tensor) -> Tensor:
        z = scg.sample(Bernoulli(logits=self.logits.expand(tokens.shape)), "z", value=tokens)
        return -scg.depends(seen, on=z, dims=("tied", "tied")).mean()


@pytest.mark.parametrize("behaviour", [None, "behaviour"])
@pytest.mark.parametrize("lengths", [None, "lengths"])
@pytest.mark.parametrize("scale", [True, False])
def test_group_relative_is_its_formula(scale: bool, lengths: str | None, behaviour: str | None) -> None:
    torch.manual_seed(0)
    model = Answers()
    tokens, seen = (torch.rand(2, 4, 3) < 0.5).double(), torch.randn(2, 4).double()
    sizes = torch.randint(1, 4, (2, 4)).double()
    old = Bernoulli(logits=model.logits.detach() + 0.3).log_prob(tokens)
    estimator = GroupRelative(Standardised(group=1, scale=scale), lengths=lengths, behaviour=behaviour)
    compiled = scg.compile(model, estimator=estimator)
    (got,) = torch.autograd.grad(compiled(tokens, seen, sizes, old), model.logits)
    advantage = seen - seen.mean(1, keepdim=True)
    if scale:
        advantage = advantage / (seen.std(1, keepdim=True) + 1e-4)
    if lengths:
        advantage = advantage / sizes
    log_p = Bernoulli(logits=model.logits).log_prob(tokens)
    a = advantage.unsqueeze(-1)
    ratio = (log_p - old).exp()
    gain = a * log_p if behaviour is None else torch.min(ratio * a, ratio.clamp(0.8, 1.2) * a)
    torch.testing.assert_close(got, torch.autograd.grad(-gain.sum(-1).mean(), model.logits)[0])


def test_biased_baselines_are_not_for_unbiased_estimators() -> None:
    with pytest.raises(ValueError, match="biased"):
        ScoreFunction(baseline=Standardised())
    with pytest.raises(scg.EstimatorError, match="allow_biased=False"):
        scg.compile(Answers(), estimator=GroupRelative(Standardised(1)), allow_biased=False)(*_answers())
    mean, deviation, length, clip = "counts the draw itself", "standard deviation", "divided by the length", "clipped"
    for estimator, said in (
        (GroupRelative(Standardised(1)), {mean, deviation}),
        (GroupRelative(Standardised(1, scale=False), lengths="lengths"), {mean, length}),
        (GroupRelative(Standardised(1), behaviour="behaviour"), {mean, deviation, clip}),
        (ClippedSurrogate(Constant(0.0)), {clip}),
        (ClippedSurrogate(Standardised(1)), {mean, deviation, clip}),
    ):
        (row,) = _explained(estimator).rows
        assert row.biased.startswith("BIASED: ")
        assert {words for words in (mean, deviation, length, clip) if words in row.biased} == said
    assert "BIASED" not in str(_explained(ScoreFunction(baseline=LeaveOneOut(group=1))))


def _answers() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return torch.ones(2, 4, 3).double(), torch.randn(2, 4).double(), torch.ones(2, 4), torch.zeros(2, 4, 3).double()


@pytest.mark.parametrize(
    "estimator", [ClippedSurrogate(Constant(0.0)), GroupRelative(Standardised(1), behaviour="behaviour")]
)
@pytest.mark.parametrize("shape", [(2, 4), (3,), (2, 1, 3), (2, 4, 3, 1)], ids=str)
def test_what_was_logged_has_a_number_for_each_element(estimator: Any, shape: tuple[int, ...]) -> None:
    """One that only broadcasts to them would be read along the wrong dims."""
    example = (*_answers()[:3], torch.zeros(shape).double())
    with pytest.raises(scg.EstimatorError, match=rf"'behaviour' of shape {re.escape(str(list(shape)))}.*\[2, 4, 3\]"):
        scg.compile(Answers(), estimator=estimator, example_inputs=example)
    lengths = GroupRelative(Standardised(1), lengths="lengths")
    with pytest.raises(scg.EstimatorError, match="each index of leading dims"):
        scg.compile(Answers(), estimator=lengths, example_inputs=(*_answers()[:2], torch.ones(4), torch.zeros(shape)))


def _explained(estimator: Any) -> Any:
    return scg.compile(Answers(), estimator=estimator, example_inputs=_answers()).explain()


class MaskedTokens(nn.Module):
    """A masked mean over tokens, each token with a cost of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.tensor([0.3, -0.2, 0.5], dtype=torch.float64))

    def forward(self, tokens: Tensor, costs: Tensor, mask: Tensor) -> Tensor:
        z = scg.sample(Bernoulli(logits=self.logits.expand(tokens.shape)), "z", value=tokens)
        seen = scg.depends(costs, on=z, dims=("tied", "tied"))
        return (seen * mask).sum() / mask.sum()


def test_a_masked_mean_over_tokens_falls_apart_by_token() -> None:
    model = MaskedTokens()
    tokens, costs = (torch.rand(4, 3) < 0.5).double(), torch.randn(4, 3).double()
    compiled = scg.compile(model, estimator=ScoreFunction(baseline=None))
    for mask in (torch.ones(4, 3).double(), torch.tensor([1.0, 0.0, 1.0]).double().expand(4, 3).contiguous()):
        (got,) = torch.autograd.grad(compiled(tokens, costs, mask), model.logits)
        log_p = Bernoulli(logits=model.logits).log_prob(tokens)
        torch.testing.assert_close(got, torch.autograd.grad((costs * mask * log_p).sum() / mask.sum(), model.logits)[0])
    (edge,) = compiled.graph.credit.values()
    assert edge.words == ("tied", "tied")

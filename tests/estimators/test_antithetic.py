"""ARM, DisARM and ARMS: exact over all draws, closed-form variances, extreme probabilities."""

from __future__ import annotations

import gc
import math
from collections.abc import Iterable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli, Binomial, Categorical, OneHotCategorical

import scg
from scg.estimators.antithetic import Antithetic
from scg.estimators.arm import ARM
from scg.estimators.arms import ARMS, gauss_legendre
from scg.estimators.disarm import DisARM
from tests.estimators import categoricals
from tests.estimators.finite_noise import FiniteARM, FiniteARMS, FiniteDisARM, moments, normal_pair
from tests.estimators.mixes import problems, tied_rows
from tests.law2 import assert_unbiased
from tests.problems import PROBLEMS

PAIRS = {"disarm": FiniteDisARM(), "arm": FiniteARM()}
FAMILY: dict[str, Antithetic] = {
    **PAIRS,
    "arms-2": FiniteARMS(samples=2),
    "arms-3": FiniteARMS(samples=3),
    "arms-3-gaussian": FiniteARMS(samples=3, copula="gaussian"),
}
MIXES: dict[str, dict[str, Any]] = {
    "upstream": {"top": "here", "bottom": "score_function"},
    "downstream": {"top": "score_function", "bottom": "here"},
    "both": {"*": "here"},
    "below enumerated": {"top": "enumerate", "bottom": "here"},
    "above enumerated": {"top": "here", "bottom": "enumerate"},
}
"""Of the two sites of `tests.problems.score_below_enumerated`."""


def _cases() -> Iterator[Any]:
    for name in problems("closure", "opaque_cost", "not_differentiable", without=("diamond",)):
        yield pytest.param(name, "disarm", marks=[pytest.mark.slow] if name == "opaque_cost" else [], id=name)
    for name in ("some_costs", "tied_batch", "learned_coefficient"):
        for label in ("arm", "arms-3", "arms-3-gaussian"):
            marks = [pytest.mark.slow] if name == "tied_batch" and label != "arm" else []
            yield pytest.param(name, label, marks=marks, id=f"{name}-{label}")


@pytest.mark.parametrize(("name", "label"), list(_cases()))
def test_unbiased(name: str, label: str) -> None:
    problem = PROBLEMS[name]()
    assert_unbiased(problem, estimator=FAMILY[label], estimators=problem.estimators)


@pytest.mark.parametrize("label", FAMILY)
@pytest.mark.parametrize("mix", MIXES)
def test_unbiased_beside_others(mix: str, label: str) -> None:
    if mix == "both" and label.startswith("arms-3"):
        pytest.skip("512 joint draws of the lower site for each of the upper")
    estimators = {site: FAMILY[label] if spec == "here" else spec for site, spec in MIXES[mix].items()}
    assert_unbiased(PROBLEMS["score_below_enumerated"](), estimators=estimators)


def test_unbiased_with_two_different_ones() -> None:
    mixed = {"top": PAIRS["arm"], "bottom": FAMILY["arms-2"]}
    assert_unbiased(PROBLEMS["score_below_enumerated"](), estimators=mixed)
    below_noise = {"e": "reparam", "top": PAIRS["disarm"], "bottom": "score_function"}
    assert_unbiased(PROBLEMS["reparam_above_both"](), estimators=below_noise)


@pytest.mark.parametrize("label", PAIRS)
def test_unbiased_with_two_pairs(label: str) -> None:
    assert_unbiased(PROBLEMS["some_costs"](), estimator=PAIRS[label], samples=2)


def test_unbiased_over_a_tied_batch_of_vectors() -> None:
    assert_unbiased(tied_rows(), estimator=PAIRS["disarm"])


@pytest.mark.parametrize("credit", ["node", "none"])
def test_unbiased_with_coarse_credit(credit: str) -> None:
    assert_unbiased(PROBLEMS["tied_batch"](), estimator=PAIRS["disarm"], credit=credit)


QUICK_CATEGORICALS = ("one_index", "one_hot", "jumps", "downstream")


def _categoricals(names: Iterable[str]) -> list[Any]:
    return [pytest.param(name, marks=[] if name in QUICK_CATEGORICALS else [pytest.mark.slow]) for name in names]


@pytest.mark.parametrize("name", _categoricals(categoricals.PROGRAMS))
def test_categorical_disarm(name: str) -> None:
    assert_unbiased(categoricals.PROGRAMS[name](), estimator=FiniteDisARM())


@pytest.mark.parametrize("mix", _categoricals(mix for mix in categoricals.MIXES if mix != "both"))
def test_categorical_disarm_beside_others(mix: str) -> None:
    problem, estimators = categoricals.mixed(mix, FiniteDisARM())
    assert_unbiased(problem, estimators=estimators)


def test_a_categorical_of_two_is_a_bernoulli() -> None:
    theta = nn.Parameter(torch.tensor(0.8, dtype=torch.float64))

    def one() -> Tensor:
        return torch.exp(Bernoulli(logits=theta).sample())

    def two() -> Tensor:
        return torch.exp(1.0 - Categorical(logits=torch.stack([theta, 0 * theta])).sample())

    found = [moments(scg.compile(loss, estimator=FiniteDisARM()), {"theta": theta}) for loss in (one, two)]
    torch.testing.assert_close(found[0], found[1])


def test_extreme_categoricals_are_finite() -> None:
    rows = [[30.0, -30.0, 0.0, 30.0], [0.0, -1e4, -1e4, -1e4], [-1e4, -1e4, -300.0, 300.0]]
    logits = nn.Parameter(torch.tensor(rows))
    probs = nn.Parameter(torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]))

    def loss() -> Tensor:
        z, y = Categorical(logits=logits).sample(), OneHotCategorical(probs=probs).sample()
        return z.float().sum().square() + (y @ torch.arange(3.0)).square().sum()

    objective = scg.compile(loss, estimator="disarm")()
    grads = torch.autograd.grad(objective, [logits, probs])
    assert objective.isfinite() and all(grad.isfinite().all() for grad in grads)


# -- variances --------------------------------------------------------------------------------------------------------
def bernoulli_toy(theta: float, p0: float) -> tuple[Any, nn.Parameter]:
    """``E[(b - p0)^2]``."""
    logit = nn.Parameter(torch.tensor(theta, dtype=torch.float64))

    def loss() -> Tensor:
        return (Bernoulli(logits=logit).sample() - p0) ** 2

    return loss, logit


@pytest.mark.parametrize(
    ("p0", "theta", "gradient", "arm", "disarm"),
    [
        (0.499, 0.0, 5.0e-4, 8.33333e-8, 0.0),
        (0.49, 0.0, 5.0e-3, 8.33333e-6, 0.0),
        (0.45, 0.0, 2.5e-2, 2.08333e-4, 0.0),
        (0.499, 1.0, 3.93224e-4, 1.45813e-7, 1.32845e-7),
        (0.49, -2.0, 2.09987e-3, 1.41991e-5, 1.40861e-5),
        (0.45, -1.0, 1.96612e-2, 3.64532e-4, 3.32112e-4),
    ],
)
def test_closed_form_variances(p0: float, theta: float, gradient: float, arm: float, disarm: float) -> None:
    for estimator, variance in ((FiniteARM(nodes=2), arm), (FiniteDisARM(), disarm), (FiniteARMS(samples=2), disarm)):
        loss, logit = bernoulli_toy(theta, p0)
        mean, found = moments(scg.compile(loss, estimator=estimator), {"theta": logit})["theta"]
        torch.testing.assert_close(float(mean), gradient, rtol=1e-5, atol=0)
        torch.testing.assert_close(float(found), variance, rtol=1e-5, atol=1e-18)


def test_variance_of_disarm_with_several_elements() -> None:
    weights = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
    logits = nn.Parameter(torch.zeros(3, dtype=torch.float64))

    def loss() -> Tensor:
        z = Bernoulli(logits=logits).sample()
        return torch.relu(z @ weights + 9)  # linear, and not split

    _, variance = moments(scg.compile(loss, estimator=FiniteDisARM()), {"w": logits})["w"]
    expected = (weights.square().sum() - weights.square()) / 16
    torch.testing.assert_close(variance, expected)


def test_four_draws_of_arms_beat_two_pairs() -> None:
    loss, logit = bernoulli_toy(1.0, 0.45)
    _, four = moments(scg.compile(loss, estimator=FiniteARMS(samples=4)), {"w": logit})["w"]
    _, pairs = moments(scg.compile(loss, estimator=FiniteDisARM(), samples=2), {"w": logit})["w"]
    assert four < pairs


# -- the law of the rows ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("copula", ["dirichlet", "gaussian"])
@pytest.mark.parametrize("n", [2, 3, 5])
def test_rows_of_arms_have_the_law_that_is_corrected_for(n: int, copula: str) -> None:
    torch.manual_seed(n)
    estimator, draws = ARMS(samples=n, copula=copula), 200_000
    for p in (0.02, 0.3, 0.5, 0.8):
        bits = estimator.bits(torch.full([draws], p, dtype=torch.float64)).double()  # [n, draws]
        assert (bits.mean(1) - p).abs().max() < 5 * math.sqrt(p / draws)
        discordant = p * (1 - p) / float(estimator.correction(torch.tensor(p, dtype=torch.float64).logit()))
        found = float((bits[0] * (1 - bits[1])).mean())
        assert abs(found - discordant) < 5 * math.sqrt(discordant / draws)


@pytest.mark.parametrize("n", [3, 4, 8])
def test_the_gaussian_correction_to_rounding(n: int) -> None:
    theta = torch.linspace(-12, 12, 25, dtype=torch.float64)
    m = (-theta.abs()).sigmoid()
    expected = m * (1 - m) / (m - normal_pair(m, -1 / (n - 1)))
    torch.testing.assert_close(ARMS(samples=n, copula="gaussian").correction(theta), expected, rtol=1e-10, atol=0)


def test_gauss_legendre() -> None:
    points, weights = (torch.tensor(part, dtype=torch.float64) for part in gauss_legendre(5))
    for degree in range(10):
        expected = 2 / (degree + 1) if degree % 2 == 0 else 0.0
        assert abs(float((weights * points**degree).sum()) - expected) < 1e-14


# -- what else must hold ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("estimator", [DisARM(), ARM(), ARMS(), ARMS(samples=3, copula="gaussian"), ARMS(samples=2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_extreme_probabilities_are_finite(estimator: Antithetic, dtype: torch.dtype) -> None:
    logits = nn.Parameter(torch.tensor([-100.0, -30.0, 0.0, 30.0, 100.0], dtype=dtype))
    probs = nn.Parameter(torch.tensor([0.0, 1.0, 0.5], dtype=dtype))

    def loss() -> Tensor:
        z, y = Bernoulli(logits=logits).sample(), Bernoulli(probs=probs).sample()
        return ((z.sum() - y.sum()) ** 2 + z[-1]).float()

    compiled = scg.compile(loss, estimator=estimator)
    for _ in range(3):
        objective = compiled()
        grads = torch.autograd.grad(objective, [logits, probs])
        assert objective.isfinite() and all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("estimator", ["disarm", "arm", "arms"])
def test_under_autocast(estimator: str) -> None:
    net = nn.Linear(4, 3)

    def loss(x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            z = Bernoulli(logits=net(x)).sample()
            return ((z.sum(-1) - 1) ** 2).float().mean()

    scg.compile(loss, estimator=estimator)(torch.randn(5, 4)).backward()
    assert net.weight.grad is not None and net.weight.grad.isfinite().all()


def test_rare_outcomes_are_drawn_in_half_precision() -> None:
    """A uniform in bfloat16 takes 256 values: it would never be below 1e-3."""
    dist = Bernoulli(logits=torch.full([100_000], -7.0, dtype=torch.bfloat16))
    value = DisARM().draw_rows(dist, torch.Size(), None, ()).value
    assert value.dtype == torch.bfloat16
    assert 50 < float(value.float()[0].sum()) < 140


def test_impossible_outcomes_are_not_drawn() -> None:
    class Edge(DisARM):
        def uniform(self, p: Tensor) -> Tensor:
            return torch.zeros_like(p)

    dist = Bernoulli(probs=torch.tensor([0.0, 1.0]))
    assert Edge().draw_rows(dist, torch.Size(), None, ()).value.tolist() == [[0.0, 1.0], [0.0, 1.0]]


def test_the_decoder_gets_the_mean_gradient() -> None:
    """Not the sum over rows, nor times the number of latents."""
    scale = nn.Parameter(torch.tensor(2.0))

    def loss() -> Tensor:
        z = Bernoulli(logits=torch.zeros(7, requires_grad=True)).sample()
        return (scale * (1 + 0 * z)).mean()

    (grad,) = torch.autograd.grad(scg.compile(loss, estimator="arm")(), scale)
    torch.testing.assert_close(float(grad), 1.0)


@pytest.mark.parametrize("estimator", ["disarm", "unordered_set", "rebar"])
def test_no_memory_is_left_in_cycles(estimator: str) -> None:
    logits = nn.Parameter(torch.zeros(3))

    def loss() -> Tensor:
        return (Bernoulli(logits=logits).sample() - 0.3).square().sum()

    compiled = scg.compile(loss, estimator=estimator)
    compiled().backward()
    gc.collect()
    gc.disable()
    try:
        for _ in range(3):
            compiled().backward()
        assert not any(type(item) is Tensor and item.grad_fn is not None for item in gc.get_objects())
    finally:
        gc.enable()


def test_refusals_say_why() -> None:
    logits = nn.Parameter(torch.zeros(3))
    with pytest.raises(scg.EstimatorError, match="Categorical is not Bernoulli"):
        scg.compile(lambda: Categorical(logits=logits).sample().float(), estimator="arm", example_inputs=())
    with pytest.raises(scg.EstimatorError, match="Binomial is not Bernoulli or Categorical or OneHotCategorical"):
        scg.compile(lambda: Binomial(3, logits=logits).sample().sum(), estimator="disarm", example_inputs=())
    with pytest.raises(ValueError, match="a pair is two draws"):
        DisARM(samples=3)
    with pytest.raises(ValueError, match="no other to be antithetic to"):
        ARMS(samples=1)
    with pytest.raises(ValueError, match="must be one of dirichlet, gaussian"):
        ARMS(copula="clayton")

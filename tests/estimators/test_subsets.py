"""Estimators with sets of distinct outcomes: exact over all draws, published variances, extreme probabilities."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli, Categorical, OneHotCategorical

import scg
from scg.estimators.subsets import SubsetEstimator
from scg.estimators.sum_and_sample import SumAndSample
from scg.estimators.unordered_set import UnorderedSet, set_weights
from scg.estimators.without_replacement import WithoutReplacement, inclusion_weights
from tests.estimators.coins import COSTS, coins
from tests.estimators.coins import score as coin_score
from tests.estimators.finite_noise import (
    FiniteDisARM,
    FiniteUnorderedSet,
    FiniteWithoutReplacement,
    moments,
)
from tests.estimators.mixes import categorical_chain, tied_rows
from tests.law2 import assert_unbiased
from tests.problems import PROBLEMS, Problem, TwoPoint

FAMILY: dict[str, SubsetEstimator] = {
    "unordered_set-1": FiniteUnorderedSet(samples=1),
    "unordered_set-2": FiniteUnorderedSet(samples=2),
    "without_replacement-1": FiniteWithoutReplacement(samples=1),
    "without_replacement-2": FiniteWithoutReplacement(samples=2),
    "sum_and_sample-1+1": SumAndSample(),
    "sum_and_sample-0+2": SumAndSample(top=0, samples=2),
    "sum_and_sample-1+2": SumAndSample(top=1, samples=2),
}
SETS: dict[str, Callable[[int], SubsetEstimator]] = {
    "unordered_set": lambda k: UnorderedSet(samples=k),
    "without_replacement": lambda k: WithoutReplacement(samples=k),
    "sum_and_sample": lambda k: SumAndSample(top=k - 1),
}
"""The estimators themselves, by number of rows."""


class _BelowNoise(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mu = nn.Parameter(torch.tensor(0.4, dtype=torch.float64))
        self.w = nn.Parameter(torch.tensor([0.4, -0.9, 0.2], dtype=torch.float64))

    def forward(self) -> Tensor:
        e = TwoPoint(self.mu, self.mu.exp()).rsample()
        z = Categorical(logits=self.w * e).sample()
        y = Bernoulli(logits=self.w[z]).sample()
        return (self.w[z] - e - y) ** 2


MIXES: dict[str, dict[str, Any]] = {
    "upstream": {"top": "here", "bottom": "score_function"},
    "downstream": {"top": "score_function", "bottom": "here"},
    "both": {"*": "here"},
    "below enumerated": {"top": "enumerate", "bottom": "here"},
    "above enumerated": {"top": "here", "bottom": "enumerate"},
    "above sum_and_sample": {"top": "here", "bottom": SumAndSample()},
    "below unordered_set": {"top": FiniteUnorderedSet(samples=2), "bottom": "here"},
}
"""Of the two sites of `categorical_chain`."""

MANY_DRAWS = 60
"""More joint draws than this are for the slow run."""


def _draws(label: str) -> int:
    """Joint draws of one site with three outcomes."""
    name, size = label.split("-")
    if name == "without_replacement":
        return 3 * 48
    return {"unordered_set-1": 3, "unordered_set-2": 6, "sum_and_sample-1+1": 2}.get(label, 9 if size == "0+2" else 4)


def _mixed() -> list[Any]:
    cases = []
    for mix, label in itertools.product(MIXES, FAMILY):
        rows, draws = FAMILY[label].rows, _draws(label)
        total = {
            "upstream": draws * 3**rows,
            "downstream": 3 * draws,
            "both": draws * draws**rows,
            "below enumerated": draws**3,
            "above enumerated": draws,
            "above sum_and_sample": draws * 2**rows,
            "below unordered_set": 6 * draws**2,
        }[mix]
        if total < 30_000:
            marks = [pytest.mark.slow] if total > MANY_DRAWS else []
            cases.append(pytest.param(mix, label, marks=marks, id=f"{mix}-{label}"))
    return cases


@pytest.mark.parametrize(("mix", "label"), _mixed())
def test_unbiased_beside_others(mix: str, label: str) -> None:
    estimators = {site: FAMILY[label] if spec == "here" else spec for site, spec in MIXES[mix].items()}
    assert_unbiased(categorical_chain(), estimators=estimators)


PROGRAMS = (
    "chain", "some_costs", "upstream_costs", "unrolled_loop", "sampled_mask", "detached", "learned_coefficient",
    "changing_mask", "tied_batch", "binomial", "integer_index", "one_hot", "not_differentiable", "opaque_cost",
    "flattened_dims", "mixed_batch", "independent_elbo", "own_draws",
)  # fmt: skip


QUICK = ("some_costs", "binomial", "one_hot", "mixed_batch", "changing_mask")
"""With every estimator; the rest with `UnorderedSet`, the longest in the slow run."""
LONG = ("chain", "unrolled_loop", "opaque_cost", "flattened_dims", "independent_elbo")


def _programs() -> list[Any]:
    cases = []
    for name, label in itertools.product(PROGRAMS, ["unordered_set-1", "unordered_set-2", "sum_and_sample-1+1"]):
        quick = name in QUICK or (label == "unordered_set-2" and name not in LONG)
        cases.append(pytest.param(name, label, marks=[] if quick else [pytest.mark.slow], id=f"{name}-{label}"))
    return cases


@pytest.mark.parametrize(("name", "label"), _programs())
def test_unbiased(name: str, label: str) -> None:
    problem = PROBLEMS[name]()
    assert_unbiased(problem, estimator=FAMILY[label], estimators=problem.estimators)


@pytest.mark.parametrize("name", ["dead_site", "one_hot", pytest.param("learned_coefficient", marks=pytest.mark.slow)])
def test_without_replacement_is_unbiased(name: str) -> None:
    """Independent elements with a set each: their times are summed over jointly."""
    nodes = FiniteWithoutReplacement(samples=2 if name == "one_hot" else 1, nodes=24)
    problem = PROBLEMS[name]()
    if name == "one_hot":
        problem = Problem(problem.model, ((torch.tensor([0.8], dtype=torch.float64),),))
        nodes = FiniteWithoutReplacement(samples=2)
    assert_unbiased(problem, estimator=nodes)


@pytest.mark.parametrize("credit", ["node", "none"])
@pytest.mark.parametrize("label", ["unordered_set-2", "sum_and_sample-1+1"])
def test_coarse_credit_joins_the_sets(label: str, credit: str) -> None:
    assert_unbiased(PROBLEMS["tied_batch"](), estimator=FAMILY[label], credit=credit)


@pytest.mark.parametrize("label", ["unordered_set-2", "sum_and_sample-1+1"])
def test_sets_of_vectors_over_a_tied_batch(label: str) -> None:
    assert_unbiased(tied_rows(), estimator=FAMILY[label])


def test_joint_sets_without_replacement() -> None:
    w = nn.Parameter(torch.tensor([0.3, -0.8], dtype=torch.float64))

    def loss() -> Tensor:
        z = Bernoulli(logits=w).sample()
        return torch.exp(z[0] - 0.5 * z[1]) + z[1]

    assert_unbiased(Problem(loss), estimator=FAMILY["without_replacement-2"])


@pytest.mark.parametrize(
    "label", ["unordered_set-2", pytest.param("without_replacement-1", marks=pytest.mark.slow), "sum_and_sample-1+1"]
)
def test_unbiased_below_noise(label: str) -> None:
    estimators = {"e": "reparam", "z": FAMILY[label], "y": FiniteDisARM()}
    assert_unbiased(Problem(_BelowNoise()), estimators=estimators)


@pytest.mark.parametrize("label", ["unordered_set-2", "sum_and_sample-1+1"])
def test_unbiased_with_two_sets(label: str) -> None:
    estimators = {"top": FAMILY[label], "bottom": "enumerate"}
    assert_unbiased(categorical_chain(), estimators=estimators, samples=2)


# -- the published toy: eight outcomes of three coins, one parameter --------------------------------------------------
UNORDERED = {
    0.0: (6.1125e-3, 2.2625e-3, 1.1308e-3, 6.1050e-4, 3.1650e-4, 1.2917e-4, 0.0),
    -4.0: (2.9782e-5, 8.0711e-6, 1.0555e-6, 7.9696e-8, 1.0248e-8, 2.8549e-10, 0.0),
}
"""Kool, van Hoof and Welling 2020, figure 1: variance of the built-in baseline for k = 2 … 8, exact."""


def weights_of(log_p: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """`set_weights` of the outcomes at ``index``, ``[*N, k]``, of all, ``[*N, S]``."""
    return set_weights(log_p.gather(-1, index), log_p.scatter(-1, index, -math.inf).logsumexp(-1))


@pytest.mark.parametrize("eta", UNORDERED)
@pytest.mark.parametrize("k", range(2, 9))
def test_published_variances_of_the_unordered_set(k: int, eta: float) -> None:
    log_p, slope = coin_score(eta)
    sets = torch.tensor(list(itertools.combinations(range(8), k)))
    mass = torch.stack([_first_of(log_p.exp(), found) for found in sets.tolist()])  # P(S), by its orders
    weight, leave_one_out = weights_of(log_p.expand(len(sets), 8), sets)
    costs = COSTS[sets]
    advantage = costs - (leave_one_out * costs.unsqueeze(-2)).sum(-1)
    estimate = (weight * advantage * slope[sets]).sum(-1)
    mean = (mass * estimate).sum()
    torch.testing.assert_close(float(mass.sum()), 1.0)
    torch.testing.assert_close(float(mean), -0.045 if eta == 0 else -3.179287e-3, rtol=1e-6, atol=0)
    variance = float((mass * estimate.square()).sum() - mean**2)
    torch.testing.assert_close(variance, UNORDERED[eta][k - 2], rtol=1e-3 if k < 8 else 0, atol=1e-15)


def _first_of(p: Tensor, members: list[int]) -> Tensor:
    """The probability that the first ``len(members)`` draws without replacement are these, over all orders."""
    reached = {frozenset[int](): torch.ones((), dtype=p.dtype)}
    for _ in members:
        grown: dict[frozenset[int], Tensor] = {}
        for done, probability in reached.items():
            for new in set(members) - done:
                step = probability * p[new] / p[[i for i in range(len(p)) if i not in done]].sum()
                grown[done | {new}] = grown.get(done | {new}, torch.zeros_like(step)) + step
        reached = grown
    return reached[frozenset(members)]


def test_weights_by_their_definition() -> None:
    """Not the leave-two-out index: P of the rest of the set drawn from the support less one, and less two."""
    p = torch.tensor([0.05, 0.3, 0.1, 0.15, 0.4], dtype=torch.float64)
    members = [3, 0, 4]
    weight, second = weights_of(p.log(), torch.tensor(members))
    for s, member in enumerate(members):
        others = [m for m in members if m != member]
        less_one = _first_of(_without(p, [member]), others)
        torch.testing.assert_close(weight[s], p[member] * less_one / _first_of(p, members))
        for u, other in enumerate(members):
            ratio = torch.ones(())
            if other != member:
                ratio = _first_of(_without(p, [member, other]), [m for m in others if m != other]) / less_one
            torch.testing.assert_close(second[s, u], p[other] * ratio, check_dtype=False)


def _without(p: Tensor, left_out: list[int]) -> Tensor:
    kept = p.clone()
    kept[left_out] = 0
    return kept / kept.sum()


@pytest.mark.parametrize("k", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_compiled_toy_has_the_published_variance(k: int) -> None:
    eta = nn.Parameter(torch.zeros((), dtype=torch.float64))
    compiled = scg.compile(coins(eta), estimator=FiniteUnorderedSet(samples=k))
    mean, variance = moments(compiled, {"eta": eta})["eta"]
    torch.testing.assert_close(float(mean), -0.045)
    torch.testing.assert_close(float(variance), UNORDERED[0.0][k - 2], rtol=1e-4, atol=0)


SUMMED = {
    0.0: (4.38420188e-1, 9.13125e-3, 9.4625e-3, 6.40798611e-3, 4.7875e-3, 6.60125e-4, 1.77777778e-4, 0.0),
    -4.0: (3.35567667e-2, 2.92741481e-5, 1.09009627e-5, 7.3233205e-7, 3.6471075e-8, 1.4801606e-9, 1.811361e-11, 0.0),
}
"""Variance with the k most probable outcomes summed and one of the rest drawn, k = 0 … 7: by hand, over all draws."""


@pytest.mark.parametrize("eta", SUMMED)
@pytest.mark.parametrize("k", [0, 1, 2, 4, 7])
def test_variance_of_sum_and_sample(k: int, eta: float) -> None:
    parameter = nn.Parameter(torch.tensor(eta, dtype=torch.float64))
    compiled = scg.compile(coins(parameter), estimator=SumAndSample(top=k))
    mean, variance = moments(compiled, {"eta": parameter})["eta"]
    torch.testing.assert_close(float(mean), -0.045 if eta == 0 else -3.179287e-3, rtol=1e-6, atol=0)
    torch.testing.assert_close(float(variance), SUMMED[eta][k], rtol=1e-6, atol=1e-15)


@pytest.mark.parametrize(("eta", "floor"), [(0.0, 9.84375e-4), (-4.0, 2.5371e-6)])
def test_a_baseline_drawn_for_each_outcome_would_leave_a_floor(eta: float, floor: float) -> None:
    """Liu et al. 2019's code draws one afresh for each: ``sum_s (dp_s)^2 Var f`` is left when everything is summed."""
    log_p, slope = coin_score(eta)
    p = log_p.exp()
    spread = p @ COSTS**2 - (p @ COSTS) ** 2
    torch.testing.assert_close(float(((p * slope) ** 2).sum() * spread), floor, rtol=1e-4, atol=0)
    assert SUMMED[eta][7] == 0.0


@pytest.mark.parametrize("estimator", [UnorderedSet(samples=8), WithoutReplacement(samples=8), SumAndSample(top=7)])
def test_the_whole_support_is_exact(estimator: SubsetEstimator) -> None:
    eta = nn.Parameter(torch.tensor(-1.0, dtype=torch.float64))
    compiled = scg.compile(coins(eta), estimator=estimator)
    expected = scg.exact(coins(eta))
    for _ in range(3):
        objective = compiled()
        (grad,) = torch.autograd.grad(objective, eta)
        torch.testing.assert_close((objective.detach(), {"eta": grad}), expected)


@pytest.mark.parametrize("name", SETS)
def test_two_rows_of_a_bernoulli_are_exact(name: str) -> None:
    theta = nn.Parameter(torch.tensor(0.7, dtype=torch.float64))

    def loss() -> Tensor:
        return (Bernoulli(logits=theta).sample() - 0.499) ** 2

    compiled = scg.compile(loss, estimator=SETS[name](2))
    for _ in range(4):
        (grad,) = torch.autograd.grad(compiled(), theta)
        torch.testing.assert_close(grad, scg.exact(loss)[1]["theta"])


@pytest.mark.parametrize("label", [label for label in FAMILY if label[-2:] != "-1" and "0+" not in label])
def test_a_constant_added_to_the_cost_changes_nothing(label: str) -> None:
    """The mean gradient, of course; and not the variance either."""
    w = nn.Parameter(torch.tensor([0.4, -0.9, 0.2], dtype=torch.float64))
    table = torch.tensor([0.3, -1.0, 2.0], dtype=torch.float64)

    def loss(offset: float) -> Tensor:
        return table[Categorical(logits=w).sample()] + offset

    compiled = scg.compile(loss, estimator=FAMILY[label])
    plain, shifted = (moments(compiled, {"w": w}, offset)["w"] for offset in (0.0, 100.0))
    torch.testing.assert_close(plain, shifted, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(plain[0], scg.exact(loss, 0.0)[1]["w"])


def test_ties_go_to_the_first_outcome() -> None:
    dist = Categorical(probs=torch.full([7, 5], 0.2))
    value = SumAndSample(top=3).draw_rows(dist, torch.Size(), torch.arange(5), ()).value  # [4, 7]
    assert value[:3].T.tolist() == [[0, 1, 2]] * 7
    assert set(value[3].tolist()) <= {3, 4}


# -- the race ---------------------------------------------------------------------------------------------------------
def test_a_race_finishes_in_the_order_of_draws_without_replacement() -> None:
    torch.manual_seed(0)
    p = torch.tensor([0.05, 0.25, 0.1, 0.6], dtype=torch.float64)
    n = 100_000
    order, after = UnorderedSet().race(p.log().expand(n, 4), 2)
    for first, second in itertools.permutations(range(4), 2):
        expected = float(p[first] * p[second] / (1 - p[first]))
        found = float(((order[:, 0] == first) & (order[:, 1] == second)).double().mean())
        assert abs(found - expected) < 5 * math.sqrt(expected / n)
    weight = inclusion_weights(p.log()[order], after)
    for outcome in range(4):
        estimate = (weight * (order == outcome)).sum(-1)
        assert abs(float(estimate.mean() - p[outcome])) < 5 * float(estimate.std()) / math.sqrt(n)


# -- what else must hold ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_probabilities_are_finite(name: str, k: int, dtype: torch.dtype) -> None:
    torch.manual_seed(k)
    rows = [[30.0, -30.0, 0.0, 30.0], [0.0, -1e4, -1e4, -1e4], [-300.0, 300.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]]
    logits = nn.Parameter(torch.tensor(rows, dtype=dtype))
    probs = nn.Parameter(torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.5, 0.5, 0.0, 0.0]], dtype=dtype))

    def loss() -> Tensor:
        q = OneHotCategorical(logits=logits)
        z, y = q.sample(), Categorical(probs=probs).sample()
        return ((z * torch.arange(4)).square().sum() + (y.float() - 1).square().sum() + q.log_prob(z).sum()).float()

    compiled = scg.compile(loss, estimator=SETS[name](k))
    for _ in range(3):
        objective = compiled()
        grads = torch.autograd.grad(objective, [logits, probs])
        assert objective.isfinite() and all(grad.isfinite().all() for grad in grads)


def test_weights_do_not_underflow() -> None:
    """Outcomes of probability e^-200 in a set: their order still follows from the ratios."""
    log_p = torch.tensor([0.0, -200.0, -201.0, -202.0]).log_softmax(-1)
    weight, second = weights_of(log_p, torch.tensor([1, 2]))
    torch.testing.assert_close(weight.sum(), torch.ones(()), rtol=1e-4, atol=0)
    assert second.isfinite().all() and (weight > 0).all()


@pytest.mark.parametrize("name", SETS)
def test_packed_elements_share_rows(name: str) -> None:
    """A batch of 100 costs as many evaluations as one example."""
    w = nn.Parameter(torch.zeros(100, 5))
    seen: list[int] = []

    @scg.opaque(batch_dims=1)
    def cost(z: Tensor) -> Tensor:
        seen.append(len(z))
        return (z - 1.0).square()

    compiled = scg.compile(lambda: cost(Categorical(logits=w).sample().float()).mean(), estimator=SETS[name](3))
    compiled()
    seen.clear()
    compiled()
    assert sum(seen) == 300


def test_refusals_say_why() -> None:
    w = nn.Parameter(torch.zeros(2, 3))
    wide = nn.Parameter(torch.zeros(17))

    def joined() -> Tensor:
        return Bernoulli(logits=wide).sample().sum().square()

    with pytest.raises(scg.EstimatorError, match="sees 17 elements of it, whose 1.31e[+]05 joint outcomes are over"):
        scg.compile(joined, estimator="unordered_set", example_inputs=())

    def tied() -> Tensor:
        return Categorical(logits=w).sample().float().square().sum()

    with pytest.raises(scg.EstimatorError, match="4 distinct outcomes were asked for, and its support has only 3"):
        scg.compile(tied, estimator=WithoutReplacement(samples=4), example_inputs=())
    with pytest.raises(ValueError, match="samples=13 is over 12"):
        UnorderedSet(samples=13)


@pytest.mark.parametrize("estimator", [SumAndSample(), UnorderedSet(), WithoutReplacement()])
@pytest.mark.parametrize("family", [Categorical, OneHotCategorical])
def test_probabilities_of_all_categories_are_not_looked_up(family: Any, estimator: Any) -> None:
    logits = nn.Parameter(torch.randn(4, 3))

    def model() -> Tensor:
        z = family(logits=logits).sample()
        return (z**2.0 * torch.arange(4.0).reshape(4, *[1] * (z.dim() - 1))).sum()

    code = str(scg.compile(model, estimator=estimator, example_inputs=()).code)
    assert "expand((3, 4, 3))" not in code and "expand([3, 4, 3])" not in code

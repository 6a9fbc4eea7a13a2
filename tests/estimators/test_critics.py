"""Baselines, critics and bootstrapped targets: unbiased where they say so, else equal to their own defined target."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli, Categorical, Normal

import scg
from scg.estimators.actor_critic import ActorCritic
from scg.estimators.baselines import Baseline, Constant, LeaveOneOut
from scg.estimators.critic import Critic, CriticOnly, GradientCritic
from scg.estimators.learned import InputDependent, Learned
from scg.estimators.nvil import NVIL
from scg.estimators.optimal_scale import OptimalScale
from scg.estimators.score_function import ScoreFunction
from scg.estimators.self_critic import SelfCritic
from scg.estimators.targets import TD, MonteCarlo, Target, TDLambda
from tests.law2 import assert_unbiased, expected_estimate
from tests.problems import PROBLEMS

UNBIASED: dict[str, tuple[Any, int]] = {
    "constant": (Constant(0.7), 1),
    "learned": (Learned(), 1),
    "learned, TD(0)": (Learned(target=TD(1)), 1),
    "learned, lambda, slow copy": (Learned(target=TDLambda(0.5), slow=0.9), 1),
    "input-dependent": (InputDependent(), 1),
    "self-critic": (SelfCritic(), 1),
    "optimal scale": (OptimalScale(), 2),
    "optimal scale of another": (OptimalScale(of=Constant(1.3)), 2),
    "critic": (Critic(), 1),
    "critic, TD(0)": (Critic(target=TD(1)), 1),
    "critic, TD(0), slow copy": (Critic(target=TD(1), slow=0.9), 1),
    "actor-critic, lambda 1": (ActorCritic(Learned(target=TDLambda(1.0))), 1),
}
QUICK = {"chain", "tied_batch"}


@pytest.mark.parametrize("label", UNBIASED)
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow])
        for name in ("chain", "tied_batch", "diamond", "mixed_batch", "integer_index", "one_hot", "sampled_mask",
                     "score_below_enumerated", "score_above_enumerated", "reparam_above_both", "independent_elbo")
    ],
)  # fmt: skip
def test_unbiased(name: str, label: str) -> None:
    torch.manual_seed(0)
    given, samples = UNBIASED[label]
    estimator = ScoreFunction(baseline=given) if isinstance(given, Baseline) else given
    problem = PROBLEMS[name]()
    estimators = {site: estimator if e == "score_function" else e for site, e in problem.estimators.items()}
    assert_unbiased(problem, estimator=estimator, estimators=estimators, samples=samples)


# -- a chain whose predictions are given tables: every biased variant against its definition, outcome by outcome -------
class Table(nn.Module):
    """``a + b * first``: of the outcome before it, or of nothing."""

    def __init__(self, a: float, b: float) -> None:
        super().__init__()
        self.a, self.b = (nn.Parameter(torch.tensor(x, dtype=torch.float64)) for x in (a, b))

    def forward(self, *read: Tensor) -> Tensor:
        return self.a + sum((self.b * x for x in read), torch.zeros((), dtype=torch.float64))


class Chain(nn.Module):
    """Three coins, each weighed by the one before it, with a cost each, discounted."""

    def __init__(self, discount: float = 1.0) -> None:
        super().__init__()
        self.discount = discount
        self.w = nn.Parameter(torch.tensor([0.4, -0.7, 0.9], dtype=torch.float64))
        self.c = nn.Parameter(torch.tensor([1.3, -0.5], dtype=torch.float64))

    def law(self, t: int, before: Tensor) -> Bernoulli:
        return Bernoulli(logits=self.w[t] + (self.c[t - 1] * before if t else 0.0))

    def costs(self, z: list[Tensor]) -> list[Tensor]:
        return [(z[0] - 0.3) ** 2, 2 * torch.exp(z[1]), 3 * (z[2] - 0.8) ** 2]

    def forward(self) -> Tensor:
        z: list[Tensor] = []
        for t in range(3):
            draw = scg.sample(self.law(t, z[-1] if z else torch.zeros(())), f"z{t}")
            z.append(draw)
        costs = [self.discount**t * scg.cost(c, f"c{t}") for t, c in enumerate(self.costs(z))]
        return torch.stack(costs).sum()


def by_hand(
    model: Chain, loss: Callable[[list[Tensor], list[Tensor], list[Tensor]], Tensor], over: list[nn.Parameter]
) -> list[Tensor]:
    """``sum over z of P(z) * gradient of loss(z, costs, log probabilities)``, the probabilities not differentiated."""
    total = [torch.zeros_like(p) for p in over]
    for bits in itertools.product((0.0, 1.0), repeat=3):
        z = [torch.tensor(bit, dtype=torch.float64) for bit in bits]
        log_p = [model.law(t, z[t - 1] if t else torch.zeros(())).log_prob(z[t]) for t in range(3)]
        probability = float(torch.stack(log_p).sum().exp().detach())
        value = loss(z, [c.detach() for c in model.costs(z)], log_p)
        for sum_, grad in zip(total, torch.autograd.grad(value, over, allow_unused=True), strict=True):
            if grad is not None:
                sum_ += probability * grad
    return total


def returns(target: Target, costs: list[Tensor], predicted: list[Tensor], discount: float = 1.0) -> list[Tensor]:
    """The returns of a chain by the textbook's recursion; ``predicted[t]`` is the prediction at step ``t``."""
    steps = len(costs)
    if not isinstance(target, TDLambda):
        ahead = target.steps if isinstance(target, TD) else steps
        tails = [*predicted, *[torch.zeros(())] * ahead]
        return [
            sum((discount**k * costs[t + k] for k in range(min(ahead, steps - t))), discount**ahead * tails[t + ahead])
            for t in range(steps)
        ]
    found: list[Tensor] = []
    for t in reversed(range(steps)):
        after = (1 - target.decay) * predicted[t + 1] + target.decay * found[0] if found else torch.zeros(())
        found.insert(0, costs[t] + discount * after)
    return found


TARGETS = (MonteCarlo(), TD(1), TD(2), TDLambda(0.0), TDLambda(0.6))


@pytest.mark.parametrize("discount", [1.0, 0.7])
@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_actor_critic_equals_its_target(target: Target, discount: float) -> None:
    """The advantage and the fit of every value function, against returns computed by hand.

    A discount of the costs is one of the returns: a value speaks of its own step on, as if nothing lay before.
    """
    model = Chain(discount)
    tables = [Table(0.3, 0.0), Table(-0.4, 1.1), Table(0.8, -0.7)]
    reads: list[tuple[str, ...]] = [(), ("z0",), ("z1",)]
    estimators = {
        f"z{t}": ActorCritic(Learned(table, inputs=read, target=target))
        for t, (table, read) in enumerate(zip(tables, reads, strict=True))
    }
    compiled = scg.compile(model, estimators=estimators, example_inputs=())
    parameters = [*model.parameters(), *itertools.chain.from_iterable(t.parameters() for t in tables)]
    _, found = expected_estimate(compiled, {str(i): p for i, p in enumerate(parameters)})

    def surrogate(z: list[Tensor], costs: list[Tensor], log_p: list[Tensor]) -> Tensor:
        predicted = [tables[0](), tables[1](z[0]), tables[2](z[1])]
        fixed = [p.detach() for p in predicted]
        total = torch.zeros((), dtype=torch.float64)
        for t, wanted in enumerate(returns(target, costs, fixed, discount)):
            total = total + discount**t * ((wanted - fixed[t]) * log_p[t] + (wanted - predicted[t]) ** 2)
        return total

    expected = by_hand(model, surrogate, parameters)
    torch.testing.assert_close(list(found.values()), expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("target", [MonteCarlo(), TD(1), TDLambda(0.6)], ids=str)
@pytest.mark.parametrize(("kind", "slow"), [(Critic, None), (CriticOnly, None), (Critic, 0.5), (CriticOnly, 0.5)])
def test_critics_equal_their_targets(kind: Any, slow: float | None, target: Target) -> None:
    """With a slow copy, the targets are made of what the copy says."""
    model = Chain()
    tables = [Table(0.3, 0.5), Table(-0.4, 1.1), Table(0.8, -0.7)]
    copies = tables if slow is None else [Table(-0.2, 0.4), Table(0.6, -0.3), Table(0.1, 0.9)]
    estimators = {f"z{t}": kind(table, inputs=(), target=target, slow=slow) for t, table in enumerate(tables)}
    compiled = scg.compile(model, estimators=estimators, example_inputs=())
    if slow is not None:
        states: Any = compiled.estimators
        for t, copy in enumerate(copies):
            states[f"z{t}"].slow.load_state_dict(copy.state_dict())
    critics = list(itertools.chain.from_iterable(t.parameters() for t in tables))
    parameters = [*model.parameters(), *critics]
    _, found = expected_estimate(compiled, {str(i): p for i, p in enumerate(parameters)})

    def surrogate(z: list[Tensor], costs: list[Tensor], log_p: list[Tensor]) -> Tensor:
        predicted = [table(x) for table, x in zip(tables, z, strict=True)]
        fixed = [p.detach() for p in predicted]
        wanted = returns(target, costs, [copy(x).detach() for copy, x in zip(copies, z, strict=True)])
        total = torch.stack([(g - p) ** 2 for g, p in zip(wanted, predicted, strict=True)]).sum()
        return total + torch.stack([fixed[t] * log_p[t] for t in range(3)]).sum()

    expected = by_hand(model, surrogate, parameters)
    if kind is Critic:  # unbiased: the model's gradient is the exact one, whatever the critic says
        exact = scg.exact(model)[1]
        expected[: len(exact)] = list(exact.values())
    torch.testing.assert_close(list(found.values()), expected, rtol=1e-9, atol=1e-10)


class Tree(nn.Module):
    """A coin above two: costs of each alone, or of the two together."""

    def __init__(self, joint: bool) -> None:
        super().__init__()
        self.w, self.joint = nn.Parameter(torch.tensor([0.4, -0.7, 0.9], dtype=torch.float64)), joint

    def forward(self) -> Tensor:
        a = scg.sample(Bernoulli(logits=self.w[0]), "a")
        b = scg.sample(Bernoulli(logits=self.w[1] + a), "b")
        c = scg.sample(Bernoulli(logits=self.w[2] - a), "c")
        below = (b - 2 * c) ** 2 if self.joint else 3 * torch.exp(b) + c * 5
        return scg.cost((a - 0.3) ** 2, "own") + scg.cost(below, "below")


@pytest.mark.parametrize("joint", [False, True])
def test_a_cut_is_taken_where_costs_fall_apart(joint: bool) -> None:
    """Below ``a`` two predictions stand for two costs; for one cost of both, one prediction does."""
    model = Tree(joint)
    tables = {"a": Table(0.2, 0.0), "b": Table(-0.4, 1.1), "c": Table(0.8, -0.7)}
    reads: dict[str, tuple[str, ...]] = {"a": (), "b": ("a",), "c": ("a",)}
    estimators = {name: ActorCritic(Learned(tables[name], inputs=reads[name], target=TD(1))) for name in tables}
    compiled = scg.compile(model, estimators=estimators, example_inputs=())
    _, found = expected_estimate(compiled, {"w": model.w})
    p = torch.sigmoid(model.w.detach()[0])
    advantage = []
    for a in (0.0, 1.0):
        z = torch.tensor(a, dtype=torch.float64)
        behind = tables["b"](z) + (0.0 if joint else tables["c"](z))
        advantage.append((z - 0.3) ** 2 + behind - tables["a"]())
    torch.testing.assert_close(found["w"][0], (p * (1 - p) * (advantage[1] - advantage[0])).detach())


class Branches(nn.Module):
    """A coin above two that stand above one each, or above one together; a cost each, discounted by depth."""

    def __init__(self, joint: bool) -> None:
        super().__init__()
        self.above = {"a": "", "b": "a", "c": "a", **({"d": "bc"} if joint else {"d": "b", "e": "c"})}
        self.w = nn.Parameter(torch.tensor([0.4, -0.7, 0.9, 0.2, -0.5], dtype=torch.float64))

    def law(self, name: str, z: dict[str, Tensor]) -> Bernoulli:
        return Bernoulli(logits=self.w["abcde".index(name)] + sum(z[above] for above in self.above[name]))

    @staticmethod
    def cost(name: str, z: dict[str, Tensor]) -> Tensor:
        return ("abcde".index(name) + 1) * (z[name] - 0.3) ** 2

    def forward(self) -> Tensor:
        z: dict[str, Tensor] = {}
        total = torch.zeros((), dtype=torch.float64)
        for name in self.above:
            z[name] = scg.sample(self.law(name, z), name)
            total = total + 0.7 ** DEPTH[name] * scg.cost(self.cost(name, z), f"cost_{name}")
        return total


DEPTH = {"a": 0, "b": 1, "c": 1, "d": 2, "e": 2}


@pytest.mark.parametrize(
    ("joint", "target"),
    [
        pytest.param(joint, target, id=f"{name}-{target}", marks=[] if target == quick else [pytest.mark.slow])
        for joint, name, quick in ((False, "tree", TDLambda(0.6)), (True, "diamond", TD(2)))
        for target in (TD(1), TD(2), TDLambda(0.6))
    ],
)
def test_discounted_returns_below_branches(joint: bool, target: Target) -> None:
    """A return is the sum over branches. Where they meet again, a cost below both is predicted once: by the first."""
    model = Branches(joint)
    names = list(model.above)
    tables = {name: Table(0.3 * i - 0.5, 0.7 - 0.4 * i) for i, name in enumerate(names)}
    estimators = {n: ActorCritic(Learned(tables[n], inputs=tuple(model.above[n]), target=target)) for n in names}
    compiled = scg.compile(model, estimators=estimators, example_inputs=())
    parameters = [model.w, *itertools.chain.from_iterable(table.parameters() for table in tables.values())]
    _, found = expected_estimate(compiled, {str(i): p for i, p in enumerate(parameters)})

    cut = {"a": "b" if joint else "bc", "b": "d", "c": "d" if joint else "e", "d": "", "e": ""}
    expected = [torch.zeros_like(p) for p in parameters]
    for bits in itertools.product((0.0, 1.0), repeat=len(names)):
        z = {name: torch.tensor(bit, dtype=torch.float64) for name, bit in zip(names, bits, strict=True)}
        log_p = {name: model.law(name, z).log_prob(z[name]) for name in names}
        value = {name: tables[name](*(z[above] for above in model.above[name])) for name in names}
        own = {name: model.cost(name, z) for name in names}
        if joint:
            own["a"] = own["a"] + 0.7 * own["c"]  # behind no cut: as it was drawn

        def wanted(name: str, steps: int, own: dict[str, Tensor] = own, value: dict[str, Tensor] = value) -> Tensor:
            if not steps:
                return value[name].detach()
            if isinstance(target, TD):
                return own[name] + 0.7 * sum(wanted(below, steps - 1) for below in cut[name])
            mixed = [0.4 * value[below].detach() + 0.6 * wanted(below, steps) for below in cut[name]]
            return own[name] + 0.7 * sum(mixed)

        surrogate = torch.zeros((), dtype=torch.float64)
        for name in names:
            goal = wanted(name, target.steps if isinstance(target, TD) else 1)
            gain = (goal - value[name]).detach() * log_p[name] + (goal - value[name]) ** 2
            surrogate = surrogate + 0.7 ** DEPTH[name] * gain
        probability = torch.stack(list(log_p.values())).sum().exp().detach()
        for total, grad in zip(expected, torch.autograd.grad(surrogate, parameters, allow_unused=True), strict=True):
            if grad is not None:
                total += probability * grad
    torch.testing.assert_close(list(found.values()), expected, rtol=1e-9, atol=1e-10)


class Gaussian(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.tensor(0.7, dtype=torch.float64))

    def forward(self) -> tuple[Tensor, Tensor]:
        x = scg.sample(Normal(self.theta, 0.5), "x")
        w = scg.sample(Normal(x, torch.tensor(2.0, dtype=torch.float64)), "w")
        return (w - 1.0) ** 2, x


class Parabola(nn.Module):
    """The exact critic of `Gaussian`: ``E[(w - 1)^2 | x]``."""

    def forward(self, x: Tensor) -> Tensor:
        return (x - 1.0) ** 2 + 4.0


@pytest.mark.parametrize("kind", [GradientCritic, Critic])
def test_exact_critic_of_a_gaussian(kind: Any) -> None:
    """Per draw the gradient critic is ``2 (x - 1)``: variance ``4 s^2``, free of the noise below it."""
    model = Gaussian()
    estimators = {"x": kind(Parabola(), inputs=()), "w": "score_function"}
    compiled = scg.compile(model, estimators=estimators, example_inputs=())
    for seed in range(5):
        torch.manual_seed(seed)
        loss, x = compiled()
        (grad,) = torch.autograd.grad(loss, model.theta)
        path = 2 * (x - 1)
        score = (loss - Parabola()(x)) * (x - model.theta) / 0.25
        torch.testing.assert_close(grad, path if kind is GradientCritic else path + score.detach())


def test_nvil_divides_by_the_deviation_of_earlier_steps() -> None:
    model = Chain()
    compiled = scg.compile(model, estimator=NVIL(), example_inputs=())
    for _ in range(20):
        compiled()
    plain = scg.compile(model, estimator=ScoreFunction(baseline=None), example_inputs=())
    states: Any = compiled.estimators
    for state in states.values():
        state.inner.net[2].weight.data.zero_(), state.inner.net[2].bias.data.zero_()
        state.mean.total.zero_()
    states["z0"].square.total.fill_(9.0)
    scales = [float(states[f"z{t}"].scale()) for t in range(3)]
    assert scales[0] > 2
    torch.manual_seed(1)
    got = torch.autograd.grad(compiled(), model.w)[0]
    torch.manual_seed(1)
    want = torch.autograd.grad(plain(), model.w)[0] / torch.tensor(scales)
    torch.testing.assert_close(got, want.to(got.dtype), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["baseline", "critic"])
def test_learned_parts_touch_themselves_alone_and_the_copy_follows(kind: str) -> None:
    model = Chain()
    baseline = ActorCritic(Learned(target=TD(1), slow=0.5))
    estimator = baseline if kind == "baseline" else Critic(target=TD(1), slow=0.5)
    compiled = scg.compile(model, estimator=estimator, example_inputs=())
    assert not {id(p) for p in compiled.estimator_parameters()} & {id(p) for p in compiled.model_parameters()}
    assert all("slow" not in name for name, _ in compiled.named_parameters())
    state: Any = compiled.estimators["z1"]
    online, slow = state.online.net[0].weight, state.slow.net[0].weight
    with torch.no_grad():
        online += 1.0
    before = slow.clone()
    compiled().backward()
    torch.testing.assert_close(slow, 0.5 * before + 0.5 * online.detach())
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in compiled.estimator_parameters())
    with compiled.frozen():
        before = slow.clone()
        compiled()
    assert torch.equal(before, slow)
    assert {k for k in compiled.state_dict() if ".slow." in k} and not slow.requires_grad


def test_a_module_that_shares_parameters_with_the_model_is_refused() -> None:
    """Its fit would add to the model's gradient, which would be biased."""
    net = nn.Linear(3, 4)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.value = net, nn.Linear(3, 4)

        def forward(self, x: Tensor) -> Tensor:
            z = scg.sample(Bernoulli(logits=self.net(x)), "z")
            return ((z - 0.3) ** 2).sum(-1).mean()

    def function(x: Tensor) -> Tensor:
        return scg.sample(Bernoulli(logits=net(x)), "z").sum()

    x, model = torch.randn(5, 3), Model()
    for program, path in ((model, "net.weight"), (function, "weight")):
        for shared in (net, nn.Sequential(net, nn.Tanh())):
            with pytest.raises(scg.EstimatorError, match=rf"%z .*shares the parameter '.*{path}'"):
                scg.compile(program, estimator=ScoreFunction(baseline=Learned(shared)), example_inputs=(x,))
    compiled = scg.compile(model, estimator=ScoreFunction(baseline=Learned(model.value)), example_inputs=(x,))
    compiled(x).backward()  # it may live in the model, whose loss does not read it
    assert model.value.weight.grad is not None


@pytest.mark.slow
def test_the_small_network_learns_the_expected_cost_of_its_context() -> None:
    """Given enough steps the critic knows the cost-to-go of every outcome: its control variate takes the noise away."""
    torch.manual_seed(0)
    model = Chain()
    compiled = scg.compile(model, estimator=Critic(), samples=16, example_inputs=())
    optimizer = torch.optim.Adam(compiled.estimator_parameters(), lr=0.02)
    one = scg.compile(model, estimator=ScoreFunction(baseline=None))
    before = scg.gradient_samples(one, n=400)["w"].var(0).sum()
    for _ in range(150):
        optimizer.zero_grad()
        compiled().backward()
        optimizer.step()
    single = scg.compile(model, estimator=Critic(), example_inputs=())
    single.load_state_dict(compiled.state_dict())
    assert scg.gradient_samples(single, n=400)["w"].var(0).sum() < before / 5


# -- replayed sites ---------------------------------------------------------------------------------------------------
class Rollout(nn.Module):
    """Logged actions ``[B, T]`` with rewards after them."""

    def __init__(self, discount: float = 1.0, *, loop: bool = False) -> None:
        super().__init__()
        self.net = nn.Linear(1, 3, dtype=torch.float64)
        self.discount, self.loop = discount, loop

    def forward(self, state: Tensor, action: Tensor, reward: Tensor) -> Tensor:
        a = scg.sample(Categorical(logits=self.net(state)), "a", value=action)
        reward = scg.depends(reward, on=a, dims=("tied", "causal"))
        if self.loop:
            steps = range(reward.shape[-1])
            return -torch.stack([self.discount**t * scg.cost(reward[:, t], f"r{t}").mean() for t in steps]).sum()
        discounts = self.discount ** torch.arange(reward.shape[-1], dtype=torch.float64)
        return -(scg.cost(reward, "reward") * discounts).sum(-1).mean()


class Value(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(1, 1, dtype=torch.float64)

    def forward(self, state: Tensor) -> Tensor:
        return self.line(state)


def _batch() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(4, 5, 1).double(), torch.randint(3, (4, 5)), torch.randn(4, 5).double()


@pytest.mark.parametrize(("discount", "loop"), [(1.0, False), (0.7, False), (0.7, True)])
@pytest.mark.parametrize("target", [MonteCarlo(), TD(1), TD(3), TDLambda(0.9)], ids=str)
def test_bootstrapping_along_a_causal_dim(target: Target, discount: float, loop: bool) -> None:
    """A value of a state speaks of what follows as if the state came first, with a discount too, however written."""
    model, value = Rollout(discount, loop=loop), Value()
    state, action, reward = _batch()
    estimator = ActorCritic(Learned(value, inputs=("state",), target=target))
    compiled = scg.compile(model, estimator=estimator, example_inputs=(state, action, reward))
    parameters = [*model.parameters(), *value.parameters()]
    got = torch.autograd.grad(compiled(state, action, reward), parameters)

    predicted = value(state)[..., 0]
    fixed = predicted.detach()
    weight = discount ** torch.arange(5, dtype=torch.float64)
    wanted = torch.stack([torch.stack(returns(target, list(-reward[b]), list(fixed[b]), discount)) for b in range(4)])
    log_p = Categorical(logits=model.net(state)).log_prob(action)
    by_hand = (weight * (wanted - fixed) * log_p).sum(-1).mean() + (weight * (wanted - predicted) ** 2).mean() / 4
    for a, b in zip(got, torch.autograd.grad(by_hand, parameters), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_a_value_is_in_units_of_the_cost_under_a_mask() -> None:
    """A masked mean of logged rewards: what its sum is divided by is left out, and what lies behind the end."""

    class Masked(Rollout):
        def forward(self, state: Tensor, action: Tensor, reward: Tensor, mask: Tensor) -> Tensor:  # type: ignore[override]
            a = scg.sample(Categorical(logits=self.net(state)), "a", value=action)
            seen = scg.depends(reward, on=a, dims=("tied", "causal"))
            return -(scg.cost(seen, "reward") * mask).sum() / mask.sum()

    model, value = Masked(), Value()
    state, action, reward = _batch()
    mask = (torch.arange(5) < torch.tensor([[5], [2], [3], [1]])).double()
    estimator = ActorCritic(Learned(value, inputs=("state",), target=TDLambda(0.9)))
    compiled = scg.compile(
        model, estimator=estimator, example_inputs=(state, action, reward, torch.ones(4, 5).double())
    )
    parameters = [*model.parameters(), *value.parameters()]
    got = torch.autograd.grad(compiled(state, action, reward, mask), parameters)
    predicted = value(state)[..., 0]
    fixed, costs = predicted.detach() * mask, -reward * mask
    wanted = torch.stack([torch.stack(returns(TDLambda(0.9), list(costs[b]), list(fixed[b]))) for b in range(4)])
    score = Categorical(logits=model.net(state)).log_prob(action)
    each = (wanted - fixed) * score + (wanted - predicted) ** 2 / 20  # the fit is a mean over elements
    want = torch.autograd.grad((each * mask).sum() / mask.sum(), parameters)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


class Weighed(nn.Module):
    """A cost for each of ``[B, T]`` actions, weighed by its place."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(1, 1, dtype=torch.float64)
        self.weight = torch.tensor([1.0, 0.5, 2.0, 0.0, 3.0], dtype=torch.float64)

    def forward(self, state: Tensor) -> Tensor:
        z = scg.sample(Bernoulli(logits=self.net(state)[..., 0]), "z")
        return (scg.cost((z - 0.3) ** 2, "cost") * self.weight).sum(-1).mean()


def test_a_prediction_is_in_units_of_what_its_element_is_credited_with() -> None:
    """The module speaks of the cost itself, whatever it weighs; where it weighs nothing, of nothing."""
    model, value = Weighed(), Value()
    state = _batch()[0]
    compiled = scg.compile(model, estimator=ScoreFunction(baseline=Learned(value)), example_inputs=(state,))
    torch.manual_seed(3)
    got = torch.autograd.grad(compiled(state), [*model.parameters(), *value.parameters()])
    torch.manual_seed(3)
    z = torch.bernoulli(torch.sigmoid(model.net(state)[..., 0]).detach())
    cost, predicted = (z - 0.3) ** 2, value(state)[..., 0]
    score = Bernoulli(logits=model.net(state)[..., 0]).log_prob(z)
    gain = (cost - predicted).detach() * score * model.weight / 4
    fit = (model.weight / 4 * (cost - predicted) ** 2).mean()
    want = torch.autograd.grad(gain.sum() + fit, [*model.parameters(), *value.parameters()])
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


class Answers(nn.Module):
    """Groups of four answers ``[P, 4, T]`` to one prompt each, with a reward an answer."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.tensor([0.3, -0.2, 0.5], dtype=torch.float64))

    def forward(self, tokens: Tensor, reward: Tensor) -> Tensor:
        z = scg.sample(Bernoulli(logits=self.logits.expand(tokens.shape)), "z", value=tokens)
        return -scg.depends(reward, on=z, dims=("tied", "tied")).mean()


def test_leave_one_out_of_a_group_of_replayed_draws() -> None:
    model = Answers()
    tokens = (torch.rand(2, 4, 3) < 0.5).double()
    reward = torch.randn(2, 4).double()
    compiled = scg.compile(model, estimator=ScoreFunction(baseline=LeaveOneOut(group=1)))
    (got,) = torch.autograd.grad(compiled(tokens, reward), model.logits)
    log_p = Bernoulli(logits=model.logits).log_prob(tokens).sum(-1)
    rest = (reward.sum(1, keepdim=True) - reward) / 3
    (want,) = torch.autograd.grad((-(reward - rest) * log_p).mean(), model.logits)
    torch.testing.assert_close(got, want)
    for wrong, why in ((2, "a cost sees several of them"), (5, "no element dim")):
        with pytest.raises(scg.EstimatorError, match=why):
            scg.compile(model, estimator=ScoreFunction(baseline=LeaveOneOut(group=wrong)))(tokens, reward)
    with pytest.raises(scg.EstimatorError, match="one outcome"):
        scg.compile(model, estimator=ScoreFunction(baseline="self_critic"))(tokens, reward)


class Seen(nn.Module):
    """A critic's network that keeps what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.seen: tuple[tuple[int, ...], ...] = ()

    def forward(self, outcome: Tensor, *values: Tensor) -> Tensor:
        self.seen = tuple(tuple(value.shape) for value in values)
        return self.weight * outcome


def test_a_draw_may_be_called_as_an_input_is() -> None:
    net = nn.Linear(2, 1)

    def model(state: Tensor) -> Tensor:
        state = Normal(state.sum(-1, keepdim=True).expand(-1, 2), 0.1).sample()
        a = Bernoulli(logits=net(state)).sample()
        return ((a - 0.3) * state).sum(-1).mean()

    scg.compile(model, estimators={"a": "critic"})(torch.ones(5, 7)).backward()  # its context is the draw
    seen = Seen()
    scg.compile(model, estimators={"a": Critic(seen, inputs=("state",))})(torch.ones(5, 7)).backward()
    assert seen.seen == ((5, 7),)  # what the user names is the input

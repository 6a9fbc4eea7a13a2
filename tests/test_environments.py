"""Environments behind `scg.opaque`, gymnasium's CartPole as the real one: REINFORCE as by hand on the same draws."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Categorical, Normal

import scg
from scg.estimators.baselines import LeaveOneOut
from scg.estimators.score_function import ScoreFunction

gymnasium = pytest.importorskip("gymnasium")

STEPS, ENVS, GAMMA = 6, 4, 0.9


class World:
    """CartPoles side by side, as functions of tensors; reset with one seed, so that a call can be played again."""

    def __init__(self) -> None:
        self.envs = gymnasium.vector.SyncVectorEnv([lambda: gymnasium.make("CartPole-v1")] * ENVS)
        self.log: list[str] = []

        @scg.opaque(shape=lambda: (ENVS, 4), dtype=torch.float64, pure=False)
        def reset() -> Tensor:
            self.log.append("reset")
            tilted = {"low": 0.17, "high": 0.2}  # poles that soon fall: episodes end within the horizon
            return torch.from_numpy(self.envs.reset(seed=3, options=tilted)[0]).double()

        double = torch.float64
        shapes = (lambda a: (ENVS, 4), lambda a: (ENVS,), lambda a: (ENVS,))

        @scg.opaque(shape=shapes, dtype=(double, double, double), batch_dims=1, pure=False)
        def step(action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            self.log.append("step")
            seen, reward, ended, cut, _ = self.envs.step(action.numpy().copy())
            return torch.from_numpy(seen).double(), torch.from_numpy(reward), torch.from_numpy(ended | cut).double()

        self.reset, self.step = reset, step


class Policy(nn.Module):
    """Minus the discounted return of episodes that are played inside the program."""

    def __init__(self, world: World, *, push: bool = False, blind: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net, self.force = (nn.Linear(4, n, dtype=torch.float64) for n in (2, 1))
        self.world, self.push, self.blind = world, push, blind

    def logits(self, state: Tensor, x: Tensor) -> Tensor:
        return self.net(torch.ones_like(state) if self.blind else state) + torch.stack([x, -(x**2)], -1)

    def forward(self) -> tuple[Tensor, dict[str, Tensor]]:
        state, alive, total = self.world.reset(), torch.ones(ENVS, dtype=torch.float64), torch.zeros(())
        kept: dict[str, list[Tensor]] = {"state": [], "x": [], "action": [], "cost": [], "alive": []}
        for t in range(STEPS):
            x = torch.zeros(ENVS, dtype=torch.float64)
            if self.push:  # a draw with a derivative: it moves the policy, and has a cost of its own
                x = scg.sample(Normal(self.force(state)[:, 0], 0.5), f"x_{t}")
                total = total + GAMMA**t * (alive * (x - 1) ** 2).mean()
            action = scg.sample(Categorical(logits=self.logits(state, x)), f"action_{t}")
            now = {"state": state, "x": x, "action": action, "alive": alive}
            state, reward, ended = self.world.step(action)
            cost = state[:, 2] ** 2 if self.blind else -reward * alive
            alive = alive * (1 - ended)
            total = total + GAMMA**t * cost.mean()
            for name, value in {**now, "cost": cost}.items():
                kept[name].append(value)
        return total, {name: torch.stack(values) for name, values in kept.items()}

    def by_hand(self, kept: dict[str, Tensor]) -> Tensor:
        """Reward-to-go times the score, and the derivative through ``x``, of what was played, ``[T, B, …]``."""
        x, alive, state = kept["x"], kept["alive"], kept["state"]
        discount = GAMMA ** torch.arange(STEPS, dtype=torch.float64)[:, None]
        own = torch.zeros((), dtype=torch.float64)
        costs = discount * kept["cost"]  # [T, B]
        to_go = costs.flip(0).cumsum(0).flip(0)
        if self.push:
            mean = self.force(state)[..., 0]
            x = mean + (x - mean).detach()
            taught = discount * alive * (x - 1) ** 2
            own = taught.sum(0).mean()
            to_go = to_go + (taught.flip(0).cumsum(0).flip(0) - taught).detach()  # later ones follow from the action
        score = Categorical(logits=self.logits(state, x)).log_prob(kept["action"])
        return (to_go * score).sum(0).mean() + own


@pytest.mark.parametrize(
    ("push", "blind"),
    [
        pytest.param(False, False, id="actions"),
        pytest.param(True, False, id="with a differentiable part"),
        pytest.param(False, True, id="actions that see nothing"),  # the environment alone knows the earlier ones
    ],
)
def test_a_vector_environment_inside_the_program(push: bool, blind: bool) -> None:
    world = World()
    model = Policy(world, push=push, blind=blind)
    compiled = scg.compile(model, estimators={"action_*": ScoreFunction(baseline=None)}, example_inputs=())
    assert world.log == []  # nothing is played to compile it
    parameters = list(model.net.parameters()) + (list(model.force.parameters()) if push else [])
    for seed in range(3):
        torch.manual_seed(seed)
        world.log.clear()
        loss, kept = compiled()
        assert world.log == ["reset", *["step"] * STEPS]  # each once, in the order of the program
        got = torch.autograd.grad(loss, parameters)
        kept = {name: value.detach() for name, value in kept.items()}
        want = torch.autograd.grad(model.by_hand(kept), parameters)
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-9)
        assert 0 < kept["alive"].mean() < 1

        again = World()  # the actions played by hand see the same states
        state = again.reset()
        for t in range(STEPS):
            torch.testing.assert_close(kept["state"][t], state)
            state = again.step(kept["action"][t])[0]
    sites = compiled.graph.sites
    if push:
        assert sites["x_3"].estimator == "reparam" and len(sites["x_3"].credits) > len(sites["x_4"].credits)
    assert len(sites["action_3"].credits) - len(sites["action_4"].credits) == 1 + push


@scg.opaque(shape=(lambda s, a: s.shape, lambda s, a: s.shape[:1]), dtype=(torch.float64,) * 2, batch_dims=1)
def dynamics(state: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
    """One step of CartPole from states that are given: stateless, so that it may be played from many at once."""
    cart: Any = gymnasium.make("CartPole-v1").unwrapped
    seen = []
    for row, push in zip(state.numpy(), action.tolist(), strict=True):
        cart.state, cart.steps_beyond_terminated = np.array(row), None
        seen.append(torch.from_numpy(cart.step(push)[0]).double())
    after = torch.stack(seen)
    return after, after[:, 2].abs() * 10


class Balance(nn.Module):
    """The angle of the pole over a few steps from given states."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.net = nn.Linear(4, 2, dtype=torch.float64)

    def forward(self, state: Tensor) -> Tensor:
        total = torch.zeros(())
        for t in range(4):
            action = scg.sample(Categorical(logits=self.net(state)), f"action_{t}")
            state, cost = dynamics(state, action)
            total = total + cost.mean()
        return total


def test_a_simulator_with_its_state_carried_through_takes_many_draws() -> None:
    """Four draws at once, folded into the batch of the simulator, each the baseline of the others."""
    model, draws = Balance(), 4
    state = 0.1 * torch.randn(ENVS, 4, dtype=torch.float64)
    compiled = scg.compile(model, estimator=ScoreFunction(baseline=LeaveOneOut()), samples=draws)
    compiled(state)
    torch.manual_seed(5)
    got = torch.autograd.grad(compiled(state), list(model.parameters()))

    torch.manual_seed(5)
    now, costs, scores = state.expand(draws, ENVS, 4), [], []
    for t in range(4):
        law = Categorical(logits=model.net(now if t else state))
        action = law.sample() if t else law.sample((draws,))
        scores.append(law.log_prob(action))  # [K, B]
        flat, cost = dynamics(now.reshape(-1, 4), action.reshape(-1))
        now = flat.reshape(draws, ENVS, 4)
        costs.append(cost.reshape(draws, ENVS))
    surrogate = torch.zeros((), dtype=torch.float64)
    for t, score in enumerate(scores):
        to_go = torch.stack(costs[t:]).sum(0)
        surrogate = surrogate + ((to_go - to_go.mean(0)) * draws / (draws - 1) * score).mean(0).mean()
    torch.testing.assert_close(got, torch.autograd.grad(surrogate, list(model.parameters())), rtol=1e-6, atol=1e-9)

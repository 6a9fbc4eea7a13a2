"""Policy gradients on gymnasium's CartPole-v1: rollouts are replayed, and the compiler finds reward-to-go by itself.

The environment is outside the program, so the model says what it cannot see: a reward depends on the actions of its own
episode up to then, `dims=("tied", "causal")`. From that the credit follows. REINFORCE takes the mean of the other
episodes as baseline; with a critic, lambda-returns and PPO's clip a batch serves for several steps, so that fewer are
taken in the environment. Needs `pip install gymnasium`.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Iterator
from dataclasses import astuple, dataclass
from pathlib import Path

import gymnasium
import torch
from torch import Tensor, nn
from torch.distributions import Categorical
from tqdm import tqdm

import scg
from scg.estimators.base import Estimator
from scg.estimators.baselines import LeaveOneOut
from scg.estimators.clipped_surrogate import ClippedSurrogate
from scg.estimators.learned import Learned
from scg.estimators.score_function import ScoreFunction
from scg.estimators.targets import TDLambda

HORIZON = 500
GOAL = 400
"""Mean return at which training stops; the most is 500."""


@dataclass(frozen=True)
class Rollout:
    """Whole episodes side by side, padded behind their ends."""

    state: Tensor
    """``[B, T, 4]``"""
    action: Tensor
    """``[B, T]``"""
    alive: Tensor
    """``[B, T]``, 1 while the episode runs, which is also the reward."""
    log_prob: Tensor
    """``[B, T]``, of the actions when they were drawn."""

    @property
    def lengths(self) -> Tensor:
        return self.alive.sum(-1)


class Policy(nn.Module):
    """The loss of a batch of logged episodes: minus their mean return, in hundreds of steps."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 2))

    def forward(self, state: Tensor, action: Tensor, alive: Tensor, log_prob: Tensor) -> Tensor:
        logits = self.net(state) * alive.unsqueeze(-1)  # behind the end of an episode there is nothing to learn
        a = scg.sample(Categorical(logits=logits), "action", value=action)
        reward = scg.depends(alive, on=a, dims=("tied", "causal"))
        return -scg.cost(reward / 100, "reward").sum(-1).mean()


class Value(nn.Module):
    """What a state is expected to cost from here on; nothing behind the end."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(4, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 1)
        )

    def forward(self, state: Tensor, alive: Tensor) -> Tensor:
        value: Tensor = self.net(state).squeeze(-1) * alive
        return value


class Unrolled(Policy):
    """The same loss with one site a step, for the picture."""

    def forward(self, state: Tensor, action: Tensor, alive: Tensor, log_prob: Tensor) -> Tensor:
        actions, total = [], torch.zeros(())
        for t in range(state.shape[1]):
            law = Categorical(logits=self.net(state[:, t]))
            actions.append(scg.sample(law, f"action_{t}", value=action[:, t]))
            reward = alive[:, t]
            for a in actions:
                reward = scg.depends(reward, on=a, dims=("tied",))
            total = total + scg.cost(reward, f"reward_{t}").mean()
        return -total


class Collector:
    """Draws whole episodes with a policy, and counts the environment's steps."""

    def __init__(self, episodes: int, seed: int) -> None:
        self.envs = gymnasium.make_vec("CartPole-v1", num_envs=episodes, vectorization_mode="vector_entry_point")
        self.steps = 0
        self._seed: int | None = seed

    @torch.no_grad()
    def __call__(self, policy: nn.Module) -> Rollout:
        seen, self._seed = self.envs.reset(seed=self._seed)[0], None
        episodes = seen.shape[0]
        state = torch.zeros(episodes, HORIZON, 4)
        action = torch.zeros(episodes, HORIZON, dtype=torch.int64)
        alive = torch.zeros(episodes, HORIZON)
        log_prob = torch.full((episodes, HORIZON), math.log(1 / 2))  # behind the end, as the model has it
        running = torch.ones(episodes, dtype=torch.bool)
        for t in range(HORIZON):
            state[:, t] = torch.from_numpy(seen)
            log_p = policy(state[:, t]).log_softmax(-1)
            drawn = torch.multinomial(log_p.exp(), 1)
            action[:, t] = drawn[:, 0]
            log_prob[running, t] = log_p.gather(-1, drawn)[running, 0]
            alive[:, t] = running
            self.steps += int(running.sum())
            seen, _, ended, cut, _ = self.envs.step(action[:, t].numpy().copy())
            running = running & ~torch.from_numpy(ended | cut)
            if not bool(running.any()):
                break
        length = next(size for size in (64, 128, 256, HORIZON) if t < size)  # a program for each, traced once
        return Rollout(*(kept[:, :length] for kept in (state, action, alive, log_prob)))


def reinforce() -> Estimator:
    """Reward-to-go less that of the other episodes."""
    return ScoreFunction(baseline=LeaveOneOut(group=0))


def with_critic() -> Estimator:
    """Lambda-returns less a learned value, clipped so that a batch serves for several steps."""
    value = Learned(Value(), inputs=("state", "alive"), target=TDLambda(0.95))
    return ClippedSurrogate(value, behaviour="log_prob")


def train(
    estimator: Estimator, *, episodes: int, passes: int, updates: int, rate: float, seed: int
) -> Iterator[tuple[int, float]]:
    """Steps of the environment so far and the mean return, after every update.

    Where the batch was good enough, the mean return is that of 50 fresh episodes, which are not trained on.
    """
    torch.manual_seed(seed)
    policy, collect = Policy(), Collector(episodes, seed)
    first = collect(policy.net)
    loss = scg.compile(policy, estimator=estimator, example_inputs=astuple(first))
    groups = [{"params": list(loss.model_parameters()), "lr": rate}]
    if learned := list(loss.estimator_parameters()):
        groups.append({"params": learned, "lr": 1e-2})
    optimizer = torch.optim.Adam(groups)
    for _ in range(updates):
        batch = collect(policy.net)
        for _ in range(passes):
            optimizer.zero_grad()
            loss(*astuple(batch)).backward()
            optimizer.step()
        mean = float(batch.lengths.mean())
        yield collect.steps, mean if mean < GOAL else float(Collector(50, 1000 + seed)(policy.net).lengths.mean())


def picture(path: Path) -> None:
    """Which rewards teach which action: each action is taught by the rewards at and after it."""
    path.parent.mkdir(exist_ok=True)
    example = (torch.zeros(8, 3, 4), torch.zeros(8, 3, dtype=torch.int64), torch.ones(8, 3), torch.zeros(8, 3))
    scg.compile(Unrolled(), example_inputs=example).render(path)


SETTINGS = {"REINFORCE": (reinforce, 16, 1, 1e-2), "with a critic": (with_critic, 8, 8, 5e-3)}
"""Name -> (estimator, episodes a batch, passes over it, learning rate)."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--smoke-test", action="store_true")
    args = parser.parse_args()
    picture(Path("out/cartpole.svg"))
    print("wrote out/cartpole.svg: which rewards teach which action")
    for name, (make, episodes, passes, rate) in SETTINGS.items():
        found: list[tuple[float, int, float]] = []
        for seed in range(1 if args.smoke_test else args.seeds):
            start, steps, mean = time.perf_counter(), 0, 0.0
            updates = 2 if args.smoke_test else 1000
            run = train(make(), episodes=episodes, passes=passes, updates=updates, rate=rate, seed=seed)
            for done, average in (bar := tqdm(run, desc=f"{name}, seed {seed}", leave=False)):
                steps, mean = done, average
                bar.set_postfix(mean_return=f"{mean:.0f}")
                if mean > GOAL:
                    break
            found.append((mean, steps, time.perf_counter() - start))
            print(
                f"{name:13} seed {seed}: mean return {mean:5.1f} after {steps:7,} steps, {found[-1][2]:5.1f} s",
                flush=True,
            )
        medians = [statistics.median(column) for column in zip(*found, strict=True)]
        print(f"{name:13} median: mean return {medians[0]:5.1f} after {medians[1]:9,.0f} steps, {medians[2]:5.1f} s")


if __name__ == "__main__":
    main()

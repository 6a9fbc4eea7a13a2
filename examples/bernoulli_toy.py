"""The toy every paper starts with: minimise E[(b - 0.499)^2], b ~ Bernoulli(sigmoid(theta)).

The two outcomes differ by 0.002 in cost, so the gradient is tiny and its noise decides. The table compares estimators
with the exact gradient; then each of them trains.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli
from tqdm import trange

import scg

TARGET = 0.499


class Toy(nn.Module):
    def __init__(self, theta: float = 0.0) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.tensor(theta))

    def forward(self) -> Tensor:
        b = Bernoulli(logits=self.theta).sample()
        return (b - TARGET) ** 2


def estimators() -> dict[str, tuple[object, int]]:
    """Name -> (estimator, samples)."""
    score = scg.ESTIMATORS["score_function"]
    return {
        "score function": (score(baseline=None), 1),
        "score function, moving average": (score(baseline="moving_average"), 1),
        "score function, leave-one-out of 2": (score(baseline="leave_one_out"), 2),
        "score function, leave-one-out of 8": (score(baseline="leave_one_out"), 8),
        "enumerate": ("enumerate", 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--smoke-test", action="store_true")
    args = parser.parse_args()
    steps, n = (20, 50) if args.smoke_test else (args.steps, 2000)

    loss, gradient = scg.exact(Toy())
    print(f"exact: loss {loss:.6f}, gradient {gradient['theta']:.6f}\n")
    print(f"{'estimator':36}{'mean':>12}{'variance':>12}")
    for name, (estimator, samples) in estimators().items():
        loss_fn = scg.compile(Toy(), estimator=estimator, samples=samples)
        for _ in range(30):  # a moving average is as good as its history
            loss_fn()
        draws = scg.gradient_samples(loss_fn, n=n)["theta"]
        print(f"{name:36}{draws.mean():12.6f}{draws.var():12.2e}")

    print(f"\nP(b = 1) after {steps} steps of Adam from 0.5; the optimum is 0.")
    for name, (estimator, samples) in estimators().items():
        torch.manual_seed(0)
        toy = Toy()
        loss_fn = scg.compile(toy, estimator=estimator, samples=samples)
        optimizer = torch.optim.Adam(loss_fn.parameters(), lr=0.01)
        for _ in trange(steps, desc=f"{name:36}", leave=False):
            optimizer.zero_grad()
            loss_fn().backward()
            optimizer.step()
        print(f"{name:36}{toy.theta.sigmoid():.3f}")


if __name__ == "__main__":
    main()

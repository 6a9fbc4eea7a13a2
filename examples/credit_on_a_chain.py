"""What each step of credit assignment is worth: the variance of the gradient on a chain of 20 coins with a cost each.

From the total cost to the cost-to-go, to a value function taken from it, to a critic that sees the outcome as well;
the learned parts read the sufficient context that the compiler finds, the coin before.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli
from tqdm import trange

import scg
from scg.estimators.critic import Critic
from scg.estimators.score_function import ScoreFunction


class Chain(nn.Module):
    def __init__(self, steps: int) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.linspace(-0.5, 0.5, steps))

    def forward(self) -> Tensor:
        z, total = torch.zeros(()), torch.zeros(())
        for t, logit in enumerate(self.logits):
            z = scg.sample(Bernoulli(logits=logit + 2 * z - 1), f"z_{t}")
            total = total + scg.cost((z - 0.3) ** 2, f"cost_{t}")
        return total


def variance(estimator: Any, credit: str, *, steps: int, training: int, n: int) -> float:
    """Of the gradient, summed over parameters, once the learned parts are trained."""
    torch.manual_seed(0)
    loss = scg.compile(Chain(steps), estimator=estimator, credit=credit, example_inputs=())
    if learned := list(loss.estimator_parameters()):
        optimizer = torch.optim.Adam(learned, lr=1e-2)
        for _ in trange(training, desc="training", leave=False):
            optimizer.zero_grad()
            loss().backward()
            optimizer.step()
    return float(scg.gradient_samples(loss, n=n)["logits"].var(0).sum())


def bars(values: dict[str, float], path: Path) -> None:
    """A bar for each on a logarithmic axis, as SVG."""
    low = min(values.values()) / 2
    scale = 300 / math.log(max(values.values()) / low)
    rows = []
    for i, (name, value) in enumerate(values.items()):
        y, width = 30 * i + 30, scale * math.log(value / low)
        rows.append(f'<text x="190" y="{y + 14}" text-anchor="end">{name}</text>')
        rows.append(f'<rect x="200" y="{y}" width="{width:.0f}" height="20" fill="#1b6ca8"/>')
        rows.append(f'<text x="{205 + width:.0f}" y="{y + 14}">{value:.3g}</text>')
    title = '<text x="0" y="14">variance of the gradient, logarithmic</text>'
    style = 'font-family="sans-serif" font-size="12" fill="#777"'
    size = f'width="560" height="{30 * len(values) + 40}"'
    path.write_text(f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}>{title}{"".join(rows)}</svg>\n')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--smoke-test", action="store_true")
    args = parser.parse_args()
    steps, training, n = (4, 3, 10) if args.smoke_test else (args.steps, 400, 1000)
    plain = ScoreFunction(baseline=None)
    settings: dict[str, tuple[Any, str]] = {
        "total cost": (plain, "none"),
        "cost-to-go": (plain, "element"),
        "less a value function": (ScoreFunction(baseline="learned"), "element"),
        "with a critic": (Critic(), "element"),
    }
    found = {}
    for name, (estimator, credit) in settings.items():
        found[name] = variance(estimator, credit, steps=steps, training=training, n=n)
        print(f"{name:24}{found[name]:10.3g}", flush=True)
    folder = Path("out")
    folder.mkdir(exist_ok=True)
    bars(found, folder / "credit_on_a_chain.svg")


if __name__ == "__main__":
    main()

"""Light cones: a noisy Game of Life whose first board is learned, so that few cells are alive after T steps.

Nothing in the model says that a cell can influence only its neighbourhood: the compiler finds it from the convolutions.
Each cell of the first board is credited with the (2T + 1)^2 cells of the last one that it can reach, and no others.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Bernoulli
from tqdm import trange

import scg
from scg.estimators.score_function import ScoreFunction

NEIGHBOURS = torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, 1.0], [1.0, 1.0, 1.0]])[None, None]


class Life(nn.Module):
    """The number of live cells after ``steps`` of Conway's rules, each cell's outcome flipped with a small chance."""

    kernel: Tensor

    def __init__(self, size: int, steps: int, flip: float = 0.02) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.full((size, size), -0.5))
        self.steps, self.flip = steps, flip
        self.register_buffer("kernel", NEIGHBOURS.clone())

    def forward(self) -> Tensor:
        cells = scg.sample(Bernoulli(logits=self.logits), "first")
        for t in range(self.steps):
            around = F.conv2d(cells[None, None], self.kernel, padding=1)[0, 0]
            ruled = ((around == 3) | ((cells == 1) & (around == 2))).float()
            cells = scg.sample(Bernoulli(probs=self.flip + (1 - 2 * self.flip) * ruled), f"step_{t + 1}")
        return scg.cost(cells, "alive").sum()


def variance(size: int, steps: int, credit: str, baseline: str, n: int) -> float:
    """Of the gradient, summed over the cells of the first board."""
    torch.manual_seed(0)
    loss = scg.compile(Life(size, steps), estimator=ScoreFunction(baseline=baseline), credit=credit)
    for _ in range(100):  # a moving average is as good as its history
        loss()
    return float(scg.gradient_samples(loss, n=n)["logits"].var(0).sum())


def light_cone(loss: scg.CompiledModule, size: int) -> Tensor:
    """How many cells of the last board each cell of the first is credited with, read off the credit edges."""
    credited = torch.zeros(size, size, dtype=torch.int64)
    for (site, cost), edge in loss.graph.credit.items():
        if site == "first":
            shape = loss.graph[cost].tensor.shape
            (top, left), (bottom, right) = ([bound.expand(shape) for bound in ends] for ends in (edge.lo, edge.hi))
            for i in range(size):
                for j in range(size):
                    credited[i, j] += ((top <= i) & (i <= bottom) & (left <= j) & (j <= right)).sum()
    return credited


def board(values: Tensor, path: Path, title: str) -> None:
    """A heat map as SVG."""
    cell, (rows, columns) = 12, values.shape
    scaled = (values - values.min()) / (values.max() - values.min()).clamp(min=1e-9)
    squares = "".join(
        f'<rect x="{j * cell}" y="{i * cell + 20}" width="{cell - 1}" height="{cell - 1}" '
        f'fill="#1b6ca8" fill-opacity="{0.05 + 0.95 * float(scaled[i, j]):.2f}"/>'
        for i in range(rows)
        for j in range(columns)
    )
    text = f'<text x="0" y="13" font-family="sans-serif" font-size="12" fill="#777">{title}</text>'
    size = f'width="{columns * cell}" height="{rows * cell + 20}"'
    path.write_text(f'<svg xmlns="http://www.w3.org/2000/svg" {size}>{text}{squares}</svg>')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=25)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--smoke-test", action="store_true")
    args = parser.parse_args()
    size, n, updates = (9, 20, 3) if args.smoke_test else (args.size, 1000, 600)
    folder = Path("out")
    folder.mkdir(exist_ok=True)

    model = Life(size, args.steps)
    loss = scg.compile(model, estimator="score_function", example_inputs=())
    loss.render(folder / "life.svg")
    reach = light_cone(loss, size)
    print(f"a cell in the middle is credited with {reach[size // 2, size // 2]} of {size * size} cells\n")

    print(f"variance of the gradient, {size}x{size} cells, {args.steps} steps")
    print(f"{'baseline':16}{'global cost':>14}{'light cones':>14}{'ratio':>9}")
    for baseline in ("none", "moving_average"):
        whole, cones = (variance(size, args.steps, credit, baseline, n) for credit in ("none", "element"))
        print(f"{baseline:16}{whole:14.3g}{cones:14.3g}{whole / cones:9.1f}")

    optimizer = torch.optim.Adam(loss.parameters(), lr=0.05)
    for _ in (bar := trange(updates, desc="training", leave=False)):
        optimizer.zero_grad()
        alive = loss()
        alive.backward()
        optimizer.step()
        bar.set_postfix(alive=f"{float(alive.detach()):.0f}")
    with torch.no_grad():
        after = torch.stack([model() for _ in range(10)]).mean()
        before = torch.stack([Life(size, args.steps)() for _ in range(10)]).mean()
    print(f"\nlive cells at the end: {before:.0f} before training, {after:.0f} after")
    board(torch.sigmoid(model.logits.detach()), folder / "life_board.svg", "the first board: chance of life")


if __name__ == "__main__":
    main()

"""Trains a discrete VAE on handwritten digits with every estimator, changing one string.

    python -m benchmarks.digits [--smoke-test] [--steps 1500] [--seeds 2] [--only disarm …]

8 bits in between, or 4 categories four times for estimators of categoricals alone: 256 codes, so that every ELBO and
log-likelihood is exact. Writes docs/estimators-on-digits.md.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Bernoulli, Categorical

import scg
from benchmarks.measure import machine
from scg.estimators.gumbel_softmax import GumbelSoftmax
from scg.estimators.score_function import ScoreFunction

BATCH, LEARNING_RATE = 100, 3e-3
PAGE = Path(__file__).parent.parent / "docs" / "estimators-on-digits.md"


class BitVAE(nn.Module):
    """64 pixels, 8 bits in between, 64 pixels."""

    def __init__(self, pixels: int = 64, hidden: int = 64, bits: int = 8) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(pixels, hidden), nn.Tanh(), nn.Linear(hidden, bits))
        self.decoder = nn.Sequential(nn.Linear(bits, hidden), nn.Tanh(), nn.Linear(hidden, pixels))
        self.prior = bits * torch.log(torch.tensor(2.0)).item()

    def posterior(self, x: Tensor) -> Any:
        return Bernoulli(logits=self.encoder(x))

    def decode(self, z: Tensor) -> Tensor:
        """Logits of the pixels."""
        logits: Tensor = self.decoder(z)
        return logits

    def codes(self) -> Tensor:
        """Every code.  ``[256, 8]``"""
        return torch.tensor(list(itertools.product([0.0, 1.0], repeat=8)))

    def forward(self, x: Tensor) -> Tensor:
        q = self.posterior(x)
        z = q.sample()
        nll = F.binary_cross_entropy_with_logits(self.decode(z), x, reduction="none").sum(-1)
        return (nll + q.log_prob(z).sum(-1)).mean() + self.prior


class CategoryVAE(BitVAE):
    """The same with four draws of one category in four, looked up in the decoder's first layer."""

    def __init__(self, pixels: int = 64, hidden: int = 64) -> None:
        super().__init__(pixels, hidden, 16)
        self.prior /= 2
        self.first = nn.Parameter(torch.randn(4, 4, hidden) / 4)
        self.decoder = nn.Sequential(nn.Tanh(), nn.Linear(hidden, pixels))

    def posterior(self, x: Tensor) -> Any:
        return Categorical(logits=self.encoder(x).unflatten(-1, (4, 4)))

    def decode(self, z: Tensor) -> Tensor:
        logits: Tensor = self.decoder(self.first[torch.arange(4), z].sum(-2))
        return logits

    def codes(self) -> Tensor:
        return torch.tensor(list(itertools.product(range(4), repeat=4)))


@torch.no_grad()
def exact(model: BitVAE, x: Tensor) -> tuple[float, float]:
    """ELBO and log-likelihood, a mean over the images, summed over all codes."""
    codes = model.codes()
    logits = model.decode(codes)  # [S, pixels]
    log_x = x @ logits.T - F.softplus(logits).sum(-1)  # [N, S]
    q = model.posterior(x)
    log_q = torch.stack([q.log_prob(code.expand(x.shape[0], -1)).sum(-1) for code in codes], -1)  # [N, S]
    joint = log_x - model.prior
    return float((log_q.exp() * (joint - log_q)).sum(-1).mean()), float(joint.logsumexp(-1).mean())


@dataclass(frozen=True)
class Run:
    """One line of the table: what to ask for."""

    label: str
    estimator: Any
    draws: int = 1
    model: type[BitVAE] = BitVAE
    reference: tuple[float, float, float] | None = None
    """Train ELBO, test ELBO and test log-likelihood to be held to, mean of two seeds."""


def runs() -> Iterator[Run]:
    """Every estimator that supports the bits, then those of categoricals alone beside two that all can be held to."""
    yield Run("`enumerate`", "enumerate", 1, BitVAE, (-18.00, -18.76, -18.26))
    yield Run("`score_function`, leave-one-out, 4 draws", "score_function", 4, BitVAE, (-18.45, -19.14, -18.48))
    yield Run("`score_function`, leave-one-out, 2 draws", "score_function", 2, BitVAE, (-18.71, -19.33, -18.77))
    yield Run(
        "`score_function`, moving average",
        ScoreFunction(baseline="moving_average"),
        1,
        BitVAE,
        (-19.90, -20.22, -19.56),
    )
    yield Run("`score_function`, no baseline", ScoreFunction(baseline=None), 1, BitVAE, (-23.01, -22.91, -21.69))
    yield Run(
        "`gumbel_softmax`, straight through",
        GumbelSoftmax(temperature=0.5, straight_through=True),
        1,
        BitVAE,
        (-20.37, -20.58, -19.60),
    )
    known = {
        "disarm": (-18.70, -19.27, -18.74),
        "arm": (-18.84, -19.35, -18.75),
        "straight_through": (-21.13, -21.13, -19.86),
    }
    rest = [name for name in scg.ESTIMATORS if name not in ("enumerate", "score_function")]
    for name in rest:
        if _fits(name, BitVAE):
            yield Run(f"`{name}`", name, _draws(name), BitVAE, known.get(name))
    yield Run("`score_function`, leave-one-out, 2 draws, categories", "score_function", 2, CategoryVAE)
    yield Run("`reinmax`, categories", "reinmax", 1, CategoryVAE)
    for name in rest:
        if not _fits(name, BitVAE) and _fits(name, CategoryVAE):
            yield Run(f"`{name}`, categories", name, _draws(name), CategoryVAE)


def _compiles(name: str, model: type[BitVAE], draws: int) -> str | None:
    try:
        scg.compile(model(), estimator=name, samples=draws, example_inputs=(torch.zeros(2, 64),))
    except scg.EstimatorError as error:
        return str(error)
    return None


def _draws(name: str) -> int:
    """Two for estimators that compare draws."""
    return next(draws for draws in (1, 2) for model in (BitVAE, CategoryVAE) if _compiles(name, model, draws) is None)


def _fits(name: str, model: type[BitVAE]) -> bool:
    return any(_compiles(name, model, draws) is None for draws in (1, 2))


@dataclass(frozen=True)
class Result:
    """What one run came to."""

    train: float
    test: float
    likelihood: float
    milliseconds: float


def train(run: Run, images: Tensor, test: Tensor, steps: int, seed: int) -> tuple[Result, BitVAE]:
    """One training from scratch."""
    torch.manual_seed(seed)
    model = run.model()
    compiled = scg.compile(model, estimator=run.estimator, samples=run.draws, example_inputs=(images[:BATCH],))
    optimizer = torch.optim.Adam(compiled.parameters(), lr=LEARNING_RATE)
    times = []
    for step in range(steps):
        at = step % (len(images) // BATCH)
        if at == 0:
            order = torch.randperm(len(images))
        batch = images[order[at * BATCH : (at + 1) * BATCH]]
        start = time.process_time()
        optimizer.zero_grad()
        compiled(batch).backward()
        optimizer.step()
        times.append(time.process_time() - start)
    bound, likelihood = exact(model, test)
    return Result(exact(model, images)[0], bound, likelihood, 1e3 * statistics.median(times)), model


def variance(run: Run, weights: dict[str, Tensor], batch: Tensor, n: int) -> float:
    """Total variance of the encoder's gradient at one model, the same for all estimators."""
    model = run.model()
    model.load_state_dict(weights)
    compiled = scg.compile(model, estimator=run.estimator, samples=run.draws, example_inputs=(batch,))
    found = scg.gradient_samples(compiled, batch, n=n)
    return sum(float(g.var(0).sum()) for name, g in found.items() if "encoder" in name)


HEAD = """# A discrete VAE on digits, with every estimator

Written by `python -m benchmarks.digits`: one model, one string changed. scikit-learn's 8x8 digits, binary; 64-64-8
encoder, 8 bits drawn, 8-64-64 decoder; batches of {batch}, Adam {rate}, {steps} steps. ELBO and log-likelihood are
exact: sums over all 256 codes, a mean over the seeds. The gradient variance is the encoder's, summed over its
parameters, at one model for all: that of the first line after training. Milliseconds are of the processor, median.

"Reference" is the train ELBO, test ELBO and log-likelihood that this project is held to: the same networks and
settings, two seeds, a split into training and test images that is not recorded. The lines "categories" draw 4
categories of 4 instead, 256 codes as well: for estimators that need a categorical. Estimators added after the date are
not in it.

{date}; {machine}; other programs ran beside it.

| estimator | draws | seeds | train ELBO | test ELBO | test log-likelihood | reference | gradient variance | ms a step |
|---|---|---|---|---|---|---|---|---|
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--seeds", type=int, default=2, help="of runs that are compared; the others take one")
    parser.add_argument("--only", nargs="+", help="estimators by name")
    parser.add_argument("--smoke-test", action="store_true", help="three steps")
    parser.add_argument("--out", type=Path, default=PAGE)
    args = parser.parse_args()
    steps, seeds, n = (3, 1, 2) if args.smoke_test else (args.steps, args.seeds, 200)
    torch.set_num_threads(1)
    from examples.discrete_vae import digits

    images, test = digits()
    words = {"batch": BATCH, "rate": LEARNING_RATE, "steps": steps}
    text = HEAD.format(**words, date=datetime.date.today().isoformat(), machine=machine())
    print(text, end="", flush=True)
    at: dict[type[BitVAE], dict[str, Tensor]] = {}
    for run in runs():
        name = run.estimator if isinstance(run.estimator, str) else run.estimator.name
        if args.only and name not in args.only:
            continue
        compared = run.reference is not None and run.estimator != "enumerate"  # which takes a minute
        done = [train(run, images, test, steps, seed) for seed in range(seeds if compared else 1)]
        weights = at.setdefault(run.model, done[0][1].state_dict())
        spread = variance(run, weights, images[:BATCH], n)
        mean = [statistics.mean(getattr(result, key) for result, _ in done) for key in ("train", "test", "likelihood")]
        fastest = min(result.milliseconds for result, _ in done)
        known = " / ".join(f"{value:.2f}" for value in run.reference) if run.reference else ""
        numbers = " | ".join(f"{value:.2f}" for value in mean)
        text += f"| {run.label} | {run.draws} | {len(done)} | {numbers} | {known} | {spread:.2g} | {fastest:.1f} |\n"
        print(text.splitlines()[-1], flush=True)
        args.out.write_text(text)


if __name__ == "__main__":
    main()

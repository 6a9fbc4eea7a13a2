"""Mohamed et al. 2020, section 9: Bayesian logistic regression of tumours, pathwise against the score function.

569 tumours of 30 features, standardised, and a constant; posterior N(mu, diag sigma^2), prior N(0, 1), the divergence
in closed form. Batches of 32, ten draws, Adam at 0.01, 2000 steps, three seeds.
"Theirs" is what a hand-written program of fifty draws came to.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

import scg
from benchmarks.papers.setting import Figure
from scg.estimators import ESTIMATORS

BATCH, DRAWS = 32, 10


class Regression(nn.Module):
    def __init__(self, features: int, examples: int) -> None:
        super().__init__()
        self.examples = examples
        self.mu, self.log_sigma = nn.Parameter(torch.zeros(features)), nn.Parameter(torch.zeros(features))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """The negative bound of all data, from a batch of them."""
        q = Normal(self.mu, self.log_sigma.exp())
        w = q.sample()
        nll = F.binary_cross_entropy_with_logits(x @ w, y, reduction="mean") * self.examples
        prior = Normal(torch.zeros_like(self.mu), torch.ones_like(self.mu))
        return nll + kl_divergence(q, prior).sum()


def tumours() -> tuple[Tensor, Tensor]:
    """Features with a constant behind them ``[569, 31]``, and which are benign ``[569]``."""
    from sklearn.datasets import load_breast_cancer

    data = load_breast_cancer()
    x = torch.tensor(data.data, dtype=torch.float32)
    x = (x - x.mean(0)) / x.std(0, correction=0)
    return torch.cat([x, torch.ones(len(x), 1)], 1), torch.tensor(data.target, dtype=torch.float32)


def bound(model: Regression, x: Tensor, y: Tensor, n: int = 1000) -> float:
    """Of all the data, by ``n`` draws."""
    with torch.no_grad():
        w = Normal(model.mu, model.log_sigma.exp()).sample((n,))
        nll = F.binary_cross_entropy_with_logits(w @ x.T, y.expand(n, -1), reduction="none").sum(-1).mean()
        kl = 0.5 * (model.mu**2 + (2 * model.log_sigma).exp() - 1 - 2 * model.log_sigma).sum()
    return -float(nll + kl)


def trained(estimator: object, x: Tensor, y: Tensor, steps: int, seed: int) -> Regression:
    torch.manual_seed(seed)
    model = Regression(x.shape[1], len(x))
    loss_fn = scg.compile(model, estimator=estimator, samples=DRAWS, example_inputs=(x[:BATCH], y[:BATCH]))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(steps):
        rows = torch.randint(len(x), (BATCH,))
        optimizer.zero_grad()
        loss_fn(x[rows], y[rows]).backward()
        optimizer.step()
    return model


def variance(estimator: object, x: Tensor, y: Tensor, n: int, draws: int = 1) -> float:
    """Of one draw at the start, all data, the mean over the coordinates of mu."""
    loss_fn = scg.compile(Regression(x.shape[1], len(x)), estimator=estimator, samples=draws, example_inputs=(x, y))
    return draws * float(scg.gradient_samples(loss_fn, x, y, n=n)["mu"].var(0).mean())


def run(quick: bool = False) -> Iterator[Figure]:
    x, y = tumours()
    steps, n, seeds = (3, 4, 1) if quick else (2000, 3000, 3)
    plain, baseline = (ESTIMATORS["score_function"](baseline=kind) for kind in (None, "leave_one_out"))
    pathwise = variance("reparam", x, y, n)
    compared = variance(baseline, x, y, n, DRAWS)
    alone = variance(plain, x, y, n)
    yield Figure("variance at the start, pathwise", 9.0e3, pathwise, quick or pathwise < compared / 10)
    yield Figure("likewise, score function with the mean of other draws", 8.4e5, compared, quick or compared < alone)
    yield Figure("likewise, score function alone", 2.5e6, alone, True)
    for name, estimator, theirs in (("pathwise", "reparam", -67.1), ("score function, leave-one-out", baseline, -67.3)):
        found = statistics.mean(bound(trained(estimator, x, y, steps, seed), x, y) for seed in range(seeds))
        yield Figure(f"bound after {steps} steps, mean of {seeds} seeds, {name}", theirs, found, quick or found > -75)

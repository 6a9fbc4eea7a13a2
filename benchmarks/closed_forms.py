"""Variance of the gradient with and without a closed-form divergence, from the start of training to its end.

Two models of handwritten digits with a Normal latent; the user of each wrote ``q.log_prob(z) - p.log_prob(z)``. The
second one's posterior is in the family of q, so that near the optimum the sampled bound hardly varies.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.distributions import Bernoulli, Normal

import scg
from scg.estimators import ESTIMATORS


class VAE(nn.Module):
    """Kingma and Welling 2014, its bound spelled with log densities."""

    def __init__(self, pixels: int = 64, hidden: int = 64, latents: int = 4) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(pixels, hidden), nn.Tanh(), nn.Linear(hidden, 2 * latents))
        self.decoder = nn.Sequential(nn.Linear(latents, hidden), nn.Tanh(), nn.Linear(hidden, pixels))

    def forward(self, x: Tensor) -> Tensor:
        mean, log_scale = self.encoder(x).chunk(2, -1)
        q, p = Normal(mean, log_scale.exp()), Normal(0.0, 1.0)
        z = q.sample()
        nll = -Bernoulli(logits=self.decoder(z)).log_prob((x > 0).float()).sum(-1)
        kl = (q.log_prob(z) - p.log_prob(z)).sum(-1)
        return (nll + kl).mean()


class LinearVAE(nn.Module):
    """Probabilistic principal components (Tipping and Bishop 1999): all Normal, all linear.

    Two linear layers in the decoder: through one, the whole bound would be in closed form, a quadratic form.
    """

    def __init__(self, pixels: int = 64, latents: int = 4) -> None:
        super().__init__()
        self.encoder = nn.Linear(pixels, latents)
        self.decoder = nn.Sequential(nn.Linear(latents, latents), nn.Linear(latents, pixels))
        self.log_scale = nn.Parameter(torch.zeros(latents))
        self.decoder_log_noise = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        q, p = Normal(self.encoder(x), self.log_scale.exp().expand(x.shape[0], -1)), Normal(0.0, 1.0)
        z = q.sample()
        nll = -Normal(self.decoder(z), self.decoder_log_noise.exp()).log_prob(x).sum(-1)
        kl = (q.log_prob(z) - p.log_prob(z)).sum(-1)
        return (nll + kl).mean()


@dataclass(frozen=True)
class Way:
    """How the gradient is estimated."""

    name: str
    estimator: object
    samples: int


WAYS = (
    Way("reparam", ESTIMATORS["reparam"](), 1),
    Way("score_function, leave-one-out over 4", "score_function", 4),
)
PATH = Way("reparam, path derivative", ESTIMATORS["reparam"](path_derivative=True), 1)


def estimates(model: nn.Module, x: Tensor, way: Way, n: int, closed: bool) -> Tensor:
    """Independent gradients of what q is made from, ``[n, P]``: with one seed, so that pairs see the same draws."""
    compiled = scg.compile(model, estimator=way.estimator, samples=way.samples, closed_forms=closed)
    compiled(x)
    found = scg.gradient_samples(compiled, x, n=n)
    return torch.cat([g.reshape(n, -1).double() for name, g in found.items() if not name.startswith("decoder")], 1)


def apart(sampled: Tensor, closed: Tensor) -> float:
    """Distance of the means in standard errors of their paired difference: about 1 where the expectations are equal."""
    gap = sampled - closed
    return math.sqrt(float(gap.mean(0).square().sum() / (gap.var(0).sum() / len(gap))))


def rows(make: Callable[[], nn.Module], x: Tensor, n: int, steps: int) -> Iterator[str]:
    """The table's lines for one model: at the start, after a tenth of the steps, at the end."""
    torch.manual_seed(0)
    model = make()
    train = scg.compile(model, closed_forms=True)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    batch = x[:100]
    done = 0
    for stop in (0, steps // 10, steps):
        for step in range(done, stop):
            for group in optimizer.param_groups:
                group["lr"] = 3e-3 * (1 - step / steps)
            optimizer.zero_grad()
            train(x[torch.randint(len(x), (100,))]).backward()
            optimizer.step()
        done = stop
        for way in WAYS:
            sampled, closed = (estimates(model, batch, way, n, on) for on in (False, True))
            before, after = (float(g.var(0).sum()) for g in (sampled, closed))
            yield (
                f"| {make.__name__} | {stop} | {way.name} | {before:.3g} | {after:.3g} | {after / before:.2f} | "
                f"{apart(sampled, closed):.2f} |"
            )
        path = float(estimates(model, batch, PATH, n, False).var(0).sum())
        yield f"| {make.__name__} | {stop} | {PATH.name} | {path:.3g} | — | — | — |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    n, steps = (50, 20) if args.quick else (400, 4000)
    torch.set_num_threads(1)
    digits = torch.from_numpy(load_digits().data).float()
    x = (digits - digits.mean()) / digits.std()
    print("| model | steps | estimator | sampled | closed form | ratio | means apart, in standard errors |")
    print("|---|---|---|---|---|---|---|")
    for make in (VAE, LinearVAE):
        for row in rows(make, x, n, steps):
            print(row, flush=True)


if __name__ == "__main__":
    main()

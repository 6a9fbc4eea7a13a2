"""The VAE of Kingma and Welling on handwritten digits.

`scg.compile` sees that the path from z to every cost is differentiable and draws z by `rsample`, although the model
asks for a plain `sample`.
"""

from __future__ import annotations

import argparse

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.distributions import Bernoulli, Normal, kl_divergence
from tqdm import trange

import scg


class NormalVAE(nn.Module):
    def __init__(self, pixels: int = 64, hidden: int = 128, latents: int = 6) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(pixels, hidden), nn.Tanh(), nn.Linear(hidden, 2 * latents))
        self.decoder = nn.Sequential(nn.Linear(latents, hidden), nn.Tanh(), nn.Linear(hidden, pixels))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_scale = self.encoder(x).chunk(2, -1)
        q = Normal(mean, log_scale.exp())
        z = q.sample()
        logits = self.decoder(z)
        nll = -Bernoulli(logits=logits).log_prob(x).sum(-1)
        kl = kl_divergence(q, Normal(torch.zeros_like(mean), torch.ones_like(mean))).sum(-1)
        return (nll + kl).mean(), logits.sigmoid()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--smoke-test", action="store_true")
    args = parser.parse_args()
    epochs = 1 if args.smoke_test else args.epochs

    torch.manual_seed(0)
    images = torch.from_numpy(load_digits().data >= 8).float()
    train, test = images[torch.randperm(len(images))].split([1400, len(images) - 1400])
    loss_fn = scg.compile(NormalVAE(), example_inputs=(train[:100],))
    print(loss_fn.explain())

    optimizer = torch.optim.Adam(loss_fn.parameters(), lr=3e-3)
    progress = trange(epochs, unit="epoch")
    for _ in progress:
        total = 0.0
        for batch in train[torch.randperm(len(train))].split(100):
            loss, _ = loss_fn(batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item() * len(batch)
        progress.set_postfix_str(f"ELBO {-total / len(train):.2f}")

    with torch.no_grad():
        loss, reconstruction = loss_fn(test)
    wrong = ((reconstruction > 0.5).float() != test).float().mean()
    print(f"test ELBO {-loss:.2f} nats, {100 * wrong:.1f} % of the pixels reconstructed wrongly")


if __name__ == "__main__":
    main()

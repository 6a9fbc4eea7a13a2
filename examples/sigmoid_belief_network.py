"""A sigmoid belief network with two layers of binary units, on handwritten digits.

The upper layer's draw is the lower layer's cause, so that its costs are fewer than all costs: scg finds which by
following the graph, element by element. `estimators` picks one estimator a layer.
"""

from __future__ import annotations

import argparse

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.distributions import Bernoulli
from tqdm import trange

import scg


class SigmoidBeliefNetwork(nn.Module):
    """Generates z2 -> z1 -> x; infers x -> z1 -> z2."""

    def __init__(self, pixels: int = 64, lower: int = 32, upper: int = 16) -> None:
        super().__init__()
        self.infer_lower = nn.Linear(pixels, lower)
        self.infer_upper = nn.Linear(lower, upper)
        self.prior = nn.Parameter(torch.zeros(upper))
        self.generate_lower = nn.Linear(upper, lower)
        self.generate_pixels = nn.Linear(lower, pixels)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        q1 = Bernoulli(logits=self.infer_lower(2 * x - 1))
        z1 = q1.sample()
        q2 = Bernoulli(logits=self.infer_upper(2 * z1 - 1))
        z2 = q2.sample()

        nll = -Bernoulli(logits=self.generate_pixels(z1)).log_prob(x).sum(-1)
        lower = (q1.log_prob(z1) - Bernoulli(logits=self.generate_lower(z2)).log_prob(z1)).sum(-1)
        upper = (q2.log_prob(z2) - Bernoulli(logits=self.prior.expand_as(z2)).log_prob(z2)).sum(-1)
        nll, lower, upper = scg.cost(nll, "nll"), scg.cost(lower, "kl_lower"), scg.cost(upper, "kl_upper")
        return {"loss": (nll + lower + upper).mean(), "nll": nll.mean()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--smoke-test", action="store_true")
    args = parser.parse_args()
    epochs = 1 if args.smoke_test else args.epochs

    torch.manual_seed(0)
    images = torch.from_numpy(load_digits().data >= 8).float()
    train, test = images[torch.randperm(len(images))].split([1400, len(images) - 1400])
    network = SigmoidBeliefNetwork()
    with torch.no_grad():  # start from the mean image
        mean = train.mean(0).clamp(0.01, 0.99)
        network.generate_pixels.bias.copy_(mean.log() - (-mean).log1p())
    loss_fn = scg.compile(network, estimators={"z?": "score_function"}, samples=args.samples)

    def bound(x: Tensor, repeats: int = 10) -> float:
        with torch.no_grad():
            return -sum(loss_fn(x)["loss"].item() for _ in range(repeats)) / repeats

    print(f"ELBO before training: {bound(test):.2f} nats")
    optimizer = torch.optim.Adam(loss_fn.parameters(), lr=5e-3)
    progress = trange(epochs, unit="epoch")
    for _ in progress:
        for batch in train[torch.randperm(len(train))].split(100):
            out = loss_fn(batch)
            optimizer.zero_grad()
            out["loss"].backward()
            optimizer.step()
        progress.set_postfix_str(f"ELBO {-out['loss'].item():.2f}")
    print(loss_fn.explain())
    print(f"train ELBO {bound(train):.2f}, test ELBO {bound(test):.2f} nats")


if __name__ == "__main__":
    main()

"""A discrete VAE on handwritten digits: an ordinary PyTorch loss with a Bernoulli sample in it, trained as it stands.

    python examples/discrete_vae.py

Writes a picture of the compiled graph and an HTML report to out/.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.distributions import Bernoulli, kl_divergence
from tqdm import trange

import scg


class DiscreteVAE(nn.Module):
    """64 pixels, 8 bits in between, 64 pixels."""

    def __init__(self, pixels: int = 64, hidden: int = 64, bits: int = 8) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(pixels, hidden), nn.Tanh(), nn.Linear(hidden, bits))
        self.decoder = nn.Sequential(nn.Linear(bits, hidden), nn.Tanh(), nn.Linear(hidden, pixels))

    def forward(self, x: Tensor) -> Tensor:
        q = Bernoulli(logits=self.encoder(x))
        z = q.sample()  # an ordinary sample: no gradient flows through it, scg estimates one
        nll = -Bernoulli(logits=self.decoder(z)).log_prob(x).sum(-1)
        kl = kl_divergence(q, Bernoulli(logits=torch.zeros_like(q.logits))).sum(-1)
        return (scg.cost(nll, "nll") + kl).mean()  # minus the ELBO, already reduced; a name is never needed


def digits() -> tuple[Tensor, Tensor]:
    """Binary 8x8 images, for training and for testing."""
    images = torch.from_numpy(load_digits().data >= 8).float()
    images = images[torch.randperm(len(images), generator=torch.Generator().manual_seed(0))]
    return images[:1400], images[1400:]


def draw(image: Tensor) -> list[str]:
    """Eight lines of text."""
    return ["".join("██" if pixel else "  " for pixel in row) for row in image.reshape(8, 8).tolist()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--epochs", type=int, default=300)
    parser.add_argument("--samples", type=int, default=4, help="draws of the whole program per step")
    parser.add_argument("--estimator", default="score_function")
    parser.add_argument("--out", type=Path, default=Path("out"))
    parser.add_argument("--smoke-test", action="store_true")
    args = parser.parse_args()
    epochs = 2 if args.smoke_test else args.epochs

    torch.manual_seed(0)
    train, test = digits()
    model = DiscreteVAE()
    loss_fn = scg.compile(model, estimator=args.estimator, samples=args.samples, example_inputs=(train[:100],))
    print(loss_fn.explain())

    optimizer = torch.optim.Adam(loss_fn.parameters(), lr=3e-3)
    progress = trange(epochs, unit="epoch")
    for epoch in progress:
        losses = []
        for batch in train[torch.randperm(len(train))].split(100):
            loss = loss_fn(batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        elbo = -sum(losses) / len(losses)
        progress.set_postfix_str(f"ELBO {elbo:.2f}")
        if epoch % max(1, epochs // 8) == 0 or epoch == epochs - 1:
            progress.write(f"epoch {epoch + 1:4d}   train ELBO {elbo:7.2f} nats")

    loss_fn.eval()
    with torch.no_grad():
        test_elbo = -torch.stack([loss_fn(test) for _ in range(25)]).mean()
        codes = torch.bernoulli(torch.full((6, 8), 0.5))
        drawn = [draw(image) for image in model.decoder(codes) > 0]
    print(f"test ELBO {test_elbo:.2f} nats\n\nDecoded from random bits:")
    print("\n".join("   ".join(lines) for lines in zip(*drawn, strict=True)))

    args.out.mkdir(exist_ok=True, parents=True)
    for suffix in ("svg", "html"):
        loss_fn.render(args.out / f"discrete_vae.{suffix}")
    print(f"\nWrote {args.out / 'discrete_vae.svg'} and {args.out / 'discrete_vae.html'}")


if __name__ == "__main__":
    main()

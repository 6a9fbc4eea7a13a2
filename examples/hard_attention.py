"""Hard attention: a classifier that sees a blurred digit, chooses one 4x4 patch to look at, and names the digit.

Which patch is a draw, and the classifier's loss its only feedback: the REINFORCE setting, with `F.cross_entropy`
already averaged over the batch. scg takes the mean apart again, so that each example's loss teaches its own glance.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.distributions import OneHotCategorical
from tqdm import trange

import scg


class HardAttention(nn.Module):
    """3x3 overlapping patches of an 8x8 image."""

    def __init__(self, hidden: int = 64, classes: int = 10) -> None:
        super().__init__()
        self.look = nn.Sequential(nn.Linear(4, hidden), nn.ReLU(), nn.Linear(hidden, 9))
        self.name = nn.Sequential(nn.Linear(4 + 16 + 9, hidden), nn.ReLU(), nn.Linear(hidden, classes))

    def forward(self, image: Tensor, label: Tensor) -> dict[str, Tensor]:
        blurred = F.avg_pool2d(image[:, None], 4).flatten(1)  # [B, 4]
        patches = image.unfold(1, 4, 2).unfold(2, 4, 2).reshape(-1, 9, 16)  # [B, 9, 16]
        where = OneHotCategorical(logits=self.look(blurred)).sample()  # [B | 9]
        seen = torch.einsum("bp,bpf->bf", where, patches)  # [B, 16]
        logits = self.name(torch.cat([blurred, seen, where], -1))
        return {"loss": F.cross_entropy(logits, label), "logits": logits, "where": where}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--estimator", default="score_function", help="or 'enumerate': nine patches are few")
    parser.add_argument("--smoke-test", action="store_true")
    args = parser.parse_args()
    epochs = 1 if args.smoke_test else args.epochs

    torch.manual_seed(0)
    data = load_digits()
    order = torch.randperm(len(data.target))
    images, labels = torch.from_numpy(data.images).float()[order] / 16, torch.from_numpy(data.target)[order]
    test = slice(1400, None)
    model = HardAttention()
    loss_fn = scg.compile(model, estimator=args.estimator, samples=args.samples)

    optimizer = torch.optim.Adam(loss_fn.parameters(), lr=3e-3)
    progress = trange(epochs, unit="epoch")
    for _ in progress:
        for batch in torch.randperm(1400).split(100):
            out = loss_fn(images[batch], labels[batch])
            optimizer.zero_grad()
            out["loss"].backward()
            optimizer.step()
        progress.set_postfix_str(f"loss {out['loss'].item():.3f}")
    print(loss_fn.explain())

    with torch.no_grad():
        out = model(images[test], labels[test])  # the model itself is unchanged, and still an ordinary module
    accuracy = (out["logits"].argmax(-1) == labels[test]).float().mean()
    print(f"test accuracy {100 * accuracy:.1f} %; how often it looks where:")
    for row in out["where"].mean(0).reshape(3, 3).tolist():
        print("   " + " ".join(f"{100 * share:3.0f} %" for share in row))


if __name__ == "__main__":
    main()

"""Liu et al. 2019, section 5.3, small: digits with few labels, the missing ones drawn, summed over, or half and half.

8 by 8 digits, 100 with labels, 1200 without, 497 for testing; q(y | x), q(z | x, y) of five normals, p(x | y, z);
Adam at 0.002, 1500 steps, three seeds. "Theirs" is the accuracy that a hand-written program of about this size came to.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Bernoulli, Normal, OneHotCategorical, kl_divergence

import scg
from benchmarks.papers.setting import Figure
from scg.estimators import ESTIMATORS

CLASSES, LATENTS, HIDDEN, BATCH = 10, 5, 64, 100
LABELLED, UNLABELLED = 100, 1200


def _net(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, outputs))


class SemiSupervised(nn.Module):
    """Kingma et al. 2014, M2."""

    def __init__(self, pixels: int = 64) -> None:
        super().__init__()
        self.classify = _net(pixels, CLASSES)
        self.infer, self.generate = _net(pixels + CLASSES, 2 * LATENTS), _net(LATENTS + CLASSES, pixels)

    def nll(self, x: Tensor, y: Tensor) -> Tensor:
        """The negative bound of images whose class is known, one draw of ``z``.  ``[B]``"""
        loc, raw = self.infer(torch.cat([x, y], -1)).chunk(2, -1)
        q = Normal(loc, F.softplus(raw) + 1e-3)
        z = q.rsample()
        nll = -Bernoulli(logits=self.generate(torch.cat([z, y], -1))).log_prob(x).sum(-1)
        return nll + kl_divergence(q, Normal(torch.zeros_like(loc), torch.ones_like(loc))).sum(-1)

    def forward(self, x: Tensor, known: Tensor, labels: Tensor) -> Tensor:
        """Unlabelled images ``[B, 64]``, labelled ones ``[100, 64]`` and their classes ``[100]``."""
        q = OneHotCategorical(logits=self.classify(x))
        y = q.sample()
        unlabelled = self.nll(x, y) - q.entropy()
        labelled = self.nll(known, F.one_hot(labels, CLASSES).to(x.dtype))
        wrong = F.cross_entropy(self.classify(known), labels)
        share = LABELLED / (LABELLED + UNLABELLED)
        return (1 - share) * unlabelled.mean() + share * labelled.mean() + wrong


def accuracy(estimator: object, samples: int, seed: int, steps: int) -> float:
    """Of the classifier on the test images, after training."""
    from sklearn.datasets import load_digits

    torch.manual_seed(seed)
    data = load_digits()
    order = torch.randperm(len(data.target))
    images, classes = torch.tensor(data.data >= 8).float()[order], torch.tensor(data.target)[order]
    known, labels = images[:LABELLED], classes[:LABELLED]
    unlabelled, test = images[LABELLED : LABELLED + UNLABELLED], slice(LABELLED + UNLABELLED, None)
    model = SemiSupervised()
    loss_fn = scg.compile(model, estimators={"y": estimator}, samples=samples)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        loss_fn(unlabelled[torch.randint(UNLABELLED, (BATCH,))], known, labels).backward()
        optimizer.step()
    with torch.no_grad():
        return float((model.classify(images[test]).argmax(-1) == classes[test]).float().mean())


def run(quick: bool = False) -> Iterator[Figure]:
    steps, seeds = (3, 1) if quick else (1500, 3)
    score = ESTIMATORS["score_function"]
    runs = {
        "exact sum": ("enumerate", 1, 0.869),
        "the most probable class summed, another drawn": (ESTIMATORS["sum_and_sample"](), 1, 0.867),
        "leave-one-out, two draws": (score(baseline="leave_one_out"), 2, 0.865),
        "moving average": (score(baseline="moving_average"), 1, 0.860),
        "REINFORCE": (score(baseline=None), 1, 0.833),
    }
    found = {
        name: statistics.mean(accuracy(estimator, samples, seed, steps) for seed in range(seeds))
        for name, (estimator, samples, _) in runs.items()
    }
    exact, half, *_, plain = found.values()
    holds = dict.fromkeys(found, True) | {
        "the most probable class summed, another drawn": quick or half >= exact - 0.01,
        "REINFORCE": quick or plain <= exact - 0.02,
    }
    for name, (_, _, theirs) in runs.items():
        yield Figure(f"test accuracy, {name}", theirs, found[name], holds[name])

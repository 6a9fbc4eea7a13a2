"""Law 3: how a loss is written does not change the gradient; finest credit is found from a plain mean."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Bernoulli, Independent

import scg
from scg.estimators.score_function import ScoreFunction


def _gradient(
    model: Callable[..., Tensor], params: list[nn.Parameter], *args: Tensor, samples: int = 1
) -> list[Tensor]:
    baseline = "leave_one_out" if samples > 1 else None
    compiled = scg.compile(model, estimator=ScoreFunction(baseline=baseline), samples=samples)
    compiled(*args)
    torch.manual_seed(3)
    return list(torch.autograd.grad(compiled(*args), params))


TARGET = torch.linspace(-1, 1, 20)


def _by_hand(w: nn.Parameter, samples: int) -> Tensor:
    """Each of 20 independent latents taught by its own cost alone."""
    torch.manual_seed(3)
    p = torch.sigmoid(w)
    z = torch.bernoulli(p.detach().expand(samples, 20) if samples > 1 else p.detach())
    cost = (z - TARGET) ** 2
    if samples > 1:
        cost = (cost - cost.mean(0)) * samples / (samples - 1)
    log_p = -F.binary_cross_entropy_with_logits(w.expand_as(z), z, reduction="none")
    return torch.autograd.grad((cost.detach() * log_p).sum() / 20 / samples, w)[0]


@pytest.mark.parametrize("samples", [1, 4])
@pytest.mark.parametrize("style", ["mean", "independent", "stack", "loop", "dot"])
def test_twenty_latents_are_credited_as_by_hand(style: str, samples: int) -> None:
    w = nn.Parameter(torch.linspace(-2, 2, 20))

    def mean() -> Tensor:
        z = Bernoulli(logits=w).sample()
        return ((z - TARGET) ** 2).mean()

    def independent() -> Tensor:
        z = Independent(Bernoulli(logits=w), 1).sample()
        return ((z - TARGET) ** 2).mean()

    def stack() -> Tensor:
        z = Bernoulli(logits=w).sample()
        return torch.stack([(z[i] - TARGET[i]) ** 2 for i in range(20)]).mean()

    def loop() -> Tensor:
        cost = (Bernoulli(logits=w).sample() - TARGET) ** 2
        total = torch.zeros(())
        for i in range(20):
            total = total + cost[i] / 20
        return total

    def dot() -> Tensor:
        z = Bernoulli(logits=w).sample()
        return torch.dot((z - TARGET) ** 2, torch.full((20,), 1 / 20))

    model = {"mean": mean, "independent": independent, "stack": stack, "loop": loop, "dot": dot}[style]
    (got,) = _gradient(model, [w], samples=samples)
    torch.testing.assert_close(got, _by_hand(w, samples), rtol=1e-6, atol=1e-6)


def test_total_variance_is_that_of_element_credit() -> None:
    w = nn.Parameter(torch.linspace(-2, 2, 20))

    def model() -> Tensor:
        z = Bernoulli(logits=w).sample()
        return ((z - TARGET) ** 2).mean()

    variance = {}
    for credit in ("element", "none"):
        compiled = scg.compile(model, estimator=ScoreFunction(baseline=None), credit=credit)
        variance[credit] = float(scg.gradient_samples(compiled, n=300)["w"].var(0).sum())
    assert variance["element"] < variance["none"] / 50, variance


class VAE(nn.Module):
    """784-200-784, its loss written in one of several ways."""

    def __init__(self, style: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.enc, self.dec, self.style = nn.Linear(784, 200), nn.Linear(200, 784), style

    def forward(self, x: Tensor) -> Tensor:
        q = Bernoulli(logits=self.enc(x))
        z = q.sample()
        logits = self.dec(z)
        kl = (q.log_prob(z) - Bernoulli(probs=torch.full_like(z, 0.5)).log_prob(z)).sum(-1)
        if self.style == "fused":
            nll = F.binary_cross_entropy_with_logits(logits, x, reduction="sum")
            return (nll + kl.sum()) / len(x)
        loss = kl - Bernoulli(logits=logits).log_prob(x).sum(-1)
        if self.style == "cost":
            return scg.cost(loss, "elbo").mean()
        if self.style == "loop":
            return sum((loss[i] for i in range(len(x))), torch.zeros(())) / len(x)
        return loss.mean()


def test_a_vae_has_one_gradient_however_it_is_written() -> None:
    x = (torch.rand(50, 784, generator=torch.Generator().manual_seed(1)) > 0.5).float()
    want: list[Tensor] | None = None
    for style in ("mean", "cost", "loop", "fused"):
        model = VAE(style)
        got = _gradient(model, list(model.parameters()), x, samples=2)
        want = want or got
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_a_named_cost_keeps_the_users_sign() -> None:
    w = nn.Parameter(torch.zeros(3))

    def model() -> Tensor:
        z = Bernoulli(logits=w).sample()
        return scg.cost(-(z * TARGET[:3]).cos(), "reward").mean()

    graph = scg.compile(model, example_inputs=()).graph
    cost = graph.costs["reward"]
    assert str(graph[cost.value]).startswith("%neg")

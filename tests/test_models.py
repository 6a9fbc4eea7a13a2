"""Ordinary models: with every site reparameterized, the compiled gradient is that of plain PyTorch, draw by draw."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributions as D
import torch.nn.functional as F
from torch import Tensor, nn

import scg

X = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))


class NormalVAE(nn.Module):
    def __init__(self, style: str) -> None:
        super().__init__()
        self.style = style
        self.enc = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.BatchNorm1d(16), nn.Dropout(0.2))
        self.mean, self.scale = nn.Linear(16, 3), nn.Linear(16, 3)
        self.dec = nn.Sequential(nn.Linear(3, 16), nn.ReLU(), nn.Linear(16, 8))

    def forward(self, x: Tensor) -> Tensor:
        h = self.enc(x)
        q: Any = D.Normal(self.mean(h), F.softplus(self.scale(h)) + 1e-3)
        p: Any = D.Normal(torch.zeros_like(q.loc), 1.0)
        if self.style == "independent":
            q, p = D.Independent(q, 1), D.Independent(p, 1)
        z = q.rsample()
        if self.style == "closed":
            kl = D.kl_divergence(q, p).sum(-1)
        else:
            kl = (q.log_prob(z) - p.log_prob(z)).reshape(len(x), -1).sum(-1)
        return (F.mse_loss(self.dec(z), x, reduction="none").sum(-1) + kl).mean()


class Flow(nn.Module):
    """A transformed draw whose density is asked for: saturating, and with learned transforms."""

    def __init__(self, learned: bool) -> None:
        super().__init__()
        self.loc, self.learned = nn.Linear(8, 2), learned
        if learned:
            self.shift, self.log_scale = nn.Parameter(torch.ones(2)), nn.Parameter(torch.zeros(2))

    def forward(self, x: Tensor) -> Tensor:
        transforms: list[D.Transform] = [D.TanhTransform(cache_size=1)]
        if self.learned:
            transforms = [D.AffineTransform(self.shift, self.log_scale.exp()), D.SigmoidTransform()]
        q = D.TransformedDistribution(D.Normal(self.loc(x), 1.0), transforms)
        z = q.rsample()
        return (q.log_prob(z).sum(-1) + (z**2).sum(-1)).mean()


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enc, self.gru, self.out = nn.Linear(8, 5), nn.GRU(4, 5, batch_first=True), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        z = D.Normal(self.enc(x), 1.0).rsample()
        hidden, _ = self.gru(x.reshape(6, 2, 4), z[None])
        return (self.out(hidden) ** 2).mean()


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
        self.code = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.block(x.reshape(2, 3, 8))
        z = D.Normal(self.code(h), 1.0).rsample()
        return (self.block(F.pad(z, (0, 5))) ** 2).mean()


class Convolutional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enc, self.norm = nn.Conv2d(1, 2, 3, padding=1), nn.BatchNorm2d(2)
        self.dec = nn.ConvTranspose2d(2, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        image = F.pad(x, (0, 1)).reshape(6, 1, 3, 3)
        z = D.Normal(self.enc(image), 0.5).rsample()
        return ((self.dec(self.norm(z)) - image) ** 2).sum((1, 2, 3)).mean()


MODELS: dict[str, Callable[[], nn.Module]] = {
    "closed KL": lambda: NormalVAE("closed"),
    "independent": lambda: NormalVAE("independent"),
    "sampled KL": lambda: NormalVAE("sampled"),
    "tanh": lambda: Flow(learned=False),
    "learned flow": lambda: Flow(learned=True),
    "gru": Recurrent,
    "transformer": Attention,
    "convolutions": Convolutional,
}


def _gradients(call: Callable[[Tensor], Tensor], model: nn.Module) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    torch.manual_seed(5)
    loss = call(X)
    grads = torch.autograd.grad(loss, list(model.parameters()))
    return loss.detach(), list(grads), [b.clone() for b in model.buffers()]


@pytest.mark.parametrize("name", list(MODELS))
def test_pathwise_is_plain_pytorch(name: str) -> None:
    torch.manual_seed(0)
    plain = MODELS[name]()
    twin = copy.deepcopy(plain)
    compiled = scg.compile(twin, example_inputs=(X,))
    assert {site.estimator for site in compiled.graph.sites.values()} == {"reparam"}
    torch.testing.assert_close(_gradients(compiled, twin), _gradients(plain, plain), rtol=1e-4, atol=1e-5)
    assert name in ("closed KL", "independent", "sampled KL", "convolutions") or not list(twin.buffers())


@pytest.mark.parametrize("options", [{"samples": 3}, {"samples": 2, "estimator": "score_function"}])
@pytest.mark.parametrize("name", list(MODELS))
def test_more_draws_run(name: str, options: dict[str, Any]) -> None:
    model = MODELS[name]()
    compiled = scg.compile(model, **options)
    compiled(X).backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


Draw = Callable[[Tensor, Tensor], Tensor]
DRAWS: dict[str, Draw] = {
    "Beta": lambda h, a: D.Beta(a, a + 0.3).rsample(),
    "Cauchy": lambda h, a: D.Cauchy(h, a).rsample(),
    "ContinuousBernoulli": lambda h, a: D.ContinuousBernoulli(logits=h).rsample(),
    "Dirichlet": lambda h, a: D.Dirichlet(a).rsample(),
    "Exponential": lambda h, a: D.Exponential(a).rsample(),
    "FisherSnedecor": lambda h, a: D.FisherSnedecor(a + 3, a + 5).rsample(),
    "Gamma": lambda h, a: D.Gamma(a, a + 1).rsample(),
    "Gumbel": lambda h, a: D.Gumbel(h, a).rsample(),
    "HalfNormal": lambda h, a: D.HalfNormal(a).rsample(),
    "InverseGamma": lambda h, a: D.InverseGamma(a + 2, a).rsample(),
    "Kumaraswamy": lambda h, a: D.Kumaraswamy(a, a + 1).rsample(),
    "Laplace": lambda h, a: D.Laplace(h, a).rsample(),
    "LogNormal": lambda h, a: D.LogNormal(h * 0.1, a).rsample(),
    "LogisticNormal": lambda h, a: D.LogisticNormal(h, a).rsample(),
    "LowRankMultivariateNormal": lambda h, a: D.LowRankMultivariateNormal(h, a[..., None], a).rsample(),
    "MultivariateNormal": lambda h, a: D.MultivariateNormal(h, scale_tril=torch.diag_embed(a)).rsample(),
    "Pareto": lambda h, a: D.Pareto(torch.ones(4), a + 1).rsample(),
    "RelaxedBernoulli": lambda h, a: D.RelaxedBernoulli(torch.tensor(0.7), logits=h).rsample(),
    "RelaxedOneHotCategorical": lambda h, a: D.RelaxedOneHotCategorical(torch.tensor(0.7), logits=h).rsample(),
    "StudentT": lambda h, a: D.StudentT(a + 3, h, a).rsample(),
    "Uniform": lambda h, a: D.Uniform(h, h + a).rsample(),
    "Weibull": lambda h, a: D.Weibull(a, a + 1).rsample(),
}


@pytest.mark.parametrize("family", list(DRAWS))
def test_every_reparameterized_family(family: str) -> None:
    torch.manual_seed(0)
    layer, draw = nn.Linear(8, 4), DRAWS[family]

    def loss(x: Tensor) -> Tensor:
        h = layer(x)
        return draw(h, F.softplus(h) + 0.5).pow(2).mean()

    compiled = scg.compile(loss, example_inputs=(X,))
    assert {site.estimator for site in compiled.graph.sites.values()} == {"reparam"}
    torch.testing.assert_close(_gradients(compiled, layer), _gradients(loss, layer), rtol=1e-4, atol=1e-5)
    more = scg.compile(loss, samples=3)(X)
    assert all(torch.isfinite(g).all() for g in torch.autograd.grad(more, list(layer.parameters())))


def test_a_rejection_loop_is_one_leaf() -> None:
    m = nn.Parameter(torch.tensor([0.3, -0.2]))

    def loss() -> Tensor:
        return D.VonMises(m, m.exp()).sample().pow(2).sum()

    compiled = scg.compile(loss, samples=3)
    compiled().backward()
    assert m.grad is not None and torch.isfinite(m.grad).all() and "draw_VonMises" in compiled.code


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return (x > 0).float()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 2 * gradient


@pytest.mark.parametrize("samples", [1, 3])
def test_custom_functions_keep_their_backward(samples: int) -> None:
    m = nn.Parameter(torch.tensor([0.3, -0.2]))
    step: Any = _StraightThrough.apply

    def loss() -> Tensor:
        z = D.Normal(m, 1.0).rsample()
        return (step(z) * torch.tensor([1.0, 3.0])).sum()

    scg.compile(loss, estimator="reparam", samples=samples)().backward()
    torch.testing.assert_close(m.grad, torch.tensor([2.0, 6.0]))

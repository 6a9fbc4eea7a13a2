"""``dynamic=True``: one program for every batch size, the same as one traced for that size."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli, Binomial, Categorical, Independent, Normal

import scg


class VAE(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enc, self.norm, self.dec = nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        q = Bernoulli(logits=self.norm(self.enc(x)))
        z = q.sample()
        recon = -Bernoulli(logits=self.dec(z)).log_prob(x).sum(-1)
        return {"loss": (recon + q.log_prob(z).sum(-1)).mean(), "recon": recon}


class Steps(nn.Module):
    """Constants of the batch's size, and a size used as a number."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.Linear(8, 3), nn.Linear(3, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.zeros(x.shape[0], 3)
        loss = torch.zeros(())
        for _ in range(3):
            z = Independent(Bernoulli(logits=self.head(h)), 1).sample()
            h = torch.tanh(self.cell(torch.cat([z * x, h], 1)))
            loss = loss + (h**2).sum() / x.shape[0]
        return loss


class Lookup(nn.Module):
    """An enumerated index, a normal site, rows that mix, and the rows' own numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.net = nn.Parameter(torch.randn(3, 5)), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        k = Categorical(logits=self.net(x)).sample()
        e = Normal(self.table[k], 1.0).rsample()
        mixed = e - e.mean(0)
        return ((mixed - x) ** 2).sum(-1).mean() + (torch.arange(x.shape[0]) * e[:, 0]).mean()


class Bounded(nn.Module):
    """A multi-sample bound of every example."""

    def __init__(self) -> None:
        super().__init__()
        self.enc, self.dec = nn.Linear(5, 4), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        q = Normal(self.enc(x), 0.7)
        z = q.sample()
        log_p = Normal(torch.zeros_like(z), 1.0).log_prob(z).sum(-1) - ((self.dec(z) - x) ** 2).sum(-1)
        return scg.multisample(q.log_prob(z).sum(-1) - log_p).mean()


def _step(loss_fn: scg.CompiledModule, x: Tensor) -> list[Tensor]:
    torch.manual_seed(1)
    loss_fn.zero_grad()
    out = loss_fn(x)
    (out["loss"] if isinstance(out, dict) else out).backward()
    grads = [p.grad.clone() for p in loss_fn.parameters() if p.grad is not None]
    return [*grads, *(out.values() if isinstance(out, dict) else [out])]


@pytest.mark.parametrize(
    ("model", "options"),
    [
        (VAE, {"samples": 4}),
        (VAE, {"estimator": "disarm"}),
        (VAE, {"estimator": scg.ESTIMATORS["score_function"](baseline="moving_average")}),
        (VAE, {"estimator": "local_expectation"}),
        (VAE, {"estimator": "gumbel_softmax", "samples": 2}),
        (VAE, {"estimator": "enumerate"}),
        (VAE, {"estimator": "muprop", "samples": 3}),
        (Bounded, {"estimator": "dreg", "samples": 3}),
        (Steps, {"samples": 2}),
        (Lookup, {"samples": 2}),
        (Lookup, {}),
    ],
)
def test_one_program_for_all_sizes(model: type[nn.Module], options: dict[str, object]) -> None:
    torch.manual_seed(0)
    plain = model()
    free = scg.compile(plain, dynamic=True, **options)  # type: ignore[arg-type]
    fixed = scg.compile(plain, **options)  # type: ignore[arg-type]
    for compiled in (free, fixed):
        _step(compiled, torch.ones(7, 5))
    code = free.code
    assert "batch = " in code
    for size in (5, 7, 12, 40):  # Lookup of smaller ones is enumerated; Steps of smaller ones draws other numbers
        x = torch.rand(size, 5).round()
        state = {k: v.clone() for k, v in plain.state_dict().items()}
        ours = _step(free, x)
        assert free.code == code, "traced again"
        plain.load_state_dict(state)
        for found, expected in zip(ours, _step(fixed, x), strict=True):
            torch.testing.assert_close(found, expected)
        plain.load_state_dict(state)


def test_a_batch_of_one_has_a_program_of_its_own() -> None:
    plain = Steps()
    free, fixed = scg.compile(plain, dynamic=True, samples=2), scg.compile(plain, samples=2)
    free(torch.ones(3, 5))
    for found, expected in zip(_step(free, torch.ones(1, 5)), _step(fixed, torch.ones(1, 5)), strict=True):
        torch.testing.assert_close(found, expected)


W = nn.Parameter(torch.zeros(5))


def _half(x: Tensor) -> Tensor:
    z = Bernoulli(logits=W + x).sample()
    return (z[: x.shape[0] // 2] * x[: x.shape[0] // 2]).mean()


def _mask(x: Tensor) -> Tensor:
    z = Bernoulli(logits=W + x).sample()
    return (z * (torch.arange(x.shape[0]) < 9)[:, None]).mean()


def _roll(x: Tensor) -> Tensor:
    return (torch.roll(Bernoulli(logits=W + x).sample(), 1, 0) * x).mean()


def _counts(x: Tensor) -> Tensor:
    return (Binomial(3, logits=W + x).sample() * x).mean()


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (_half, "computes"),
        (_mask, "lt computes a constant of the batch's size"),
        (_roll, "depends on the batch size"),
        (_counts, "symbolic batch size"),
    ],
)
def test_what_is_traced_for_each_size_says_why(model: object, why: str) -> None:
    free, fixed = scg.compile(model, dynamic=True, samples=2), scg.compile(model, samples=2)  # type: ignore[arg-type]
    for size in (6, 11, 20):
        x = torch.rand(size, 5)
        for found, expected in zip(_step(free, x), _step(fixed, x), strict=True):
            torch.testing.assert_close(found, expected)
        assert why in str(free.explain())


def test_a_branch_on_the_size_is_a_condition() -> None:
    def branching(x: Tensor) -> Tensor:
        z = Bernoulli(logits=W + x).sample()
        return (z * x).mean() if x.shape[0] > 4 else (z * x).sum()

    free, fixed = scg.compile(branching, dynamic=True, samples=2), scg.compile(branching, samples=2)
    codes = []
    for size in (6, 9, 3):
        x = torch.rand(size, 5)
        for found, expected in zip(_step(free, x), _step(fixed, x), strict=True):
            torch.testing.assert_close(found, expected)
        codes.append(free.code)
    assert codes[0] == codes[1] != codes[2]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch's own, inside inductor
def test_inductor_serves_all_sizes() -> None:
    plain = VAE()
    free = scg.compile(plain, dynamic=True, samples=2, backend="inductor")
    for size in (6, 9, 30):
        _step(free, torch.rand(size, 5).round())

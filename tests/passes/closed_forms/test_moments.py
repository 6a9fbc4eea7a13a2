"""Polynomials, affine maps, quadratic forms and log densities of one draw: value and gradient are the exact ones."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Bernoulli, Exponential, MultivariateNormal, Normal

from tests.passes.closed_forms.oracle import NormalProblem, assert_closed

X = torch.linspace(-1, 2, 6, dtype=torch.float64).reshape(2, 3)
Y = X[:, :2].contiguous()
MASK = torch.tensor([[True, False], [False, True]])
KERNEL = torch.tensor([[[0.4, -1.1]]], dtype=torch.float64)

COSTS: dict[str, Callable[..., Tensor]] = {
    # polynomials in each element
    "square": lambda q, z, w: (z**2).sum(),
    "gap": lambda q, z, w: ((z - Y) ** 2).mean(),
    "weighted gap": lambda q, z, w: (w[0] * (Y - 2 * z) ** 2 / (1 + w[1] ** 2)).sum(-1).mean(),
    "product with itself": lambda q, z, w: (z * (z - w[0]) * w[1]).sum(),
    "cubic": lambda q, z, w: (w[0] * z**3 - z**2 * w[1] + z).sum(),
    "quartic": lambda q, z, w: ((z - Y) ** 2 * (z + 1) ** 2).sum(),
    "standardized": lambda q, z, w: (0.5 * ((z - q.loc) / q.scale) ** 2 + q.scale.log()).sum(),
    "reversed": lambda q, z, w: ((1.0 - z) ** 2).sum(),
    "moved": lambda q, z, w: ((z.t().reshape(-1)[1:] - w[0, 0]) ** 2).sum(),
    "part": lambda q, z, w: (z.chunk(2, -1)[1] ** 2).sum() + z[0].pow(3).sum(),
    "broadcast": lambda q, z, w: ((z[:, None] - w) ** 2).sum(),
    "masked": lambda q, z, w: (MASK * (z - 1) ** 2).sum(),
    "mse": lambda q, z, w: F.mse_loss(z, Y),
    "stopped": lambda q, z, w: ((z.detach() - Y) ** 2).sum(),
    # affine maps
    "linear": lambda q, z, w: F.linear(z, w, w[:, 0]).mean(),
    "matmul": lambda q, z, w: (z @ w.t() * X).sum(),
    "two layers": lambda q, z, w: F.linear(F.linear(z, w), w.t()).sum(),
    "convolution": lambda q, z, w: (F.conv1d(z[:, None], KERNEL * w[0, 0], w[1, :1]) * 3).sum(),
    "stacked": lambda q, z, w: torch.stack([z[0] * w[0], z[1] + 1]).sum(),
    "running sum": lambda q, z, w: (z.cumsum(-1) * w[:2]).sum(),
    # squares of affine maps
    "quadratic form": lambda q, z, w: ((F.linear(z, w, w[:, 0]) - X) ** 2).sum(),
    "matmul squared": lambda q, z, w: (X - 2 * (z @ w.t())).square().sum(-1).mean(),
    "addmm squared": lambda q, z, w: torch.addmm(X, z, w.t(), beta=0.5, alpha=2.0).pow(2).sum(),
    "weights first": lambda q, z, w: (torch.mm(w, z) ** 2).sum(),
    "mean squared": lambda q, z, w: (z.mean(-1) ** 2 + z.sum(0) ** 2 * w[0]).sum(),
    "convolution squared": lambda q, z, w: (F.conv1d(z[:, None], KERNEL, w[0, :1]) ** 2).sum(),
    "regression": lambda q, z, w: F.mse_loss(X, F.linear(z, w), reduction="sum"),
    # log densities
    "entropy": lambda q, z, w: q.log_prob(z).sum(),
    "prior": lambda q, z, w: -Normal(w[0], w[1].exp()).log_prob(z).sum(-1).mean(),
    "decoder": lambda q, z, w: -Normal(F.linear(z, w, w[:, 1]), w[:, 0].exp()).log_prob(X).sum(),
    "polynomial mean": lambda q, z, w: -Normal(z**2, w[1].exp()).log_prob(Y).sum(),
    "scaled outcome": lambda q, z, w: -Normal(w[0], 1.5).log_prob(2 * z + 1).sum(),
    "bernoulli": lambda q, z, w: -Bernoulli(logits=w[0], validate_args=False).log_prob(z).sum(),
    "exponential": lambda q, z, w: -Exponential(w[0].exp(), validate_args=False).log_prob(z + 3).sum(),
}


SLOW = {
    "product with itself", "reversed", "masked", "mse", "weighted gap", "part", "convolution", "two layers",
    "running sum", "stacked", "matmul squared", "addmm squared", "weights first", "regression",
    "scaled outcome", "exponential",
}  # fmt: skip
"""Variations that the full run tries."""


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in COSTS])
def test_closed(name: str) -> None:
    graph = assert_closed(NormalProblem(COSTS[name]))
    assert any(note.startswith("closed form over %z") for note in graph.notes)


@pytest.mark.parametrize("name", ["cubic", "decoder"])
def test_closed_with_rsample_and_several_samples(name: str) -> None:
    assert_closed(NormalProblem(COSTS[name], method="rsample"), samples=2)


LEFT: dict[str, Callable[..., Tensor]] = {
    "nonlinear": lambda q, z, w: z.exp().sum(),
    "product of elements": lambda q, z, w: (z[0] * z[1]).sum(),
    "square of a map of a map": lambda q, z, w: (F.linear(F.linear(z, w), w.t()) ** 2).sum(),
    "sum of repeated elements": lambda q, z, w: (z[:, None].expand(2, 2, 2).sum((0, 1)) ** 2).sum(),
    "square of a sum with itself": lambda q, z, w: ((F.linear(z, w) + F.linear(z, w).flip(0)) ** 2).sum(),
    "high power": lambda q, z, w: (z**9).sum(),
    "division by the draw": lambda q, z, w: (1 / (1 + z**2)).sum(),
    "rounded": lambda q, z, w: (z.round() * w[0]).sum(),
    "learned scale": lambda q, z, w: Normal(0.0, z.exp(), validate_args=False).log_prob(Y).sum(),
}


@pytest.mark.parametrize("name", LEFT)
def test_left_alone(name: str) -> None:
    import scg

    model = NormalProblem(LEFT[name])
    torch.manual_seed(0)
    compiled = scg.compile(model, closed_forms=True)
    plain = scg.compile(model)
    losses = []
    for module in (compiled, plain):
        torch.manual_seed(1)
        losses.append(module())
    assert torch.equal(*losses) and not compiled.graph.notes
    assert str(compiled.graph) == str(plain.graph)


def test_correlated_elements_have_marginal_moments_but_no_mixed_ones() -> None:
    import scg

    loc = torch.tensor([0.3, -0.8], dtype=torch.float64, requires_grad=True)
    root = torch.tensor([[1.2, 0.0], [0.7, 0.5]], dtype=torch.float64, requires_grad=True)

    def model(mixed: bool) -> Tensor:
        z = MultivariateNormal(loc, scale_tril=root).rsample()
        return (z.sum() ** 2) if mixed else ((z - Y[0]) ** 2 + 3 * z).sum()

    found = scg.compile(model, closed_forms=True)(False)
    variance = (root @ root.t()).diagonal()
    wanted = ((loc - Y[0]) ** 2 + variance + 3 * loc).sum()
    torch.testing.assert_close(found, wanted)
    grads = [torch.autograd.grad(loss, [loc, root]) for loss in (found, wanted)]
    torch.testing.assert_close(*grads)
    compiled = scg.compile(model, closed_forms=True)
    compiled(True)
    assert compiled.graph.sites["z"].credits

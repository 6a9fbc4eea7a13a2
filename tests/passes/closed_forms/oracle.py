"""Expectations over Normal draws by quadrature, exact for polynomials: what closed forms are compared with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributions import Normal

import scg


def gauss(shape: tuple[int, ...], count: int) -> tuple[Tensor, Tensor]:
    """Nodes ``[N, *shape]`` and weights ``[N]`` of independent standard Normals."""
    x, w = np.polynomial.hermite_e.hermegauss(count)
    size = int(np.prod(shape))
    grid = np.stack(np.meshgrid(*[x] * size, indexing="ij"), -1).reshape(-1, *shape)
    weights = np.prod(np.stack(np.meshgrid(*[w] * size, indexing="ij"), -1).reshape(-1, size), -1)
    return torch.tensor(grid), torch.tensor(weights / weights.sum())


class NormalProblem(nn.Module):
    """``cost(q, z, w)`` of one Normal draw z, with weights w to differentiate by besides."""

    def __init__(self, cost: Callable[..., Tensor], shape: tuple[int, ...] = (2, 2), method: str = "sample") -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)

        def vector(*size: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(*size, dtype=torch.float64, generator=generator))

        self.cost, self.method = cost, method
        self.loc, self.log_scale, self.w = vector(*shape), vector(*shape), vector(3, shape[-1])

    def q(self) -> Normal:
        return Normal(self.loc, self.log_scale.exp())

    def forward(self) -> Tensor:
        q = self.q()
        z = q.rsample() if self.method == "rsample" else q.sample()
        return self.cost(q, z, self.w)

    def expected(self, count: int = 5) -> Tensor:
        """The exact expectation of a cost that is a polynomial of degree below ``2 * count - 2`` in each element.

        Differentiated as the sum over outcomes that it is: the outcomes stand still, their probabilities move.
        """
        q = self.q()
        x, weights = gauss(tuple(self.loc.shape), count)
        outcomes = (q.loc + q.scale * x).detach()
        density = q.log_prob(outcomes).flatten(1).sum(1)
        values = torch.stack([self.cost(q, outcome, self.w) for outcome in outcomes])
        return (weights * (density - density.detach()).exp() * values).sum()


def gradients(loss: Tensor, model: nn.Module) -> list[Tensor]:
    params = list(model.parameters())
    found = torch.autograd.grad(loss, params, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(params, found, strict=True)]


def assert_closed(model: NormalProblem, count: int = 5, **options: Any) -> scg.Graph:
    """The compiled loss draws nothing, and has the exact value and gradient."""
    compiled = scg.compile(model, closed_forms=True, **options)
    loss = compiled()
    assert not any(graph_site.credits for graph_site in compiled.graph.sites.values()), compiled.graph
    wanted = model.expected(count)
    torch.testing.assert_close(loss, wanted, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(gradients(loss, model), gradients(wanted, model), rtol=1e-9, atol=1e-10)
    return compiled.graph

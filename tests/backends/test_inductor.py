"""The inductor backend: one full graph, with the gradients of the eager one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli, Categorical, Normal

import scg
from scg.estimators.score_function import ScoreFunction

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch's own, inside inductor


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enc, self.dec = nn.Linear(4, 3), nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        q = Bernoulli(logits=self.enc(x))
        z = q.sample()
        return (((self.dec(z) - x) ** 2).sum(-1) + q.log_prob(z).sum(-1)).mean()


X = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))


@pytest.mark.slow
def test_enumeration_equals_eager() -> None:
    model = Model()
    got = []
    for backend in ("eager", "inductor"):
        loss = scg.compile(model, estimator="enumerate", backend=backend)(X)
        got.append((loss.detach(), torch.autograd.grad(loss, list(model.parameters()))))
    torch.testing.assert_close(got[1], got[0], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("baseline", [None, "moving_average", "leave_one_out"])
def test_score_functions_run_as_one_graph(baseline: Any) -> None:
    model = Model()
    samples = 2 if baseline == "leave_one_out" else 1
    compiled = scg.compile(model, estimator=ScoreFunction(baseline=baseline), samples=samples, backend="inductor")
    for _ in range(2):
        compiled(X).backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
    if baseline == "moving_average":
        assert float(compiled.state_dict()["estimators.z.weight"]) > 0


@pytest.mark.slow
def test_mixed_sites() -> None:
    w = nn.Parameter(torch.zeros(3))

    def loss() -> Tensor:
        k = Categorical(logits=w).sample()
        z = Normal(w[k], 1.0).rsample()
        return (z - 1) ** 2

    scg.compile(loss, samples=2, backend="inductor")().backward()
    assert w.grad is not None and torch.isfinite(w.grad).all()


def test_opaque_functions_are_refused() -> None:
    @scg.opaque(shape=lambda z: z.shape)
    def metric(z: Tensor) -> Tensor:
        return z + 1

    w = nn.Parameter(torch.zeros(3))

    def loss() -> Tensor:
        return metric(Bernoulli(logits=w).sample()).mean()

    with pytest.raises(scg.LoweringError, match="opaque"):
        scg.compile(loss, backend="inductor")()

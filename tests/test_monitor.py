"""The watch on the gradient during training."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli

import scg


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.tensor([0.3, -0.4], dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        z = Bernoulli(logits=self.theta + x).sample()
        return (10 + z).sum(-1).mean()


X = torch.zeros(3, 2, dtype=torch.float64)


def test_baselines_take_the_variance_of_a_constant() -> None:
    loss_fn = scg.compile(Toy(), estimator="score_function", samples=4)
    watch = scg.Monitor(loss_fn, every=5, draws=20)
    for _ in range(10):
        loss_fn.zero_grad()
        loss_fn(X).backward()
        watch.step(X)
    found = watch.scalars()
    assert found["scg/baseline_fit"] > 0.9
    assert found["scg/variance"] > 0 and found["scg/running_variance"] > 0
    seen: list[tuple[str, float, int]] = []

    class Writer:
        def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None:
            seen.append((tag, scalar_value, global_step))

    watch.write(Writer(), 7)
    assert {tag for tag, _, _ in seen} == set(found) and {step for _, _, step in seen} == {7}


def test_training_does_not_see_a_measurement() -> None:
    def run(every: int) -> tuple[Tensor, dict[str, Tensor]]:
        torch.manual_seed(0)
        loss_fn = scg.compile(Toy(), estimator=scg.ESTIMATORS["score_function"](baseline="moving_average"))
        watch = scg.Monitor(loss_fn, every=every)
        for _ in range(4):
            loss_fn.zero_grad()
            loss_fn(X).backward()
            watch.step(X)
        return torch.rand(()), loss_fn.state_dict()

    (drawn, state), (expected, expected_state) = run(2), run(0)
    assert drawn == expected
    for key, value in expected_state.items():
        assert torch.equal(state[key], value), key


def test_an_exact_gradient_has_no_noise() -> None:
    loss_fn = scg.compile(Toy(), estimator="enumerate")
    watch = scg.Monitor(loss_fn, every=1)
    loss_fn(X).backward()
    watch.step(X)
    assert watch.scalars()["scg/variance"] < 1e-20 and "scg/baseline_fit" not in watch.scalars()


@pytest.mark.parametrize("options", [{"decay": 1.0}, {"every": -1}, {"draws": 1}])
def test_settings_are_checked(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="Monitor"):
        scg.Monitor(scg.compile(Toy()), **options)  # type: ignore[arg-type]

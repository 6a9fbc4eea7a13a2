"""Shares of the gradient's variance by site and cost."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli, Normal

import scg

THETA = nn.Parameter(torch.tensor([0.3, -0.4], dtype=torch.float64))
SCALE = nn.Parameter(torch.tensor(0.5, dtype=torch.float64))


def two_sites() -> Tensor:
    z = Bernoulli(logits=THETA).sample()
    y = Bernoulli(logits=SCALE * z.sum()).sample()
    x = Normal(SCALE, 1.0).rsample()
    near = scg.cost(z * torch.tensor([1.0, 3.0], dtype=torch.float64), "near").sum()
    return near + scg.cost(y * 2, "far") + scg.cost((x - 1) ** 2, "smooth")


@pytest.mark.parametrize("estimator", ["score_function", "local_expectation"])
def test_parts_sum_to_the_gradient(estimator: str) -> None:
    compiled = scg.compile(two_sites, estimators={"x": "reparam", "*": estimator}, samples=2)
    found = scg.variance_budget(compiled, n=40)
    assert sum(found.shares.values()) == pytest.approx(1.0)
    for name, shares in found.by_parameter.items():
        assert sum(shares.values()) == pytest.approx(1.0 if found.variances[name] > 0 else 0.0), name
    assert set(found.shares) == {("", ""), ("z", "near"), ("z", "far"), ("y", "far"), ("x", "smooth")}
    samples = scg.gradient_samples(compiled, n=4000)
    variance = sum(float(s.var(0).sum()) for s in samples.values())
    assert found.total == pytest.approx(variance, rel=0.8)


def test_shares_go_where_the_variance_is() -> None:
    """With one site and exact signals the shares are those of independent parts."""

    def separate() -> Tensor:
        z = Bernoulli(logits=THETA).sample()
        return scg.cost(10 * z[0], "large") + scg.cost(z[1], "small")

    compiled = scg.compile(separate, estimator="score_function", samples=2)
    found = scg.variance_budget(compiled, n=300)
    assert found.shares["z", "large"] > 0.9 > 0.1 > found.shares["z", "small"] > 0
    assert found.shares["", ""] == pytest.approx(0.0, abs=1e-12)
    text = str(found)
    assert "large" in text and "variance" in text


def test_nothing_is_left_changed() -> None:
    compiled = scg.compile(two_sites, estimator=scg.ESTIMATORS["score_function"](baseline="moving_average"))
    compiled().backward()
    state = {key: value.clone() for key, value in compiled.state_dict().items()}
    torch.manual_seed(3)
    scg.variance_budget(compiled, n=3)
    drawn = torch.rand(())
    torch.manual_seed(3)
    assert drawn == torch.rand(())
    for key, value in compiled.state_dict().items():
        assert torch.equal(value, state[key]), key


def test_second_derivatives_are_refused() -> None:
    with pytest.raises(scg.EstimatorError, match="order=1"):
        scg.variance_budget(scg.compile(two_sites, order=2, samples=2))

"""`scg.exact` against numbers worked out by hand, and the limits it names."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import (
    AffineTransform,
    Bernoulli,
    Binomial,
    Categorical,
    Distribution,
    Independent,
    MixtureSameFamily,
    Normal,
    OneHotCategoricalStraightThrough,
    TransformedDistribution,
)

from scg import primitives
from scg.capture import captured
from scg.errors import EstimatorError, ScgError, TraceError
from scg.exact import Walk, exact
from tests.law2 import expected_estimate
from tests.problems import PROBLEMS


def _vector(*values: float) -> nn.Parameter:
    return nn.Parameter(torch.tensor(values, dtype=torch.float64))


def _finite_difference(expectation: Callable[[], Tensor], param: Tensor, step: float = 1e-5) -> Tensor:
    gradient = torch.zeros_like(param)
    for i in range(param.numel()):
        ends = []
        for sign in (1, -1):
            with torch.no_grad():
                param.view(-1)[i] += sign * step
            ends.append(expectation())
            with torch.no_grad():
                param.view(-1)[i] -= sign * step
        gradient.view(-1)[i] = (ends[0] - ends[1]) / (2 * step)
    return gradient


def test_one_bernoulli_by_hand() -> None:
    theta, t = _vector(0.7), 0.45

    def loss() -> Tensor:
        return ((Bernoulli(logits=theta).sample() - t) ** 2).sum()

    value, grads = exact(loss)
    p = 1 / (1 + math.exp(-0.7))
    assert math.isclose(value, p * (1 - t) ** 2 + (1 - p) * t**2, rel_tol=1e-12)
    assert math.isclose(grads["theta"], p * (1 - p) * (1 - 2 * t), rel_tol=1e-12)


@pytest.mark.parametrize("name", [name for name in PROBLEMS if name not in ("detached", "reparam_above_both")])
def test_gradient_is_the_derivative_of_the_expectation(name: str) -> None:
    problem = PROBLEMS[name]()
    for call, args in enumerate(problem.calls):
        problem.before(call)
        _, grads = exact(problem.model, *args)
        params = captured(problem.model).tensors
        for path, grad in grads.items():
            wanted = _finite_difference(lambda: exact(problem.model, *args)[0], params[path])  # noqa: B023
            torch.testing.assert_close(grad, wanted, rtol=1e-6, atol=1e-8)


def test_the_loss_of_two_layers_by_hand() -> None:
    """E[(b - .3)^2 (1 + t) + c1 t], t ~ B(s(w0)), b ~ B(s(w1 + c0 t)); the gradient by autograd of that formula."""
    model = PROBLEMS["enumerated_jointly"]().model
    assert isinstance(model, nn.Module)
    w, c = model.get_parameter("w"), model.get_parameter("c")
    top = torch.sigmoid(w[0])

    def below(t: float) -> Tensor:
        p = torch.sigmoid(w[1] + c[0] * t)
        return (p * 0.7**2 + (1 - p) * 0.3**2) * (1 + t) + c[1] * t

    by_hand = top * below(1) + (1 - top) * below(0)
    value, grads = exact(model)
    torch.testing.assert_close(value, by_hand.detach(), rtol=1e-12, atol=0)
    for name, grad in zip(("w", "c"), torch.autograd.grad(by_hand, (w, c)), strict=True):
        torch.testing.assert_close(grads[name], grad, rtol=1e-12, atol=1e-14)


def test_data_are_averaged_over_but_not_differentiated() -> None:
    theta = _vector(0.3)

    def loss() -> Tensor:
        with torch.no_grad():
            z = Bernoulli(logits=theta).sample()
        return (z * theta).sum()

    value, grads = exact(loss)
    p = 1 / (1 + math.exp(-0.3))
    assert math.isclose(value, 0.3 * p, rel_tol=1e-12)
    assert math.isclose(grads["theta"], p, rel_tol=1e-12)


def test_rsample_asks_for_the_pathwise_derivative() -> None:
    theta, weight = _vector(0.3, -0.5, 0.1), torch.tensor([1.0, 4.0, -2.0], dtype=torch.float64)

    def loss() -> Tensor:
        return (OneHotCategoricalStraightThrough(logits=theta).rsample() @ weight) ** 2

    _, grads = exact(loss)
    p = torch.softmax(theta, 0)  # straight-through: E_z[2 (z.w)] d(p.w)/dtheta
    wanted = torch.autograd.grad(2 * (p.detach() @ weight) * (p @ weight), theta)[0]
    torch.testing.assert_close(grads["theta"], wanted, rtol=1e-12, atol=1e-14)


def test_transformed_and_mixture_draws() -> None:
    theta, mix = _vector(0.3, -0.8), _vector(0.2, 0.4)

    def loss() -> Tensor:
        shifted = TransformedDistribution(Bernoulli(logits=theta), [AffineTransform(-1.0, 2.0)]).sample()
        k = MixtureSameFamily(Categorical(logits=mix), Bernoulli(logits=theta)).sample()
        return (shifted.sum() - k) ** 2

    def by_hand() -> Tensor:
        p, k = torch.sigmoid(theta), torch.softmax(mix, 0) @ torch.sigmoid(theta)
        mean, variance = (2 * p - 1).sum(), (4 * p * (1 - p)).sum()
        return mean**2 + variance - 2 * mean * k + k

    value, grads = exact(loss)
    torch.testing.assert_close(value, by_hand().detach(), rtol=1e-12, atol=0)
    for name, grad in zip(("theta", "mix"), torch.autograd.grad(by_hand(), (theta, mix)), strict=True):
        torch.testing.assert_close(grads[name], grad, rtol=1e-12, atol=1e-14)


def test_impossible_outcomes_are_skipped() -> None:
    logits = _vector(0.3, -torch.inf, 0.1)

    def loss() -> Tensor:
        z = Categorical(logits=logits).sample()
        assert z != 1
        return Categorical(logits=logits).log_prob(z)

    value, grads = exact(loss)
    assert torch.isfinite(value) and torch.isfinite(grads["logits"]).all()


def test_python_control_flow_on_a_draw_is_fine() -> None:
    theta = _vector(0.3)

    def loss() -> Tensor:
        if Bernoulli(logits=theta).sample() > 0:
            return 1 + Bernoulli(logits=-theta).sample().sum()
        return theta.sum() ** 2

    value, _ = exact(loss)
    p, q = (1 / (1 + math.exp(-s * 0.3)) for s in (1, -1))
    assert math.isclose(value, p * (1 + q) + (1 - p) * 0.09, rel_tol=1e-12)


def test_module_state_is_left_as_it_was() -> None:
    norm = nn.BatchNorm1d(1, dtype=torch.float64)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w, self.norm, self.calls = _vector(0.3, 0.4), norm, 0

        def forward(self) -> Tensor:
            self.calls += 1
            return (self.norm(Bernoulli(logits=self.w).sample()[:, None] + self.calls) ** 3).mean()

    model = Model()
    first = exact(model)
    assert model.calls == 0 and norm.num_batches_tracked == 0 and norm.running_mean == 0
    torch.testing.assert_close(first, exact(model), rtol=0, atol=0)


def _normal() -> Tensor:
    return Normal(0.0, 1.0).sample()


def _noise() -> Tensor:
    return torch.randn(())


def _dropout() -> Tensor:
    return torch.dropout(torch.ones(()), 0.5, True)


def _many() -> Tensor:
    return Bernoulli(logits=torch.zeros(40)).sample().sum()


def _replayed() -> Tensor:
    return primitives.sample(Bernoulli(logits=torch.zeros(())), "a", value=torch.ones(()))


def _declared() -> Tensor:
    z = Bernoulli(logits=torch.zeros(())).sample()
    return primitives.depends(torch.ones(()), on=z)


def _vector_loss() -> Tensor:
    return Bernoulli(logits=torch.zeros(2)).sample()


def _no_replacement() -> Tensor:
    return torch.multinomial(torch.ones(3), 2).double().sum()


@pytest.mark.parametrize(
    ("program", "error", "says"),
    [
        (_normal, EstimatorError, r"Normal\(\), drawn at test_exact.py:\d+, has no finite support"),
        (_noise, EstimatorError, r"randn.* at test_exact.py:\d+ draws noise"),
        (_dropout, EstimatorError, r"at test_exact.py:\d+ draws noise"),
        (_many, EstimatorError, "1,099,511,627,776 joint outcomes"),
        (_replayed, EstimatorError, r"site 'a' replays a value, at test_exact.py:\d+"),
        (_declared, EstimatorError, "scg.depends"),
        (_vector_loss, TraceError, r"a tensor of shape \(2,\), not a scalar"),
        (_no_replacement, EstimatorError, "without replacement"),
    ],
)
def test_errors_say_where(program: Callable[[], Tensor], error: type[ScgError], says: str) -> None:
    with pytest.raises(error, match=says):
        exact(program)
    assert "__getattribute__" not in vars(Distribution)
    assert Bernoulli(logits=torch.zeros(2)).sample().shape == (2,)


def test_independent_elements_are_enumerated_together() -> None:
    theta = _vector(0.3, -0.4)

    def loss() -> Tensor:
        return Independent(Bernoulli(logits=theta), 1).sample((2,)).prod()

    p = torch.sigmoid(theta)
    torch.testing.assert_close(exact(loss)[0], (p.prod() ** 2).detach(), rtol=1e-12, atol=0)


def test_walk_visits_each_leaf_once() -> None:
    walk, leaves = Walk(), []
    while walk.more():
        branch = walk.choose(3)
        leaves.append((branch, *(walk.choose(2) for _ in range(branch))))
    assert len(leaves) == len(set(leaves)) == 1 + 2 + 4


class TestForcedDraws:
    """The other half of a law-2 test: an estimator, summed over its own draws."""

    def test_a_hand_written_score_function_is_unbiased(self) -> None:
        problem = PROBLEMS["chain"]()
        assert isinstance(problem.model, nn.Module)
        params = dict(problem.model.named_parameters())
        w, c = params["w"], params["c"]

        def estimator() -> Tensor:
            log_prob = torch.zeros((), dtype=torch.float64)
            draws = []
            logits = w[0]
            for t in range(3):
                q = Bernoulli(logits=logits)
                draws.append(q.sample())
                log_prob = log_prob + q.log_prob(draws[-1])
                logits = w[t + 1] + c[t] * draws[-1] if t < 2 else logits
            one, two, three = draws
            loss = (one - 0.3) ** 2 + 2 * (two - 0.8) ** 2 * c[2] + torch.exp(three)
            return loss + loss.detach() * (log_prob - log_prob.detach())

        torch.testing.assert_close(expected_estimate(estimator, params), exact(problem.model), rtol=1e-12, atol=1e-12)

    def test_a_wrong_baseline_is_seen(self) -> None:
        theta = _vector(0.4)

        def estimator() -> Tensor:
            q = Bernoulli(logits=theta.expand(2))
            z = q.sample()
            cost = (z - 0.45) ** 2
            signal = cost - cost.mean()  # not leave-one-out: biased by (K - 1) / K
            return (cost + signal.detach() * (q.log_prob(z) - q.log_prob(z).detach())).mean()

        def model() -> Tensor:
            return ((Bernoulli(logits=theta).sample() - 0.45) ** 2).sum()

        _, (estimate) = expected_estimate(estimator, {"theta": theta})
        torch.testing.assert_close(estimate["theta"], exact(model)[1]["theta"] / 2, rtol=1e-10, atol=0)

    @pytest.mark.parametrize("name", ["integer_index", "binomial", "one_hot", "random_functions"])
    def test_plain_models_give_their_expected_loss(self, name: str) -> None:
        problem = PROBLEMS[name]()
        params = captured(problem.model).tensors
        loss, _ = expected_estimate(problem.model, params, *problem.calls[0])
        torch.testing.assert_close(loss, exact(problem.model, *problem.calls[0])[0], rtol=1e-12, atol=0)


def test_outcomes_that_cannot_be_listed() -> None:
    w = nn.Parameter(torch.zeros(2))
    with pytest.raises(EstimatorError, match="outcomes of Binomial cannot be listed: Inhomogeneous"):
        exact(lambda: Binomial(torch.tensor([1.0, 3.0]), logits=w).sample().sum())

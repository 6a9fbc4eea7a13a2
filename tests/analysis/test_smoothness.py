"""Smoothness: breaks, stops and unseen gradients, on traced programs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Bernoulli, Normal

import scg
from scg.analysis import Break, smoothness, unseen_gradients
from scg.ir import Dist, Graph
from scg.tracer import trace


@scg.opaque()
def score(z: Tensor) -> Tensor:
    return z.round()


def break_of(program: Callable[[Tensor], Tensor], method: str = "rsample") -> Break | None:
    def model() -> Tensor:
        z = getattr(Normal(torch.zeros(3), 1.0), method)()
        return program(z).mean()

    graph = trace(model)
    return smoothness(graph).break_between("z", graph.objective)


def test_a_row_for_padding_is_left_out_of_the_derivative() -> None:
    def looked_up(z: Tensor, padding: int | None = 0) -> Tensor:
        return F.embedding(torch.tensor([0, 1]), z[:, None], padding_idx=padding)

    assert break_of(looked_up) is None  # asked for, as a detach would be
    found = break_of(looked_up, "sample")
    assert found is not None and "padding" in found.why
    assert break_of(lambda z: looked_up(z, None), "sample") is None


@pytest.mark.parametrize(
    "program",
    [
        lambda z: z**2,
        lambda z: z.relu() + z.abs() + z.clamp(-1, 1),
        lambda z: z.sort().values,
        lambda z: z.max().expand(3),
        lambda z: torch.where(torch.isfinite(z), z, 0.0),
        lambda z: F.dropout(z, 0.5, True),
    ],
)
def test_smooth_paths(program: Callable[[Tensor], Tensor]) -> None:
    assert break_of(program) is None


@pytest.mark.parametrize(
    ("program", "word"),
    [
        (lambda z: (z > 0).float(), "gt"),
        (lambda z: z.round(), "round"),
        (lambda z: F.one_hot(z.argmax(), 3).float(), "argmax"),
        (lambda z: torch.arange(3.0)[z.argsort()], "not a float"),
        (lambda z: z % 1.0, "remainder"),
        (lambda z: score(z), "opaque"),
        (lambda z: torch.where(z > 0, z, -z), "gt"),
        (lambda z: torch.div(z, 0.1, rounding_mode="floor"), "div"),
    ],
)
def test_breaks_name_the_first_operation(program: Callable[[Tensor], Tensor], word: str) -> None:
    found = break_of(program)
    assert found is not None and word in found.why and "test_smoothness.py" in found.loc


def test_a_stop_is_an_instruction_for_rsample_and_a_break_for_sample() -> None:
    assert break_of(lambda z: z.detach() ** 2) is None
    found = break_of(lambda z: z.detach() ** 2, "sample")
    assert found is not None and "detach" in found.why


class Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:
        return grad


straight: Callable[[Tensor], Tensor] = Straight.apply


def test_a_custom_backward_is_the_users_instruction_for_rsample_only() -> None:
    assert break_of(straight) is None
    found = break_of(straight, "sample")
    assert found is not None and "backward of its own" in found.why


def test_live_and_stopped() -> None:
    def model() -> tuple[Tensor, ...]:
        z = Normal(torch.zeros(3), 1.0).rsample()
        y = Normal(torch.zeros(3), 1.0).sample()
        a, b, c = (z**2).mean(), z.detach().mean(), y.detach().mean()
        return a + b + c, a, b, c

    graph = trace(model)
    _, a, b, c = graph.outputs
    found = smoothness(graph)
    assert found.live("z", a) and not found.stopped("z", a)
    assert found.stopped("z", b) and not found.live("z", b)
    assert found.live("y", c) and not found.stopped("y", c)
    assert found.live("z", graph.objective) and found.stopped("z", graph.objective)


def test_a_path_ends_at_the_parameters_of_the_next_site() -> None:
    def model() -> Tensor:
        z = Normal(torch.zeros(3), 1.0).rsample()
        y = Bernoulli(logits=z).sample()
        w = Bernoulli(logits=z.round()).sample()
        return ((y > 0.5).float() + w).detach().mean()

    graph = trace(model)
    found = smoothness(graph)
    dists = {node.name: graph.nodes[node.dist].name for node in _samples(graph)}
    assert found.break_between("z", dists["y"]) is None
    assert found.break_between("z", dists["w"]) is not None
    assert found.break_between("z", graph.objective) is None
    assert found.live("z", graph.objective)  # as a change of y's distribution, whatever is detached after it


def _samples(graph: Graph) -> list[scg.ir.Sample]:
    return graph.of(scg.ir.Sample)


THETA = nn.Parameter(torch.zeros(4))


def faults(program: Callable[[], Tensor]) -> list[str]:
    return [fault.parameter for fault in unseen_gradients(trace(program))]


def test_a_threshold_on_noise_is_unseen() -> None:
    graph = trace(lambda: (THETA + torch.randn(4) > 0).float().mean())
    (fault,) = unseen_gradients(graph)
    assert fault.parameter == "THETA" and "gt" in fault.text and "allow_biased" in fault.text
    assert "test_smoothness.py" in fault.loc


@pytest.mark.parametrize(
    "program",
    [
        lambda: (torch.rand(4) < THETA.sigmoid()).float().mean(),
        lambda: (Normal(torch.zeros(4), 1.0).sample() > THETA).float().mean(),
        lambda: F.one_hot((THETA + torch.randn(4)).argmax(), 4).float().mean(),
        lambda: (THETA * torch.rand(4)).round().mean(),
        lambda: score(THETA + torch.randn(4)).mean(),
    ],
)
def test_unseen(program: Callable[[], Tensor]) -> None:
    assert faults(program) == ["THETA"]


@pytest.mark.parametrize(
    "program",
    [
        lambda: (Normal(THETA, 1.0).rsample() > 0).float().mean(),  # the site's own estimator sees it
        lambda: (THETA.detach() + torch.randn(4) > 0).float().mean() + THETA.sum(),
        lambda: ((THETA + torch.randn(4) > 0).float().detach() * THETA).mean(),
        lambda: (THETA + torch.randn(4)).relu().mean(),
        lambda: (THETA > 0).float().mean() + torch.randn(4).mean(),  # nothing random at the jump
        lambda: (THETA + Bernoulli(0.5 * torch.ones(4)).sample() > 0.3).float().mean(),
        lambda: F.dropout(THETA, 0.5, True).mean(),
    ],
)
def test_seen_or_without_gradient(program: Callable[[], Tensor]) -> None:
    assert faults(program) == []


def test_smoothness_names_distribution_nodes() -> None:
    graph = trace(lambda: Normal(THETA, 1.0).rsample().mean())
    assert graph.of(Dist)
    (site,) = graph.sites
    assert smoothness(graph).live(site, graph.objective)

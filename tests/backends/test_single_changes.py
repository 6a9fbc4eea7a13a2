"""Changes of one element each, evaluated all at once, against one rerun of the program for each element."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli, Categorical, OneHotCategorical

import scg
from scg.backends import reruns, single_changes
from scg.backends.lowering import Interpreter
from scg.estimators.score_function import ScoreFunction
from scg.ir import Sample
from tests.backends.test_rerun import interpreter
from tests.law2 import assert_unbiased
from tests.problems import Problem

B, D, H = 2, 3, 4


def _tensor(*shape: int) -> Tensor:
    return torch.sin(torch.arange(1, 1 + torch.Size(shape).numel(), dtype=torch.float64) ** 2).reshape(shape)


LOGITS, W, C = nn.Parameter(_tensor(B, D)), nn.Parameter(_tensor(H, D)), nn.Parameter(_tensor(H))
WIDE, GATE = nn.Parameter(_tensor(H, D + 2)), nn.Parameter(_tensor(D))
PLANES, PAIRS = nn.Parameter(_tensor(B, 2, D)), nn.Parameter(_tensor(H, 2 * D))
ONE_HOT, INDEX = nn.Parameter(_tensor(B, 2, D)), nn.Parameter(_tensor(B, 2, 4))
TABLE = nn.Parameter(_tensor(4, 2))


def bits() -> Tensor:
    return Bernoulli(logits=LOGITS).sample()


def rough(x: Tensor) -> Tensor:
    """A cost that is not linear in anything."""
    return (torch.tanh(x) * torch.exp(0.3 * x)).sum(-1).mean()


def linear() -> Tensor:
    z = bits()
    return rough(nn.functional.linear(z, W, C))


def addmm() -> Tensor:
    z = bits()
    return rough(torch.addmm(C, z, W.t()))


def matmul_on_the_right() -> Tensor:
    z = bits()
    return rough((W @ z.t()).t())


def matrix_vector() -> Tensor:
    z = bits()
    return torch.exp(0.2 * (z @ GATE)).mean()


def vector_matrix() -> Tensor:
    z = Bernoulli(logits=GATE).sample()
    return rough(z @ W.t()) + torch.tanh(z @ GATE)


def batched_matmul() -> Tensor:
    z = bits()
    return rough(torch.bmm(z.unsqueeze(1), W.t().expand(B, D, H)).squeeze(1))


def einsum() -> Tensor:
    z = bits()
    return rough(torch.einsum("bd,hd->bh", z, W))


def broadcast_by_einsum() -> Tensor:
    """A dim of size 1 is summed over with one of size 3, on either side."""
    z = bits()
    return rough(torch.einsum("bd,hd->bh", z[:, :1], W)) + rough(torch.einsum("bd,hd->bh", z, W[:, :1]))


def sums() -> Tensor:
    z = bits()
    return torch.exp(z.sum(-1)).mean() + (z * GATE).mean(1).pow(2).sum() + torch.sin(z.sum(-1, keepdim=True)).sum()


def pointwise_first() -> Tensor:
    z = bits()
    return rough(((2 * z - 1) * GATE).pow(3) @ W.t() / 2 + C)


def scaled_after() -> Tensor:
    z = bits()
    return rough((0.5 * nn.functional.linear(z, W)).reshape(B, 2, 2).flatten(1) - C)


def side_by_side() -> Tensor:
    z = bits()
    x = torch.full((B, 2), 0.7, dtype=torch.float64)
    return rough(nn.functional.linear(torch.cat([x[:, :1], z, x[:, 1:]], -1), WIDE))


def reversed_elements() -> Tensor:
    z = bits()
    return rough(nn.functional.linear(z.flip(-1), W, C))


def twice_the_same() -> Tensor:
    z = bits()
    return rough(nn.functional.linear(torch.cat([z, z], -1), PAIRS))


def some_elements() -> Tensor:
    z = bits()
    return rough(nn.functional.linear(z[:, 1:], W[:, 1:])) + (z[:, 0] * C[0]).sum()


def gated() -> Tensor:
    """A linear operation whose other operand changes too."""
    z = bits()
    return rough(nn.functional.linear(z, W * z[0]))


def two_joined_dims() -> Tensor:
    z = Bernoulli(logits=PLANES).sample()
    return rough(nn.functional.linear(z.flatten(1), PAIRS))


def one_dim_after_the_other() -> Tensor:
    z = Bernoulli(logits=PLANES).sample()
    hidden = torch.relu(nn.functional.linear(z, W, C))  # [B, 2, H]
    return rough(hidden.sum(1))


def all_dims_summed() -> Tensor:
    z = Bernoulli(logits=PLANES).sample()
    return torch.exp(0.3 * (z * GATE).sum((1, 2))).mean() + torch.sin(z.mean((0, 1, 2)))


def one_hot() -> Tensor:
    z = OneHotCategorical(logits=ONE_HOT).sample()
    return rough(nn.functional.linear(z.flatten(1), PAIRS))


def index() -> Tensor:
    z = Categorical(logits=INDEX).sample()  # [B, 2]
    return rough(nn.functional.linear(TABLE[z].flatten(1), W[:, :1].expand(H, 4) * C)) + (TABLE[z] ** 2).sum()


def elementwise_costs() -> Tensor:
    z = bits()
    return rough(nn.functional.linear(z, W)) + (torch.exp(z * GATE) * LOGITS).sum() + z[0, 1]


def own_density() -> Tensor:
    q = Bernoulli(logits=LOGITS)
    z = q.sample()
    return q.log_prob(z).sum() - Bernoulli(logits=GATE.expand(B, D)).log_prob(z).sum() + rough(z @ W.t())


def nothing_joined() -> Tensor:
    z = bits()
    return (torch.exp(z) * GATE).sum()


def several_outputs() -> Tensor:
    z = bits()
    most, _ = (z * GATE).max(-1)
    first, rest = torch.split(torch.tanh(z * GATE), [1, D - 1], -1)
    return torch.exp(most).mean() + rough(first + nn.functional.linear(rest, W[:, 1:]))


def mixed_batch() -> Tensor:
    z = bits()
    return rough(nn.functional.linear(z - z.mean(0), W))


PROGRAMS = (
    linear, addmm, matmul_on_the_right, matrix_vector, vector_matrix, batched_matmul, einsum, sums, pointwise_first,
    scaled_after, side_by_side, reversed_elements, twice_the_same, some_elements, gated, two_joined_dims,
    one_dim_after_the_other, all_dims_summed, one_hot, index, elementwise_costs, own_density, nothing_joined,
    several_outputs, mixed_batch, broadcast_by_einsum,
)  # fmt: skip


def _setting(program: Callable[[], Tensor], samples: int = 1) -> tuple[Interpreter, Sample, Tensor]:
    """A run, its site, and other outcomes of it: ``[R, *dims | *elements | *event]``."""
    torch.manual_seed(3)
    run = interpreter(program, {"*": ScoreFunction(baseline=None)}, samples)
    (site,) = run.graph.of(Sample)
    value, support = run.env[site.name].tensor, run.supports[site.name]
    assert support is not None
    if site.tensor.event_ndim:
        rows = [value.roll(step, -1) for step in range(1, len(support))]
    else:
        rows = [(value + step) % len(support) for step in range(1, len(support))]
    return run, site, torch.stack(rows).detach()


def _one_by_one(run: Interpreter, site: Sample, outcomes: Tensor, rest: Tensor | None = None) -> Tensor:
    """The signal of each element by one rerun of its own, in which nothing else is changed."""
    value = run.env[site.name]
    lead, shape = len(value.dims), site.tensor.shape[: site.tensor.ndim - site.tensor.event_ndim]
    found = torch.zeros(outcomes.shape[: 1 + lead + len(shape)], dtype=torch.float64)
    joined = run.joined[site.name]
    for place in torch.cartesian_prod(*(torch.arange(size) for size in shape)).reshape(-1, len(shape)).tolist():
        at = (*[slice(None)] * lead, *place)
        group = 0
        for dim in joined:
            group = group * shape[dim] + place[dim]
        rows = (value.tensor if rest is None else rest[group]).expand(outcomes.shape).clone()
        rows[(slice(None), *at)] = outcomes[(slice(None), *at)]
        signal = reruns.rerun(run, site, value.dims, rows, differentiable=False).signal
        found[(slice(None), *at)] = signal.expand(found.shape)[(slice(None), *at)]
    return found


def _changed(run: Interpreter, site: Sample, outcomes: Tensor, rest: Tensor | None = None) -> Tensor:
    found = single_changes.changed_signal(run, site, run.env[site.name].dims, outcomes, rest)
    return found.expand(outcomes.shape[: found.dim()])


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.__name__)
def test_as_one_rerun_an_element(program: Callable[[], Tensor]) -> None:
    run, site, outcomes = _setting(program)
    torch.testing.assert_close(_changed(run, site, outcomes), _one_by_one(run, site, outcomes))


@pytest.mark.parametrize("program", [linear, two_joined_dims, one_hot, index], ids=lambda program: program.__name__)
def test_with_draws_of_the_whole_program(program: Callable[[], Tensor]) -> None:
    run, site, outcomes = _setting(program, samples=3)
    torch.testing.assert_close(_changed(run, site, outcomes), _one_by_one(run, site, outcomes))


@pytest.mark.parametrize(
    "program", [linear, sums, side_by_side, elementwise_costs, two_joined_dims, one_hot, gated],
    ids=lambda program: program.__name__,
)  # fmt: skip
def test_with_another_rest_in_each_row(program: Callable[[], Tensor]) -> None:
    run, site, outcomes = _setting(program)
    groups = torch.Size([site.tensor.shape[dim] for dim in run.joined[site.name]]).numel()
    value = run.env[site.name].tensor
    rest = torch.stack([value.roll(shift, 0) for shift in range(groups)])
    torch.testing.assert_close(_changed(run, site, outcomes, rest), _one_by_one(run, site, outcomes, rest))


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.__name__)
def test_in_chunks(program: Callable[[], Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(single_changes.CHUNK_BYTES, "cpu", 8 * B * H * 2)
    run, site, outcomes = _setting(program)
    torch.testing.assert_close(_changed(run, site, outcomes), _one_by_one(run, site, outcomes))


LINEAR = (
    linear, addmm, matmul_on_the_right, matrix_vector, vector_matrix, batched_matmul, einsum, sums, pointwise_first,
    scaled_after, side_by_side, reversed_elements, two_joined_dims, one_dim_after_the_other, all_dims_summed, one_hot,
    index, elementwise_costs, own_density,
)  # fmt: skip
"""Programs in which rows begin behind a linear operation."""


@pytest.mark.parametrize("program", LINEAR, ids=lambda program: program.__name__)
def test_no_row_is_written_out_before_a_linear_operation(
    program: Callable[[], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, site, outcomes = _setting(program)

    def refuse(*args: Any) -> Any:
        raise AssertionError("rows of what the operation reads")

    monkeypatch.setattr(single_changes.Rows, "written_out", refuse)
    _changed(run, site, outcomes)


class _Inner(nn.Module):
    """Draws below: elementwise ones, whose unchanged elements stay as drawn, and one of all of them."""

    def __init__(self, deep: bool) -> None:
        super().__init__()
        self.deep = deep
        self.w = nn.Parameter(torch.tensor([0.3, -0.6], dtype=torch.float64))
        self.c = nn.Parameter(torch.tensor([1.2, -0.7], dtype=torch.float64))

    def forward(self) -> Tensor:
        top = Bernoulli(logits=self.w).sample()
        last = Bernoulli(logits=self.c * top + 0.2).sample()
        loss = (1 + last @ self.c) ** 2 + torch.exp(last * top).sum()
        if self.deep:
            joint = Bernoulli(logits=(last - top) @ self.c).sample()
            loss = loss * (joint - 0.3) ** 2
        return loss


@pytest.mark.parametrize(
    ("estimator", "inner", "deep"),
    [
        ("local_expectation", "score_function", False),
        ("local_expectation", "enumerate", True),
        ("indecater", "enumerate", False),
        pytest.param("local_expectation", "score_function", True, marks=pytest.mark.slow),
        pytest.param("indecater", "enumerate", True, marks=pytest.mark.slow),
    ],
)
def test_draws_below_are_unbiased(estimator: str, inner: str, deep: bool) -> None:
    assert_unbiased(Problem(_Inner(deep)), estimator=inner, estimators={"top": estimator})


def test_categorical_layers_are_one_matrix_product_a_variable() -> None:
    """N variables of C categories: [N, (C-1) B, C] by [N, C, H], not [N (C-1) B, N C] by [N C, H]."""
    compiled = scg.compile(one_hot, estimator="local_expectation")
    compiled().backward()
    assert compiled._latest is not None
    calls = [str(node.target) for node in compiled._latest.program.module.graph.nodes]
    assert sum("einsum" in call for call in calls) == 1
    assert sum("linear" in call for call in calls) == 1  # of the draw

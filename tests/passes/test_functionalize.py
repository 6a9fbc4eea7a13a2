"""In-place programs equal eager PyTorch in values and gradients after functionalization, or are refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributions import Normal
from torch.nn import functional as F

import scg
from scg.errors import TraceError
from scg.ir import Graph, Op
from scg.passes.functionalize import functionalize
from scg.tracer import trace
from scg.verifier import is_effect, verify
from tests.ir_eval import evaluate
from tests.passes.tools import capture, check_rewrite, differentiate

aten = torch.ops.aten
X = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(3, 4).requires_grad_()
Y = torch.linspace(2, 3, 12, dtype=torch.float64).reshape(3, 4).requires_grad_()

Program = Callable[[Tensor, Tensor], Any]
PROGRAMS: dict[str, Program] = {}


def program(fn: Program) -> Program:
    PROGRAMS[fn.__name__.replace("_", " ")] = fn
    return fn


@program
def arithmetic(x: Tensor, y: Tensor) -> Any:
    z = x.clone()
    z.add_(y).mul_(2).sub_(y, alpha=3).div_(y).pow_(2).neg_()
    return z, x * z


@program
def activations(x: Tensor, y: Tensor) -> Any:
    z = x * 3
    return F.relu(z.clone(), inplace=True) + z.sigmoid_() + F.leaky_relu_(x - y) + (x * 2).clamp_(-0.5, 0.5)


@program
def dropout_at_evaluation(x: Tensor, y: Tensor) -> Any:
    z = x * 3
    kept = F.alpha_dropout(F.dropout(z, 0.5, training=False, inplace=True), 0.5, training=False, inplace=True)
    return kept.mul_(y), z


@program
def first_row(x: Tensor, y: Tensor) -> Any:
    z = x.clone()
    z[0] = y[1]
    return z * x


@program
def a_number(x: Tensor, y: Tensor) -> Any:
    z = x * 1
    z[:, 1] = 5.0
    z[2] = 0
    return z * y


@program
def slices_with_steps(x: Tensor, y: Tensor) -> Any:
    z = x.clone()
    z[::2, 1:3] = y[1:, :2]
    z[-1, ::3] += 2
    return z


@program
def an_element(x: Tensor, y: Tensor) -> Any:
    z = x.clone()
    z[1, 2] = y.sum()
    return z, z[1]


@program
def view_before_write(x: Tensor, y: Tensor) -> Any:
    z = x.clone()
    row, column, flat = z[1], z[:, 2], z.view(-1)
    z.mul_(y)
    return row, column, flat


@program
def write_through_view(x: Tensor, y: Tensor) -> Any:
    z = x.clone()
    flat, turned = z.view(-1), z.t()
    flat.view(2, 6)[1].add_(3)
    turned[0] = y[:, 1]
    return z, flat, turned


@program
def write_between_reads(x: Tensor, y: Tensor) -> Any:
    z = x.clone()
    row = z[0]
    before = row + y[0]
    z[0, 1:].fill_(7)
    return before, row + y[0], z


@program
def disjoint_writes(x: Tensor, y: Tensor) -> Any:
    z = torch.zeros_like(x)
    first = z[0]
    for i in range(1, 3):
        z[i] = z[i - 1] + y[i]
    return first, z


@program
def deep_views(x: Tensor, y: Tensor) -> Any:
    z = x.clone()
    part = z.unsqueeze(0).transpose(1, 2)[0].reshape(2, 2, 3).permute(2, 0, 1)[1:]
    whole = z.view(3, 2, 2).movedim(2, 0).flatten(1)
    whole[1, ::2].mul_(y[0, :3])
    return part, whole, z


@program
def split_and_chunk(x: Tensor, y: Tensor) -> Any:
    z = x.detach().clone()
    y = y.detach()
    a, b = z.split([1, 3], dim=1)
    c, d = z.chunk(2, dim=1)
    rows = z.unbind(0)
    a.add_(y[:, :1])
    d.mul_(2)
    rows[1].sub_(1)
    return a, b, c, d, rows[0], rows[1], z


@program
def write_then_first_use_of_a_split(x: Tensor, y: Tensor) -> Any:
    z = x.detach().clone()
    y = y.detach()
    parts = torch.tensor_split(z, 3, dim=1)
    z.add_(y)
    parts[1].mul_(y[:, 2:3])
    return *parts, z


@program
def diagonals(x: Tensor, y: Tensor) -> Any:
    z = x.clone()
    z.diagonal().copy_(y[0, :3])
    z.diagonal(1).mul_(3)
    return z


@program
def narrow_select_squeeze(x: Tensor, y: Tensor) -> Any:
    z = x.clone()
    z.narrow(1, 1, 2).add_(1)
    z.narrow(0, -1, 1).mul_(y[:1])
    z[None].squeeze(0).select(-1, -1).copy_(y[:, 0])
    return z


@program
def masks(x: Tensor, y: Tensor) -> Any:
    z = x.clone()
    z.masked_fill_(x > 0.3, -2.0)
    z[1].masked_fill_(y[0] > 2.1, 4.0)
    z[z < -1] = 9.0
    return z * y


@program
def indexed(x: Tensor, y: Tensor) -> Any:
    z = x.clone()
    index = torch.tensor([2, 0])
    z[index] = y[:2]
    z[:, index] += 1
    z.index_add_(0, index, y[:2]).index_fill_(1, torch.tensor([3]), 0.5)
    z.index_put_((index, index), y[0, :2], accumulate=True)
    return z


@program
def scattered(x: Tensor, y: Tensor) -> Any:
    z = x.clone()
    index = torch.tensor([[0, 2, 1, 1]])
    z.scatter_(0, index, y[:1])
    z[1:].scatter_add_(0, torch.tensor([[1, 0, 1, 0]]), y[:1])
    z.scatter_reduce_(0, index, x[:1], reduce="amax")
    return z


@program
def dtype_of_the_target_stays(x: Tensor, y: Tensor) -> Any:
    z = x.float()
    z.add_(y)
    z[0].copy_(y[0])
    n = torch.zeros(3, dtype=torch.int64)
    n.add_(torch.ones(3, dtype=torch.int32))
    n[0] = 2.9
    m = x > 0
    m.logical_or_(y > 2.5)
    m &= torch.tensor(True)
    return z, n, m


@program
def broadcasting_sources(x: Tensor, y: Tensor) -> Any:
    z = x.clone()
    z.copy_(y[0])
    z[1:] = y[:1, :1]
    z[0] = y[0][None]
    z[2:].add_(y.sum())
    return z


@program
def zero_and_fill(x: Tensor, y: Tensor) -> Any:
    z = x * 2
    z[0].zero_()
    z[1].fill_(y[0, 0])
    return z * y, torch.empty(2).zero_()


@program
def noise(x: Tensor, y: Tensor) -> Any:
    z = x.clone()
    z[0].normal_(1.0, 2.0)
    z[1].uniform_(-1, 1)
    z[2, :2].exponential_(2.0)
    z[2, 2:].bernoulli_(0.5)
    return z * y, torch.empty(4).bernoulli_(torch.full((4,), 0.3)), torch.empty(3).log_normal_()


@program
def silent_aliases(x: Tensor, y: Tensor) -> Any:
    z = x.clone()
    same = F.dropout(z, 0.5, training=False)
    a, _ = torch.broadcast_tensors(z, y)
    b = z.type_as(y).to(torch.float64).contiguous().expand_as(y).reshape(3, 4)
    c = torch.einsum("ij->ji", z)
    a.add_(1)
    b[0].mul_(2)
    same[1] = y[1]
    return z, same, a, b, c


@program
def reshape_that_copies(x: Tensor, y: Tensor) -> Any:
    z = x.clone()
    copied, shared = z.t().reshape(-1), z.reshape(-1)
    copied.add_(y.sum())
    shared.mul_(2)
    return z, copied, shared


@program
def out_arguments(x: Tensor, y: Tensor) -> Any:
    x, y = x.detach(), y.detach()
    z, w = torch.empty_like(x), torch.zeros(3, 4, dtype=torch.float64)
    torch.add(x, y, alpha=2, out=z)
    torch.exp(x[0], out=w[1])
    values, indices = torch.empty(3, dtype=torch.float64), torch.empty(3, dtype=torch.int64)
    torch.max(z, 1, out=(values, indices))
    return z, w, values, indices


@program
def no_grad_on_a_constant(x: Tensor, y: Tensor) -> Any:
    z = torch.zeros(3, 4, dtype=torch.float64)
    z.detach()[0].add_(1)
    z.detach()[1] = y.detach()[0]
    return z * x


@program
def the_result_is_written(x: Tensor, y: Tensor) -> Any:
    total = x.sum()
    total += y.prod()
    total *= 2
    return total


@program
def the_result_of_a_write_is_read(x: Tensor, y: Tensor) -> Any:
    z = x.clone()
    w = z[1].add_(y[1])
    z.mul_(2)
    return w, z


@pytest.mark.parametrize("name", PROGRAMS)
def test_equals_eager(name: str) -> None:
    graph = check_rewrite(functionalize, PROGRAMS[name], X, Y)
    assert not [
        node for node in graph.of(Op) if getattr(node.target, "_schema", None) and node.target._schema.is_mutable
    ]


def refused_through_expand(x: Tensor, y: Tensor) -> Tensor:
    z = x.sum().reshape(1).expand(3)
    return z.add_(1)


def refused_resize(x: Tensor, y: Tensor) -> Tensor:
    z = torch.empty(0)
    torch.exp(x.detach(), out=z)
    return z


def refused_unfold(x: Tensor, y: Tensor) -> Tensor:
    z = x.clone()
    z.view(-1).unfold(0, 2, 2).add_(1)
    return z


def refused_detached(x: Tensor, y: Tensor) -> Tensor:
    z = x * y
    z.detach().mul_(2)
    return z


def refused_shape(x: Tensor, y: Tensor) -> Tensor:
    z = x * y
    z.unsqueeze_(0)
    return z


@pytest.mark.parametrize(
    ("fn", "what"),
    [
        (lambda x, y: x.add_(1), "writes into the argument arg0_1, which lives outside"),
        (lambda x, y: x[0].t().zero_(), "writes into the argument arg0_1"),
        (lambda x, y: x.reshape(-1)[2:].mul_(y.reshape(-1)[2:]), "writes into the argument arg0_1"),
        (refused_through_expand, "writes into memory that %expand .* may share"),
        (refused_resize, r"resizes its result from \[0\] to \[3, 4\]"),
        (refused_unfold, "writes into memory that %unfold .* may share"),
        (refused_detached, "into a tensor that a gradient flows through"),
        (refused_shape, "changes its argument in a way that cannot be written as a new value"),
    ],
)
def test_refused(fn: Program, what: str) -> None:
    graph = capture(lambda x, y: fn(x, y), X, Y)
    with pytest.raises(TraceError, match=f"t.py:1: .*{what}"):
        functionalize(graph)


def test_text() -> None:
    def model(x: Tensor) -> Tensor:
        z = x.exp()
        row = z[0]
        z[0] += 1
        return row.sum()

    graph = functionalize(capture(model, torch.zeros(2, 3)))
    assert (
        str(graph)
        == """\
graph test(arg0_1) {
  %arg0_1              = input f32[2, 3] arg0_1
  %exp                 = op    f32[2, 3] exp(%arg0_1)  # t.py:1
  %select              = op    f32[3] select.int(%exp, 0, 0)  # t.py:1
  %select_1            = op    f32[3] select.int(%exp, 0, 0)  # t.py:1
  %add_                = op    f32[3] add.Tensor(%select_1, 1)  # t.py:1
  %add__select_scatter = op    f32[2, 3] select_scatter(%exp, %add_, 0, 0)  # t.py:1
  %select_2            = op    f32[3] select.int(%add__select_scatter, 0, 0)  # t.py:1
  %select_now          = op    f32[3] select.int(%add__select_scatter, 0, 0)  # t.py:1
  %sum_1               = op    f32[] sum(%select_now)  # t.py:1
  return %sum_1 of %sum_1
}"""
    )


def test_without_writes_the_graph_is_the_same_object() -> None:
    graph = capture(lambda x: x.exp()[0], X)
    assert functionalize(graph) is graph


# -- buffers ---------------------------------------------------------------------------------------------------------


class Counter(nn.Module):
    count: Tensor
    table: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("table", torch.zeros(2, 4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        self.count += 1
        with torch.no_grad():
            self.table[1].mul_(0.9).add_(h.mean(0))
        self.table[0] = self.table[1].detach() * self.count
        return (h * self.count).sum() + self.table.sum()


def test_buffers_are_updated_once_at_the_end() -> None:
    model, twin = Counter(), Counter()
    x = torch.randn(5, 4)
    graph = verify(functionalize(trace(model, (x,))), after="functionalize")
    assert [node.args[0] for node in graph.of(Op) if is_effect(graph, node)] == [
        "norm.num_batches_tracked",
        "count",
        "table",
    ]
    assert functionalize(graph) == graph
    for _ in range(2):
        torch.testing.assert_close(evaluate(graph, (x,)), twin(x))
        torch.testing.assert_close(dict(model.named_buffers()), dict(twin.named_buffers()))
    assert not model.table.requires_grad


def test_counting_alone_needs_no_memory_to_be_followed() -> None:
    model, twin = nn.BatchNorm1d(4), nn.BatchNorm1d(4)
    x = torch.randn(5, 4)
    graph = verify(functionalize(trace(lambda x: model(x).sum(), (x,))), after="functionalize")
    assert functionalize(graph) is graph
    torch.testing.assert_close(evaluate(graph, (x,)), twin(x).sum())
    torch.testing.assert_close(dict(model.named_buffers()), dict(twin.named_buffers()))


def test_a_buffer_given_as_out_is_followed() -> None:
    class Out(Counter):
        def forward(self, x: Tensor) -> Tensor:
            torch.add(self.count, 1, out=self.table[0, 0])
            return (self.table * x[:2]).sum()

    model, twin = Out(), Out()
    x = torch.randn(5, 4)
    graph = functionalize(trace(model, (x,)))
    torch.testing.assert_close(evaluate(graph, (x,)), twin(x))
    torch.testing.assert_close(model.table, twin.table)


class Writes(nn.Module):
    count: Tensor

    def __init__(self, write: Callable[[Any, Tensor], None]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3))
        self.register_buffer("count", torch.zeros(3))
        self.write = write

    def forward(self) -> Tensor:
        z = Normal(self.weight, 1.0).sample()
        self.write(self, z)
        return (z * self.count).sum()


def clamp_weight(self: Any, z: Tensor) -> None:
    with torch.no_grad():
        self.weight.clamp_(0, 1)


def running_mean(self: Any, z: Tensor) -> None:
    self.count.mul_(0.9).add_(z)


@pytest.mark.parametrize(
    ("write", "what"),
    [
        (clamp_weight, "under no_grad"),
        (running_mean, "the buffer count is written with a value that depends on the site 'z'"),
    ],
)
def test_refused_writes_to_the_outside(write: Callable[[Any, Tensor], None], what: str) -> None:
    with pytest.raises(TraceError, match=rf"test_functionalize.py:\d+: .*{what}"):
        functionalize(trace(Writes(write)))


# -- stochastic nodes ------------------------------------------------------------------------------------------------


def both(model: Callable[[Tensor], Tensor]) -> tuple[Graph, Any, Any]:
    """The functional graph, and values and gradients of it and of the model under one seed."""
    graph = verify(functionalize(trace(model, (X,))), after="functionalize")
    return graph, differentiate(lambda x: evaluate(graph, (x,)), X), differentiate(model, X)


def test_a_distribution_reads_its_parameters_when_it_is_used() -> None:
    def model(x: Tensor) -> Tensor:
        loc = x.clone()
        q = Normal(loc[0], 1.0)
        z = q.sample()
        loc[1] = 2 * z
        first = q.log_prob(z)
        loc[0] += 3
        return (first * q.log_prob(z) * loc).sum()

    graph, actual, expected = both(model)
    torch.testing.assert_close(actual, expected)
    assert [node.name for node in graph if node.kind == "dist"] == ["q", "q_now"], "only what was written is made anew"


def test_a_draw_can_be_written() -> None:
    def model(x: Tensor) -> Tensor:
        z = Normal(x, 1.0).rsample()
        z[0] = 1.0
        return (z * x).sum()

    graph, actual, expected = both(model)
    torch.testing.assert_close(actual, expected)
    assert list(graph.sites) == ["z"]


def test_costs_can_be_added_up_in_place() -> None:
    def model(x: Tensor) -> Tensor:
        total = scg.cost(x.sum(), "a")
        total += scg.cost(x.exp().sum(), "b")
        return total

    _, actual, expected = both(model)
    torch.testing.assert_close(actual, expected)


def test_a_cost_whose_value_is_written_later_is_refused() -> None:
    def model(x: Tensor) -> Tensor:
        value = x.exp()
        cost = scg.cost(value, "a")
        value.add_(1)
        return cost.sum()

    with pytest.raises(TraceError, match=r"add_.Tensor writes into memory that %a .* may share"):
        functionalize(trace(model, (X,)))


# -- random programs -------------------------------------------------------------------------------------------------

VIEWS: tuple[Callable[[Tensor], Tensor], ...] = (
    lambda t: t.reshape(-1),
    lambda t: t.t() if t.ndim == 2 else t,
    lambda t: t[0] if t.ndim else t,
    lambda t: t[..., -1] if t.ndim else t,
    lambda t: t[1:] if t.ndim and len(t) > 1 else t,
    lambda t: t[..., ::2] if t.ndim else t,
    lambda t: t.unsqueeze(0),
    lambda t: t.squeeze(),
    lambda t: t.movedim(0, -1) if t.ndim else t,
    lambda t: t.diagonal() if t.ndim > 1 else t,
    lambda t: t.chunk(2, -1)[-1] if t.ndim else t,
    lambda t: t.view(-1, 2) if t.numel() % 2 == 0 and t.is_contiguous() else t,
    lambda t: F.dropout(t, training=False),
    lambda t: t.unbind(0)[-1] if t.ndim else t,
    lambda t: t.narrow(-1, 0, 1) if t.ndim else t,
    lambda t: t.expand(1, *t.shape)[0],
)
WRITES: tuple[Callable[[Tensor, Tensor], object], ...] = (
    lambda t, y: t.add_(1),
    lambda t, y: t.mul_(y.sum()),
    lambda t, y: t.fill_(0.5),
    lambda t, y: t.copy_(y.reshape(-1)[: t.numel()].reshape(t.shape)),
    lambda t, y: t.masked_fill_(t > 0, 0.25),
    lambda t, y: t.sigmoid_(),
    lambda t, y: t.neg_(),
)
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("view"), st.integers(0, 20), st.integers(0, len(VIEWS) - 1)),
        st.tuples(st.just("write"), st.integers(0, 20), st.integers(0, len(WRITES) - 1)),
    ),
    min_size=2,
    max_size=9,
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(STEPS)
def test_random_views_and_writes(steps: list[tuple[str, int, int]]) -> None:
    def model(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        tensors = [x * 1]
        for kind, at, which in steps:
            tensor = tensors[at % len(tensors)]
            if kind == "view":
                tensors.append(VIEWS[which](tensor))
            else:
                WRITES[which](tensor, y)
        return tuple(tensor * 1 for tensor in tensors)

    x, y = X, Y
    try:
        differentiate(model, x, y)
    except RuntimeError:  # eager PyTorch writes no such program with gradients: without, it may
        x, y = X.detach(), Y.detach()
    check_rewrite(functionalize, model, x, y)

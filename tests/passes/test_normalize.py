"""`Independent` becomes its base: the same log-probabilities, the same draws, more elements."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.distributions import (
    Bernoulli,
    Categorical,
    Dirichlet,
    Distribution,
    Independent,
    MultivariateNormal,
    Normal,
)

from scg.ir import Dist, Graph, LogProb, Node, Op, Param, Ref, Sample, TensorType
from scg.passes.functionalize import functionalize
from scg.passes.normalize import choose_masked, normalize, split_independent
from scg.passes.rewriter import type_of
from scg.template import flatten
from scg.verifier import verify
from tests.passes.tools import check_rewrite, names

aten = torch.ops.aten


def program(dist: Distribution, value_shape: tuple[int, ...] = ()) -> Graph:
    """A draw ``z`` of shape ``[*sample, *batch, *event]`` and its summed log-probability."""
    template, params = flatten(dist)
    nodes: list[Node] = [
        Param(name=f"t{i}", type=type_of(t), path=f"t{i}", requires_grad=True) for i, t in enumerate(params)
    ]
    draw = dist.sample(value_shape)
    drawn = TensorType(draw.dtype, tuple(draw.shape), event_ndim=len(dist.event_shape))
    log_prob = dist.log_prob(draw)
    nodes += [
        Dist(name="d", template=template, params=tuple(Ref(node.name) for node in nodes)),
        Sample(name="z", type=drawn, dist=Ref("d"), sample_shape=value_shape, loc="m.py:1"),
        LogProb(name="p", type=type_of(log_prob), dist=Ref("d"), value=Ref("z"), loc="m.py:2"),
        Op(name="s", type=TensorType(log_prob.dtype, ()), target=aten.sum.default, args=(Ref("p"),)),
    ]
    tensors = {f"t{i}": t for i, t in enumerate(params)}
    table = {node.name: node for node in nodes}
    return Graph(name="g", nodes=table, objective=Ref("s"), outputs=(Ref("s"), Ref("p"), Ref("z")), tensors=tensors)


def evaluate(graph: Graph) -> tuple[Tensor, Tensor]:
    """The draw and its log-probability ``%p`` under seed 0, as the nodes define them."""
    torch.manual_seed(0)
    values: dict[str, Tensor] = {}
    dists: dict[str, Distribution] = {}
    for node in graph:
        match node:
            case Param():
                values[node.name] = graph.tensors[node.path]
            case Dist():
                dists[node.name] = node.template.rebuild([values[ref] for ref in node.params])
            case Sample():
                values[node.name] = dists[node.dist].sample(node.sample_shape)
                assert values[node.name].shape == node.tensor.shape
            case LogProb():
                values[node.name] = dists[node.dist].log_prob(values[node.value])
                assert values[node.name].shape == node.tensor.shape
            case Op():
                values[node.name] = node.target(values[node.args[0]], *node.args[1:], **node.kwargs)
    return values["z"], values["p"]


L = torch.linspace(-1, 1, 12).reshape(4, 3)
DISTRIBUTIONS: dict[str, tuple[Callable[[], Distribution], tuple[int, ...]]] = {
    "bernoulli": (lambda: Independent(Bernoulli(logits=L), 1), (4, 3)),
    "both dims": (lambda: Independent(Bernoulli(logits=L), 2), (4, 3)),
    "nested": (lambda: Independent(Independent(Normal(L, 1.0), 1), 1), (4, 3)),
    "categorical": (lambda: Independent(Categorical(logits=L), 1), (4,)),
    "event dims": (lambda: Independent(Dirichlet(L.exp()), 1), (4,)),
    "event dims, nested": (
        lambda: Independent(Independent(MultivariateNormal(L[:, None], torch.eye(3)), 1), 1),
        (4, 1),
    ),
    "nothing reinterpreted": (lambda: Independent(Normal(L, 1.0), 0), (4, 3)),
    "no Independent": (lambda: Normal(L, 1.0), (4, 3)),
}


@pytest.mark.parametrize("sample_shape", [(), (5,)])
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_equals_independent(name: str, sample_shape: tuple[int, ...]) -> None:
    build, elements = DISTRIBUTIONS[name]
    graph = program(build(), sample_shape)
    split = verify(split_independent(graph), after="split_independent")
    torch.testing.assert_close(evaluate(split), evaluate(graph))
    assert split_independent(split) == split
    (sample,) = split.of(Sample)
    assert sample.tensor.shape[: sample.tensor.ndim - sample.tensor.event_ndim] == sample_shape + elements
    assert all(dist.template.base is None for dist in split.of(Dist))
    assert split.sites["z"].distribution == graph.sites["z"].distribution


def test_text() -> None:
    graph = split_independent(program(Independent(Bernoulli(logits=L), 1)))
    assert (
        str(graph)
        == """\
graph g() {
  %t0         = param   f32[4, 3] parameter t0
  %d          = dist    Bernoulli(logits=%t0)
  %z          = sample  f32[4, 3] %d  # m.py:1
  %p_elements = logprob f32[4, 3] %d.log_prob(%z)  # m.py:2
  %p          = op      f32[4] sum.dim_IntList(%p_elements, [-1])  # m.py:2
  %s          = op      f32[] sum(%p)
  return %s of (%s, %p, %z)
}"""
    )


def test_normalize_is_idempotent_and_leaves_its_input_alone() -> None:
    graph = program(Independent(Bernoulli(logits=L), 1))
    before = str(graph)
    normal = verify(normalize(graph), after="normalize")
    assert normalize(normal) == normal
    assert str(graph) == before
    assert names(normal) == ["sum.dim_IntList", "sum"]


def _written(x: Tensor, mask: Tensor, number: Tensor | float) -> Tensor:
    y = x * 2
    y[mask] = number
    return y.sum() + y.square().sum()


@pytest.mark.parametrize("number", [torch.tensor(0.7, dtype=torch.float64, requires_grad=True), 0.3])
def test_a_number_written_under_a_mask_is_a_choice(number: Tensor | float) -> None:
    x, mask = torch.randn(3, 4, dtype=torch.float64, requires_grad=True), torch.rand(3, 4) < 0.5
    graph = check_rewrite(lambda g: choose_masked(functionalize(g)), partial(_written, number=number), x, mask)
    writes = [node.target for node in graph.of(Op) if "where" in node.op_name or "put" in node.op_name]
    assert writes == [aten.where.self]


def test_other_writes_stay_as_they_are() -> None:
    x, rows = torch.randn(3, 4, requires_grad=True), torch.tensor([True, False, True])
    graph = check_rewrite(lambda g: choose_masked(functionalize(g)), partial(_written, number=0.3), x, rows)
    assert aten.where.self not in {node.target for node in graph.of(Op)}

"""Sharing and dead code: what is merged, what is dropped, and what must be left alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.distributions import Bernoulli
from torch.nn import functional as F

import scg
from scg.ir import Cost, Dist, Graph, LogProb, Node, Op, Opaque, Param, Ref, Sample, TensorType
from scg.passes.clean import eliminate_dead_code, share
from scg.template import flatten
from tests.passes.tools import capture, check_rewrite, names

aten = torch.ops.aten
X = torch.linspace(-1, 1, 5, dtype=torch.float64).requires_grad_()
F32 = TensorType(torch.float32, (3,))


def clean(graph: Graph) -> Graph:
    return eliminate_dead_code(share(graph))


def test_equal_operations_are_shared() -> None:
    graph = check_rewrite(clean, lambda x: (x.exp() * x.exp() + x.exp().sum()) * 2, X)
    assert names(graph) == ["exp", "mul.Tensor", "sum", "add.Tensor", "mul.Tensor"]


def test_sharing_goes_through_chains_and_multiple_outputs() -> None:
    graph = check_rewrite(clean, lambda x: x.sin().max(0)[0] - x.sin().max(0)[0] * 3, X)
    assert names(graph) == ["sin", "max.dim", "getitem", "mul.Tensor", "sub.Tensor"]


@pytest.mark.parametrize("pair", [(1, 1.0), (1, True), (0.0, -0.0)])
def test_constants_that_compare_equal_are_told_apart(pair: tuple[float, float]) -> None:
    graph = check_rewrite(share, lambda x: (torch.full_like(x, pair[0]), torch.full_like(x, pair[1])), X)
    assert len(graph.of(Op)) == 2


def test_noise_is_not_shared() -> None:
    graph = capture(lambda x: F.dropout(x, 0.5) - F.dropout(x, 0.5) + torch.rand_like(x) - torch.rand_like(x), X)
    assert share(graph) is graph


def batch_norms(x: Tensor, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
    before = mean * 2
    F.batch_norm(x, mean, var, training=True)
    F.batch_norm(x, mean, var, training=True)
    return mean * 2, before


def test_running_statistics_are_an_effect() -> None:
    params = {"mean": torch.zeros(3), "var": torch.ones(3)}
    graph = capture(batch_norms, torch.randn(4, 3), params=params)
    assert names(clean(graph)).count("batch_norm") == 2
    assert names(share(graph)).count("mul.Tensor") == 2, "one reads the mean before its update, one after"


def test_batch_norm_in_evaluation_is_no_effect() -> None:
    def model(x: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        F.batch_norm(x, mean, var)
        return F.batch_norm(x, mean, var) * F.batch_norm(x, mean, var)

    graph = clean(capture(model, torch.randn(4, 3), params={"mean": torch.zeros(3), "var": torch.ones(3)}))
    assert names(graph) == ["batch_norm", "mul.Tensor"]


def test_two_nodes_of_one_parameter_count_as_one() -> None:
    weight = torch.ones(3, requires_grad=True)
    graph = capture(lambda x, a, b: x.mul(a) + x.mul(b), torch.ones(3), params={"a": weight, "b": weight})
    assert names(share(graph)) == ["mul.Tensor", "add.Tensor"]
    assert [node.path for node in share(graph).of(Param)] == ["a"]


def two_draws() -> Graph:
    """``z - y`` of two draws of two equal distributions, a third one unused, and two equal log-probabilities."""
    template, (logits,) = flatten(Bernoulli(logits=torch.zeros(3)))
    nodes: list[Node] = [Param(name="l", type=F32, path="l", requires_grad=True)]
    for name in ("p", "q"):
        nodes.append(Dist(name=name, template=template, params=(Ref("l"),)))
    nodes += [
        Sample(name="z", type=F32, dist=Ref("p")),
        Sample(name="y", type=F32, dist=Ref("q")),
        Sample(name="unused", type=F32, dist=Ref("q")),
        LogProb(name="lz", type=F32, dist=Ref("p"), value=Ref("z")),
        LogProb(name="lz_1", type=F32, dist=Ref("q"), value=Ref("z")),
        Op(name="d", type=F32, target=aten.sub.Tensor, args=(Ref("z"), Ref("y"))),
        Op(name="e", type=F32, target=aten.add.Tensor, args=(Ref("lz"), Ref("lz_1"))),
        Op(name="f", type=F32, target=aten.mul.Tensor, args=(Ref("d"), Ref("e"))),
        Cost(name="c", type=F32, value=Ref("f"), label="c"),
        Op(name="s", type=TensorType(torch.float32, ()), target=aten.sum.default, args=(Ref("c"),)),
    ]
    table = {node.name: node for node in nodes}
    return Graph(
        name="two_draws", nodes=table, objective=Ref("s"), outputs=Ref("s"), tensors={"l": logits}, tail=frozenset("s")
    )


@pytest.mark.parametrize("other", [lambda: torch.zeros(2), lambda: torch.tensor([0.0, 0.0])])
def test_a_tensor_that_learns_is_no_constant_of_its_value(other: Callable[[], Tensor]) -> None:
    w, v = torch.zeros(2, requires_grad=True), torch.zeros(2, requires_grad=True)
    value = scg.compile(lambda: ((other() + w) * (3 + v)).sum())()
    torch.testing.assert_close(torch.autograd.grad(value, [w, v]), (torch.full((2,), 3.0), torch.zeros(2)))


def test_samples_are_never_merged_but_distributions_and_log_probabilities_are() -> None:
    graph = clean(two_draws())
    assert list(graph.sites) == ["z", "y", "unused"], "an unused site stays listed"
    assert [node.name for node in graph.of(Dist, LogProb)] == ["p", "lz"]
    assert graph["d"].inputs == ("z", "y")
    assert graph["e"].inputs == ("lz", "lz")
    assert graph.tail == {"s"}
    assert clean(graph) == graph


def test_opaque_calls_are_neither_merged_nor_dropped_when_impure() -> None:
    def opaque(name: str, pure: bool) -> Opaque:
        return Opaque(name=name, type=F32, fn=torch.exp, args=(Ref("z"),), pure=pure)

    graph = two_draws()
    end = list(graph)
    graph = graph.with_nodes([*end, opaque("o", True), opaque("o_1", False), opaque("o_2", False)])
    assert [node.name for node in clean(graph).of(Opaque)] == ["o_1", "o_2"]


def test_a_declared_cost_stays_listed() -> None:
    graph = two_draws()
    declared = Cost(name="k", type=F32, value=Ref("d"), label="k", declared=True)
    assert "k" in eliminate_dead_code(graph.with_nodes([*graph, declared])).nodes
    undeclared = dataclasses.replace(declared, declared=False)
    assert "k" not in eliminate_dead_code(graph.with_nodes([*graph, undeclared])).nodes


def test_dead_operations_go_and_inputs_stay() -> None:
    graph = eliminate_dead_code(capture(lambda x, y: (y.exp() + torch.rand_like(y), x.sin())[1], X, X))
    assert names(graph) == ["sin"]
    assert len(graph) == 3

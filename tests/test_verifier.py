"""Each invariant is broken once, and the verifier names it, the pass and the user's line."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch.distributions import Bernoulli

from scg.errors import VerifyError
from scg.ir import Cost, Depends, Dist, Graph, LogProb, Node, Op, Param, Ref, Sample, TensorType
from scg.template import flatten
from scg.verifier import verify

aten = torch.ops.aten
F32 = TensorType(torch.float32, (3,))
SCALAR = TensorType(torch.float32, ())


def valid() -> Graph:
    template, (logits,) = flatten(Bernoulli(logits=torch.zeros(3)))
    nodes: list[Node] = [
        Param(name="l", type=F32, path="l", requires_grad=True),
        Param(name="count", type=SCALAR, path="count", role="buffer"),
        Dist(name="d", template=template, params=(Ref("l"),), loc="m.py:3"),
        Sample(name="z", type=F32, dist=Ref("d"), loc="m.py:4"),
        LogProb(name="p", type=F32, dist=Ref("d"), value=Ref("z"), loc="m.py:5"),
        Op(name="m", type=(F32, F32), target=aten.max.dim, args=(Ref("p"), 0), loc="m.py:6"),
        Op(name="g", type=F32, target=operator.getitem, args=(Ref("m"), 0), loc="m.py:6"),
        Cost(name="c", type=F32, value=Ref("p"), label="c", loc="m.py:7"),
        Op(name="s", type=SCALAR, target=aten.sum.default, args=(Ref("c"),), loc="m.py:8"),
        Op(name="w", type=SCALAR, target=aten.copy_.default, args=(Ref("count"), Ref("s")), loc="m.py:9"),
    ]
    table = {node.name: node for node in nodes}
    tensors = {"l": logits, "count": torch.zeros(())}
    return Graph(name="g", nodes=table, objective=Ref("s"), outputs=(Ref("s"), Ref("z")), tensors=tensors)


def change(name: str, **fields: object) -> Callable[[Graph], Graph]:
    return lambda graph: graph.replace(dataclasses.replace(graph[name], **fields))  # type: ignore[arg-type]


def add(node: Node) -> Callable[[Graph], Graph]:
    return lambda graph: graph.with_nodes([*graph, node])


ESTIMATOR = SimpleNamespace(name="score_function")
CREDITED = Sample(name="y", type=F32, dist=Ref("d"), credits=("c",), estimator=ESTIMATOR)

BROKEN: dict[str, tuple[Callable[[Graph], Graph], str]] = {
    "names": (
        lambda graph: dataclasses.replace(graph, nodes={**graph.nodes, "x": graph["s"]}),
        "%s (op f32[], m.py:8) is filed under the name %x",
    ),
    "order": (
        lambda graph: graph.with_nodes(reversed(list(graph))),
        "%w (op f32[], m.py:9) reads %count, which no earlier node defines",
    ),
    "outputs": (
        lambda graph: dataclasses.replace(graph, outputs=Ref("nowhere")),
        "the graph returns %nowhere, which no node defines",
    ),
    "objective": (
        lambda graph: dataclasses.replace(graph, objective=Ref("c")),
        "%c (cost f32[3], m.py:7) is the objective, but no scalar",
    ),
    "sample of a tensor": (
        change("z", dist=Ref("l")),
        "%z (sample f32[3], m.py:4) needs a distribution, but %l is a param",
    ),
    "operation on a distribution": (
        change("s", args=(Ref("d"),)),
        "%s (op f32[], m.py:8) reads the distribution %d as a tensor",
    ),
    "event dims": (
        change("z", type=dataclasses.replace(F32, event_ndim=1)),
        "%z (sample f32[ | 3], m.py:4) has 1 event dims, %d has 0",
    ),
    "sample shape": (change("z", sample_shape=(2,)), "%z (sample f32[3], m.py:4) has shape [3], but %d draws [2, 3]"),
    "getitem": (change("g", args=(Ref("m"), 2)), "%g (op f32[3], m.py:6) takes output 2 of %m, which has none such"),
    "no tensor": (
        lambda graph: dataclasses.replace(graph, tensors={"l": graph.tensors["l"]}),
        "%count (param f32[]) stands for count, but the graph has no such tensor",
    ),
    "wrong tensor": (
        lambda graph: dataclasses.replace(graph, tensors={**graph.tensors, "l": torch.zeros(2)}),
        "%l (param f32[3]) stands for l, a tensor torch.float32[2]",
    ),
    "depends": (
        add(Depends(name="k", type=F32, value=Ref("l"), on=Ref("p"))),
        "%k (depends f32[3]) declares an influence of %p, which is no site",
    ),
    "tail": (
        lambda graph: dataclasses.replace(graph, tail=frozenset({"gone"})),
        "the graph names %gone as part of the linear tail, but has no such node",
    ),
    "credits": (change("z", credits=("b",)), "%z (sample f32[3], m.py:4) is credited with 'b', which is no cost"),
    "estimators": (
        lambda graph: add(CREDITED)(change("z", credits=("c",))(graph)),
        "%z (sample f32[3], m.py:4) is credited with costs but has no estimator",
    ),
    "writes": (
        change("w", args=(Ref("p"), Ref("s"))),
        "%w (op f32[], m.py:9) writes in place (copy_)",
    ),
}


def test_a_valid_graph_is_returned() -> None:
    graph = valid()
    assert verify(graph, after="trace") is graph
    assert verify(graph, after="functionalize") is graph


@pytest.mark.parametrize("name", BROKEN)
def test_broken(name: str) -> None:
    damage, what = BROKEN[name]
    with pytest.raises(VerifyError) as caught:
        verify(damage(valid()), after="share")
    assert str(caught.value) == f"after share: {what}"
    assert caught.value.__notes__


def test_a_capture_may_hold_writes() -> None:
    verify(BROKEN["writes"][0](valid()), after="trace")


def test_the_note_is_a_window_on_the_graph() -> None:
    with pytest.raises(VerifyError) as caught:
        verify(change("z", sample_shape=(2,))(valid()), after="share")
    (note,) = caught.value.__notes__
    assert "%z     = sample  f32[3] %d  # m.py:4" in note

"""Constants are computed once, identities disappear, and what lives outside the graph is left alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from scg.ir import Op, Param
from scg.passes.fold import LARGEST, fold_constants
from tests.passes.tools import capture, check_rewrite, names

X = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(3, 4).requires_grad_()


def constants(graph: Any) -> list[Tensor]:
    return [graph.tensors[node.path] for node in graph.of(Param) if node.role == "constant"]


def test_index_tensors_become_known() -> None:
    graph = check_rewrite(fold_constants, lambda x: x[torch.arange(3).flip(0) % 2], X)
    assert names(graph) == ["index.Tensor"]
    torch.testing.assert_close(constants(graph)[-1], torch.tensor([0, 1, 0]))


def test_literals_are_constants() -> None:
    graph = check_rewrite(fold_constants, lambda x: x * (torch.tensor([1.0, 2, 3, 4], dtype=x.dtype) * 2 + 1), X)
    assert names(graph) == ["mul.Tensor"]


def test_noise_parameters_and_large_tensors_are_not_folded() -> None:
    def model(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return x.sum() + torch.rand(3).sum() + w.exp().sum() + b.exp().sum() + torch.zeros(LARGEST + 1).sum()

    params = {"w": torch.ones(2, requires_grad=True), "b": torch.ones(2)}
    graph = capture(model, X, params=params)
    assert fold_constants(graph) == graph


def test_a_returned_constant_stays_an_operation() -> None:
    graph = check_rewrite(fold_constants, lambda x: (x.sum(), torch.ones(3)), X)
    assert names(graph) == ["sum", "ones"], "the caller may write into what it is given"


def test_identities_are_removed() -> None:
    def model(x: Tensor) -> Tensor:
        y = x.sin().clone().contiguous().to(torch.float64).expand(3, 4).reshape(3, 4).view(3, 4)
        return F.dropout(F.dropout(y, 0.5, training=False), 0.0).squeeze(0) + 1

    assert names(check_rewrite(fold_constants, model, X)) == ["sin", "add.Tensor"]


def test_operations_that_change_something_are_kept() -> None:
    def model(x: Tensor) -> Tensor:
        y = x.to(torch.float32).detach() + x.reshape(4, 3).t().sum()
        return F.dropout(y, 0.5) * x.view(torch.int64)

    kept = ["to.dtype", "detach", "reshape", "t", "sum", "add.Tensor", "dropout", "view.dtype", "mul.Tensor"]
    assert names(fold_constants(capture(model, X))) == kept


def test_adding_zero_is_the_identity_where_the_type_stays() -> None:
    def model(x: Tensor) -> Tensor:
        total = 0.0 + x.sin()
        total = total + torch.zeros((), dtype=x.dtype) + x.cos()
        return total + 0 * x[0] + x[0].exp().add(torch.zeros(3, 1, dtype=x.dtype))

    graph = check_rewrite(fold_constants, model, X)
    assert [name for name in names(graph) if name == "add.Tensor"] == ["add.Tensor"] * 4  # the last one broadcasts


def test_views_become_reshapes_since_the_copy_before_them_may_go() -> None:
    graph = check_rewrite(fold_constants, lambda x: x.sin().t().contiguous().view(-1), X)
    assert names(graph) == ["sin", "t", "reshape"]


def test_broadcast_tensors_become_expands() -> None:
    def model(x: Tensor) -> Tensor:
        a, b = torch.broadcast_tensors(x, x[0])
        return a * b

    graph = check_rewrite(fold_constants, model, X)
    assert [name for name in names(graph) if name != "broadcast_tensors"] == ["select.int", "expand", "mul.Tensor"]


def test_a_copy_of_what_the_user_can_write_is_a_snapshot() -> None:
    def model(x: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return x.clone() * 2, b.clone()[0]

    graph = capture(model, X, params={"b": torch.ones(3)})
    assert names(fold_constants(graph)) == ["clone", "mul.Tensor", "clone", "select.int"]


def test_folded_values_have_their_own_memory() -> None:
    graph = fold_constants(capture(lambda x: x * torch.ones(2, 4)[0].to(x.dtype), X))
    folded = graph.tensors["to"]
    assert folded.untyped_storage().nbytes() == folded.numel() * folded.itemsize
    assert all(isinstance(node, (Op, Param)) for node in list(graph)[1:])

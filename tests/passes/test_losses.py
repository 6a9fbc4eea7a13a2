"""Unfused losses equal the fused ones in value and gradient, and end in a plain sum or mean."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from scg.passes.losses import unfuse_losses
from tests.passes.tools import capture, check_rewrite, names

Loss = Callable[..., Tensor]

torch.manual_seed(0)
X = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
Y = torch.randn(4, 3, dtype=torch.float64)
P = torch.rand(4, 3, dtype=torch.float64)
SIGN = Y.sign()
CLASS = torch.tensor([0, 2, 1, 2])
IGNORED = torch.tensor([0, -100, 1, 2])
IMAGE = torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
PIXEL = torch.randint(0, 3, (2, 4, 5))
WEIGHT = torch.tensor([0.5, 1.0, 3.0], dtype=torch.float64)

ELEMENTWISE: dict[str, tuple[Loss, tuple[Tensor, ...], dict[str, Any]]] = {
    "mse": (F.mse_loss, (X, Y), {}),
    "mse, broadcast by hand": (F.mse_loss, (X, Y[:1].expand(4, 3)), {}),
    "l1": (F.l1_loss, (X, Y), {}),
    "huber": (F.huber_loss, (X, Y), {"delta": 0.5}),
    "smooth_l1": (F.smooth_l1_loss, (X, Y), {"beta": 0.5}),
    "kl_div": (F.kl_div, (X, P), {}),
    "kl_div, log target": (F.kl_div, (X, Y), {"log_target": True}),
    "soft_margin": (F.soft_margin_loss, (X, SIGN), {}),
    "bce": (lambda x, y, **k: F.binary_cross_entropy(x.sigmoid(), y, **k), (X, P), {}),
    "bce, weighted": (lambda x, y, w, **k: F.binary_cross_entropy(x.sigmoid(), y, w, **k), (X, P, P.exp()), {}),
    "bce_with_logits": (F.binary_cross_entropy_with_logits, (X, P), {}),
    "bce_with_logits, weights": (
        lambda x, y, w, v, **k: F.binary_cross_entropy_with_logits(x, y, w, pos_weight=v, **k),
        (X, P, P.exp(), WEIGHT),
        {},
    ),
    "poisson_nll": (F.poisson_nll_loss, (X, P), {}),
    "poisson_nll, full": (F.poisson_nll_loss, (X, 5 * P), {"full": True}),
    "hinge_embedding": (F.hinge_embedding_loss, (X, SIGN), {}),
    "margin_ranking": (F.margin_ranking_loss, (X, Y, SIGN), {"margin": 0.1}),
    "multi_margin": (F.multi_margin_loss, (X, CLASS), {}),
    "multi_margin, weighted": (lambda x, y, w, **k: F.multi_margin_loss(x, y, weight=w, **k), (X, CLASS, WEIGHT), {}),
    "multilabel_margin": (F.multilabel_margin_loss, (X, torch.tensor([[0, 1, -1]] * 4)), {}),
    "multilabel_soft_margin": (F.multilabel_soft_margin_loss, (X, P.round()), {}),
    "cosine_embedding": (F.cosine_embedding_loss, (X, Y, SIGN[:, 0]), {}),
    "triplet_margin": (F.triplet_margin_loss, (X, Y, P), {}),
    "cross_entropy": (F.cross_entropy, (X, CLASS), {}),
    "cross_entropy, one": (F.cross_entropy, (X[0].detach().requires_grad_(), CLASS[0]), {}),
    "cross_entropy, ignored": (F.cross_entropy, (X, IGNORED), {}),
    "cross_entropy, ignored class": (F.cross_entropy, (X, CLASS), {"ignore_index": 2}),
    "cross_entropy, weights": (lambda x, y, w, **k: F.cross_entropy(x, y, w, **k), (X, IGNORED, WEIGHT), {}),
    "cross_entropy, smooth": (F.cross_entropy, (X, IGNORED), {"label_smoothing": 0.2}),
    "cross_entropy, smooth and weights": (
        lambda x, y, w, **k: F.cross_entropy(x, y, w, label_smoothing=0.2, **k),
        (X, IGNORED, WEIGHT),
        {},
    ),
    "cross_entropy, probabilities": (
        lambda x, y, w, **k: F.cross_entropy(x, y.softmax(-1), w, label_smoothing=0.1, **k),
        (X, Y, WEIGHT),
        {},
    ),
    "cross_entropy, pixels": (lambda x, y, w, **k: F.cross_entropy(x, y, w, **k), (IMAGE, PIXEL, WEIGHT), {}),
    "nll": (F.nll_loss, (X, IGNORED), {}),
    "nll, weights": (lambda x, y, w, **k: F.nll_loss(x, y, w, **k), (X, IGNORED, WEIGHT), {}),
    "nll, pixels": (F.nll_loss, (IMAGE, PIXEL), {"ignore_index": 1}),
}


@pytest.mark.filterwarnings("ignore:reduction")  # advice on kl_div
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("name", ELEMENTWISE)
def test_equals_the_fused_loss(name: str, reduction: str) -> None:
    loss, inputs, options = ELEMENTWISE[name]
    graph = check_rewrite(unfuse_losses, lambda *xs: loss(*xs, reduction=reduction, **options), *inputs)
    if reduction != "none":
        assert names(graph)[-1] in ("sum", "mean", "div.Tensor")


def test_text() -> None:
    graph = unfuse_losses(capture(lambda x, y: F.cross_entropy(x, y), X, CLASS))
    assert (
        str(graph)
        == """\
graph test(arg0_1, arg1_1) {
  %arg0_1                      = input f64[4, 3] arg0_1
  %arg1_1                      = input i64[4] arg1_1
  %cross_entropy_loss_elements = op    f64[4] cross_entropy_loss(%arg0_1, %arg1_1, reduction=0)  # t.py:1
  %cross_entropy_loss_ne       = op    bool[4] ne.Scalar(%arg1_1, -100)  # t.py:1
  %cross_entropy_loss_sum      = op    i64[] sum(%cross_entropy_loss_ne)  # t.py:1
  %cross_entropy_loss_sum_1    = op    f64[] sum(%cross_entropy_loss_elements)  # t.py:1
  %cross_entropy_loss          = op    f64[] div.Tensor(%cross_entropy_loss_sum_1, %cross_entropy_loss_sum)  # t.py:1
  return %cross_entropy_loss of %cross_entropy_loss
}"""
    )


def test_without_losses_the_graph_is_the_same_object() -> None:
    graph = capture(lambda x: x.exp().sum(), X)
    assert unfuse_losses(graph) is graph

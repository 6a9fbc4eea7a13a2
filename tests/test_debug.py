"""`SCG_DEBUG=1` shows what each pass changed."""

from __future__ import annotations

import io

import torch

from scg.debug import show_diff
from scg.passes.losses import unfuse_losses
from tests.passes.tools import capture


def shown(change: bool) -> str:
    graph = capture(lambda x: torch.nn.functional.mse_loss(x, x * 2), torch.ones(3))
    file = io.StringIO()
    show_diff(graph, unfuse_losses(graph) if change else graph, "unfuse_losses", file)
    return file.getvalue()


def test_a_change() -> None:
    lines = shown(True).splitlines()
    assert lines[:2] == ["--- before unfuse_losses", "+++ after unfuse_losses"]
    removed, added = ([line for line in lines[3:] if line.startswith(sign)] for sign in "-+")
    assert any("mse_loss(" in line for line in removed)
    assert any("mean(%mse_loss_elements)" in line for line in added)


def test_no_change() -> None:
    assert shown(False) == "unfuse_losses: nothing changed\n"

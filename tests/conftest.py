"""What every test starts from: one thread, a fixed seed, and no second copy of a linked package afterwards."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _same_start() -> Iterator[None]:
    torch.manual_seed(0)
    yield
    assert "passes" not in sys.modules and "backends" not in sys.modules, "import scg.passes, scg.backends"

"""Random finite programs: whatever estimator each site has, value and gradient are the exact ones in expectation.

``SCG_FUZZ=2000:9000 pytest tests/test_fuzz.py -k many`` runs other seeds.
"""

from __future__ import annotations

import math
import os
from typing import Any

import pytest
import torch

import scg
from scg.capture import captured
from scg.exact import Walk
from tests.fuzz import Program, Writer
from tests.law2 import ForcedDraws, expected_estimate

FIRST, LAST = map(int, os.environ.get("SCG_FUZZ", "300:1200").split(":"))
"""Seeds of the long run."""

BUNDLE = 20
"""Seeds a test."""


def _joint_draws(compiled: Any) -> float:
    """How many joint draws the compiled step has."""
    walk = Walk()
    walk.more()
    try:
        with ForcedDraws(walk):
            compiled()
    except scg.EstimatorError:  # over the limit
        return math.inf
    return walk.outcomes


def _check(program: Program, most_draws: int) -> None:
    model = program.model()
    for variant in program.simpler():
        compiled = scg.compile(model, estimators=variant.estimators, samples=variant.samples)
        compiled()  # traced, and moving averages have a history
        if _joint_draws(compiled) <= most_draws:
            break
    params = {name: p for name, p in captured(model).tensors.items() if p.requires_grad}
    compiled()
    torch.testing.assert_close(expected_estimate(compiled, params), scg.exact(model), rtol=1e-8, atol=1e-9)


def _check_seeds(first: int, most_draws: int) -> None:
    for seed in range(first, first + BUNDLE):
        program = Writer(seed).write()
        try:
            _check(program, most_draws)
        except Exception as error:
            error.add_note(f"seed {seed}, samples={program.samples}, {program.estimators}:\n{program.source}")
            raise


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("first", range(0, 300, BUNDLE))
def test_unbiased(first: int) -> None:
    _check_seeds(first, most_draws=64)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("first", range(FIRST, LAST, BUNDLE))
def test_many_unbiased(first: int) -> None:
    _check_seeds(first, most_draws=600)

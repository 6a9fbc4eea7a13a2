"""Law 2: every estimator, with every baseline, on every finite program, equals the exact gradient in expectation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from scg.estimators.score_function import ScoreFunction
from tests.law2 import assert_unbiased
from tests.problems import PROBLEMS

VARIANTS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "auto": ("auto", (1, 2)),
    "score_function": (ScoreFunction(baseline=None), (1, 2)),
    "moving_average": (ScoreFunction(baseline="moving_average"), (1, 2)),
    "leave_one_out": (ScoreFunction(baseline="leave_one_out"), (2, 3)),
    "enumerate": ("enumerate", (1, 2)),
}
"""Label -> (default estimator, numbers of samples K)."""

QUICK_BITS = 8
"""log2 of the number of joint draws that the quick tests sum over."""


def _cases() -> Iterator[Any]:
    for name, make in PROBLEMS.items():
        for label, (estimator, samples) in VARIANTS.items():
            for K in samples:
                bits = 1 if label == "enumerate" else K * make().bits
                marks = [pytest.mark.slow] if bits > QUICK_BITS else []
                yield pytest.param(name, estimator, K, marks=marks, id=f"{name}-{label}-K{K}")


@pytest.mark.parametrize(("name", "estimator", "K"), list(_cases()))
def test_unbiased(name: str, estimator: Any, K: int) -> None:
    problem = PROBLEMS[name]()
    assert_unbiased(problem, estimator=estimator, estimators=problem.estimators, samples=K)


@pytest.mark.parametrize("credit", ["element", "node", "none"])
@pytest.mark.parametrize("name", ["chain", "unrolled_loop", "tied_batch", "sampled_mask", "detached"])
def test_every_granularity_of_credit_is_unbiased(name: str, credit: str) -> None:
    assert_unbiased(PROBLEMS[name](), estimator=ScoreFunction(baseline=None), credit=credit)

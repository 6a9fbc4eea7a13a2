"""The registry of gradient estimators: one file each, an explicit dict, nothing registered by import order."""

from __future__ import annotations

from typing import Any

from scg.errors import EstimatorError
from scg.estimators.arm import ARM
from scg.estimators.arms import ARMS
from scg.estimators.base import Estimator
from scg.estimators.decoupled_st import DecoupledST
from scg.estimators.disarm import DisARM
from scg.estimators.enumerate_ import Enumerate
from scg.estimators.gumbel_rao import GumbelRao
from scg.estimators.gumbel_softmax import GumbelSoftmax
from scg.estimators.local_expectation import LocalExpectation
from scg.estimators.lookup import near_miss
from scg.estimators.measure_valued import MeasureValued
from scg.estimators.reinmax import ReinMax
from scg.estimators.reparam import Reparam
from scg.estimators.score_function import ScoreFunction
from scg.estimators.straight_through import StraightThrough
from scg.estimators.sum_and_sample import SumAndSample
from scg.estimators.unordered_set import UnorderedSet
from scg.estimators.without_replacement import WithoutReplacement

_UNBIASED: tuple[type[Estimator], ...] = (Reparam, ScoreFunction, Enumerate)
_SINGLE_CHANGES: tuple[type[Estimator], ...] = (LocalExpectation, MeasureValued)
_RELAXATIONS: tuple[type[Estimator], ...] = (GumbelSoftmax, StraightThrough, ReinMax, GumbelRao, DecoupledST)
_ANTITHETIC: tuple[type[Estimator], ...] = (DisARM, ARM, ARMS)
_SUBSETS: tuple[type[Estimator], ...] = (UnorderedSet, WithoutReplacement, SumAndSample)

ESTIMATORS: dict[str, type[Estimator]] = {
    e.name: e for e in (*_UNBIASED, *_SINGLE_CHANGES, *_ANTITHETIC, *_SUBSETS, *_RELAXATIONS)
}
"""Name to class. Your own: ``ESTIMATORS["mine"] = Mine``, or pass an instance as ``estimator=``."""

AUTO = "auto"
"""Choose by smoothness and support: reparam, else exact enumeration, else score function."""


def get_estimator(spec: Any) -> Estimator | None:
    """The estimator object for a name or an object; None for ``"auto"``.

    Raises:
        EstimatorError: for an unknown name, with the near miss and all known ones.
    """
    if isinstance(spec, Estimator):
        return spec
    if spec is None or spec == AUTO:
        return None
    if isinstance(spec, type) and issubclass(spec, Estimator):
        return spec()
    if isinstance(spec, str) and spec in ESTIMATORS:
        return ESTIMATORS[spec]()
    raise EstimatorError(near_miss("estimator", spec, [AUTO, *ESTIMATORS]))


__all__ = ["AUTO", "ESTIMATORS", "Estimator", "get_estimator"]

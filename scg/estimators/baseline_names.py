"""The registry of baselines."""

from __future__ import annotations

from scg.estimators.baselines import Baseline, Constant, LeaveOneOut, MovingAverage, NoBaseline
from scg.estimators.learned import InputDependent, Learned
from scg.estimators.optimal_scale import OptimalScale
from scg.estimators.self_critic import SelfCritic

BASELINES: dict[str, type[Baseline]] = {
    cls.name: cls
    for cls in (NoBaseline, Constant, MovingAverage, LeaveOneOut, OptimalScale, SelfCritic, Learned, InputDependent)
}
"""Name to class of the built-in baselines."""

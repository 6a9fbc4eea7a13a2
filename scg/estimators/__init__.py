"""The registry of gradient estimators: one file each, an explicit dict, nothing registered by import order."""

from __future__ import annotations

from typing import Any

from scg.errors import EstimatorError
from scg.estimators.actor_critic import ActorCritic
from scg.estimators.arm import ARM
from scg.estimators.arms import ARMS
from scg.estimators.arsm import ARSM
from scg.estimators.base import Estimator
from scg.estimators.bitflip import BitFlip
from scg.estimators.carms import CARMS
from scg.estimators.clipped_surrogate import ClippedSurrogate
from scg.estimators.critic import Critic, CriticOnly, GradientCritic
from scg.estimators.decoupled_st import DecoupledST
from scg.estimators.disarm import DisARM
from scg.estimators.double_cv import DoubleCV
from scg.estimators.dreg import DReG
from scg.estimators.enumerate_ import Enumerate
from scg.estimators.go_gradient import GoGradient
from scg.estimators.group_relative import GroupRelative
from scg.estimators.gumbel_rao import GumbelRao
from scg.estimators.gumbel_softmax import GumbelSoftmax
from scg.estimators.hnca import HNCA
from scg.estimators.importance_weighted import ImportanceWeighted
from scg.estimators.indecater import IndeCateR
from scg.estimators.lax import Lax
from scg.estimators.local_expectation import LocalExpectation
from scg.estimators.lookup import near_miss
from scg.estimators.mapo import Mapo
from scg.estimators.measure_valued import MeasureValued
from scg.estimators.muprop import MuProp
from scg.estimators.nvil import NVIL
from scg.estimators.reinmax import ReinMax
from scg.estimators.relax import Rebar, Relax
from scg.estimators.reparam import Reparam
from scg.estimators.rodeo import Rodeo
from scg.estimators.score_function import ScoreFunction
from scg.estimators.spsa import SPSA
from scg.estimators.stochastic_ad import StochasticAD
from scg.estimators.straight_through import StraightThrough
from scg.estimators.sum_and_sample import SumAndSample
from scg.estimators.unordered_set import UnorderedSet
from scg.estimators.without_replacement import WithoutReplacement

GROUPS: dict[str, tuple[type[Estimator], ...]] = {
    "The three that `auto` chooses from": (Reparam, ScoreFunction, Enumerate),
    "Single changes of the draw": (LocalExpectation, HNCA, MeasureValued, IndeCateR, BitFlip, StochasticAD, GoGradient),
    "Antithetic draws": (DisARM, ARM, ARMS, ARSM, CARMS),
    "Draws without replacement": (UnorderedSet, WithoutReplacement, SumAndSample, Mapo),
    "Control variates": (Relax, Rebar, Lax, MuProp, DoubleCV, Rodeo),
    "Critics": (Critic, ActorCritic, CriticOnly, GradientCritic, NVIL),
    "Replayed draws": (ImportanceWeighted, ClippedSurrogate, GroupRelative),
    "Relaxations": (GumbelSoftmax, StraightThrough, ReinMax, GumbelRao, DecoupledST),
    "Multi-sample bounds": (DReG,),
    "Finite differences": (SPSA,),
}
"""The built-in estimators as the documentation orders them."""

ESTIMATORS: dict[str, type[Estimator]] = {cls.name: cls for group in GROUPS.values() for cls in group}
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


__all__ = ["AUTO", "ESTIMATORS", "GROUPS", "Estimator", "get_estimator"]

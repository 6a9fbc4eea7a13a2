"""One model an estimator: for scg as anybody would write it, and by hand with the estimator in its loss.

The hand-written losses draw as scg draws, so that with one seed the gradients are equal; a constant in their value that
has no gradient is left out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.by_hand import (
    bounds,
    control_variates,
    coupled,
    critics,
    plain,
    relaxations,
    replayed,
    sets,
    single_changes,
)
from benchmarks.by_hand.models import Bits, BitsBound, FewBits, Gaussian, GaussianBound, Layers, Mixture, Tokens
from scg.estimators.baselines import LeaveOneOut
from scg.estimators.clipped_surrogate import ClippedSurrogate
from scg.estimators.group_relative import GroupRelative, Standardised
from scg.estimators.importance_weighted import ImportanceWeighted


def images(model: nn.Module, batch: int) -> tuple[Tensor, ...]:
    pixels = next(model.children()).in_features
    assert isinstance(pixels, int)
    return ((torch.rand(batch, pixels) < 0.3).float(),)


@dataclass(frozen=True)
class Case:
    """An estimator's name is its key in `CASES`, where none is given."""

    model: Callable[..., nn.Module]
    by_hand: Callable[..., Tensor]
    """The loss, given model, inputs and the learned parts of the estimator."""
    samples: int = 1
    batch: int = 100
    """More where a step would take less than 5 ms."""
    estimator: Any = None
    inputs: Callable[[Any, int], tuple[Tensor, ...]] = images
    """Given the model and the size of the batch."""
    small: tuple[int, ...] = (6, 3, 5)
    """Sizes of the model for a test."""


CASES: dict[str, Case] = {
    "score_function": Case(Bits, plain.score_function, samples=4),
    "reparam": Case(Gaussian, plain.reparam, batch=200),
    "enumerate": Case(Mixture, sets.enumerate_),
    "gumbel_softmax": Case(Bits, relaxations.gumbel_softmax, batch=200),
    "straight_through": Case(Bits, relaxations.straight_through, batch=200),
    "reinmax": Case(Bits, relaxations.reinmax, batch=200),
    "gumbel_rao": Case(Bits, relaxations.gumbel_rao),
    "decoupled_st": Case(Bits, relaxations.decoupled_st, batch=200),
    "disarm": Case(Bits, coupled.disarm),
    "arm": Case(Bits, coupled.arm),
    "arms": Case(Bits, coupled.arms),
    "carms": Case(Mixture, coupled.carms),
    "arsm": Case(Mixture, coupled.arsm),
    "rebar": Case(Bits, control_variates.relax),
    "relax": Case(Bits, control_variates.relax),
    "muprop": Case(Bits, control_variates.muprop),
    "double_cv": Case(Bits, control_variates.double_cv, samples=2),
    "rodeo": Case(FewBits, control_variates.rodeo, samples=2),
    "lax": Case(Gaussian, control_variates.lax, batch=200),
    "nvil": Case(Bits, critics.nvil),
    "actor_critic": Case(Bits, critics.actor_critic),
    "critic": Case(Bits, critics.critic),
    "critic_only": Case(Bits, critics.critic_only),
    "gradient_critic": Case(Gaussian, critics.gradient_critic, batch=200),
    "unordered_set": Case(Mixture, sets.unordered_set),
    "without_replacement": Case(Mixture, sets.without_replacement),
    "sum_and_sample": Case(Mixture, sets.sum_and_sample),
    "mapo": Case(Mixture, sets.mapo, small=(6, 5, 5)),
    "local_expectation": Case(FewBits, single_changes.local_expectation),
    "measure_valued": Case(Gaussian, single_changes.measure_valued),
    "hnca": Case(Layers, single_changes.hnca),
    "bitflip": Case(Bits, single_changes.bitflip),
    "indecater": Case(FewBits, single_changes.indecater),
    "stochastic_ad": Case(Bits, single_changes.stochastic_ad),
    "go_gradient": Case(FewBits, single_changes.go_gradient),
    "spsa": Case(Bits, single_changes.spsa),
    "vimco": Case(BitsBound, bounds.vimco, samples=4, estimator="score_function"),
    "iwae": Case(GaussianBound, bounds.iwae, samples=4, estimator="reparam"),
    "dreg": Case(GaussianBound, bounds.dreg, samples=4),
    "importance_weighted": Case(
        Tokens,
        replayed.importance_weighted,
        batch=8,
        estimator=ImportanceWeighted(LeaveOneOut(group=1)),
        inputs=replayed.answers,
        small=(5, 8),
    ),
    "clipped_surrogate": Case(
        Tokens,
        replayed.clipped_surrogate,
        batch=8,
        estimator=ClippedSurrogate(LeaveOneOut(group=1)),
        inputs=replayed.answers,
        small=(5, 8),
    ),
    "group_relative": Case(
        Tokens,
        replayed.group_relative,
        batch=8,
        estimator=GroupRelative(Standardised(group=1), lengths="lengths", behaviour="behaviour"),
        inputs=replayed.answers,
        small=(5, 8),
    ),
}

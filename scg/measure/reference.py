r"""What a gradient should be: exactly where the program is finite, else from many draws of something simpler.

.. math:: \text{central difference:} \quad
          \frac{1}{2h} \left( \ell_{\theta + h}(\omega) - \ell_{\theta - h}(\omega) \right), \quad \omega \text{ common}
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from scg.capture import captured
from scg.errors import EstimatorError, ScgError
from scg.estimators.score_function import ScoreFunction
from scg.exact import exact_within, kept_state, objective_of
from scg.ir import Sample
from scg.measure.draws import Estimates, Moments, model_parameters, original, traced
from scg.measure.sites import candidates, variant
from scg.pipeline import CompiledModule

METHODS = ("auto", "exact", "score_function", "finite_differences")

OUTCOMES = 4096
"""Most joint outcomes that are summed: about four seconds."""

ROWS = 16
"""Draws of the whole program that one replica of the score function averages, for the sake of speed."""

COORDINATES = 16
"""Most parameter elements that are shifted for finite differences, two runs of the model each."""

STEP = 0.01
"""Of the finite differences: its square is their bias, and jumps pass it often enough to be seen."""


@dataclass(frozen=True)
class Reference:
    """A gradient to compare with."""

    gradient: dict[str, Tensor]
    """By parameter, float64; NaN where it is not known."""
    error: dict[str, Tensor]
    """Its standard error, zero where it is exact."""
    method: str
    """How it was found, for people."""


def find_reference(
    compiled: CompiledModule, args: tuple[Any, ...], kwargs: Mapping[str, Any], *, n: int, method: Any = "auto"
) -> Reference:
    """The gradient that ``compiled`` should have.

    Args:
        compiled: traced.
        args, kwargs: what it is called with.
        n: replicas, where it is not exact.
        method: one of `METHODS`, or the gradient itself by parameter. ``"auto"`` takes the exact sum, else the score
            function with no credit assignment, else finite differences with common random numbers.

    Raises:
        EstimatorError: no method fits the program.
    """
    if isinstance(method, Mapping):
        params = model_parameters(compiled)
        unknown = {name: torch.full_like(p, torch.nan, dtype=torch.float64) for name, p in params.items()}
        return _known({**unknown, **{name: value.detach().double() for name, value in method.items()}}, "as given")
    if method not in METHODS:
        raise EstimatorError(f"reference={method!r} must be one of {', '.join(METHODS)}, or gradients by parameter")
    finders: dict[str, Callable[[], Reference]] = {
        "exact": lambda: _exact(compiled, args, kwargs),
        "score_function": lambda: _score_function(compiled, args, kwargs, n),
        "finite_differences": lambda: _finite_differences(compiled, args, kwargs, max(n // 4, 2)),
    }
    if method != "auto":
        return finders[method]()
    reasons = []
    for name, find in finders.items():
        try:
            return find()
        except ScgError as error:
            reasons.append(f"  {name}: {str(error).splitlines()[0]}")
    raise EstimatorError(
        "there is nothing to compare the gradient with; give it as reference={parameter: gradient}.\n"
        + "\n".join(reasons)
    )


def _known(gradient: dict[str, Tensor], method: str) -> Reference:
    return Reference(gradient, {name: torch.zeros_like(g) for name, g in gradient.items()}, method)


def _exact(compiled: CompiledModule, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Reference:
    _, gradient = exact_within(OUTCOMES, original(compiled), args, kwargs)
    params = model_parameters(compiled)
    return _known({name: gradient[name].double() for name in params}, "the exact sum over all outcomes")


def _score_function(compiled: CompiledModule, args: tuple[Any, ...], kwargs: Mapping[str, Any], n: int) -> Reference:
    """Many replicas, each charged with the whole loss; credit by element only where ``rsample`` is partly stopped."""
    baseline, samples = "leave_one_out", ROWS
    if any(isinstance(node, Sample) and node.value is not None for node in compiled.graph):
        baseline, samples = "moving_average", 1  # a replayed draw is one draw
    sites = candidates(compiled, args, kwargs)
    score = {name: ScoreFunction(baseline=baseline) for name in sites}
    simple = traced(variant(compiled, estimators=score, samples=samples, credit="none"), args, kwargs)
    estimates = Estimates(simple, args, kwargs, warm_up=5)
    estimates.take(n)
    moments = estimates.moments
    return Reference(moments.mean, moments.error(), f"the score function, {n * samples:,} draws")


def _finite_differences(
    compiled: CompiledModule, args: tuple[Any, ...], kwargs: Mapping[str, Any], n: int
) -> Reference:
    if any(info.pathwise_only for info in candidates(compiled, args, kwargs).values()):
        raise EstimatorError("finite differences do not see stop-gradients, and a site's rsample is partly stopped")
    params = model_parameters(compiled)
    modules = list(captured(original(compiled)).modules.values())
    places = _places(params)
    moments = Moments({name: torch.empty(len(chosen)) for name, chosen in places.items()})

    def loss(seed: int) -> Tensor:
        torch.manual_seed(seed)
        with kept_state(modules):
            return objective_of(original(compiled)(*args, **kwargs)).double()

    def slope(flat: Tensor, place: int, seed: int) -> Tensor:
        kept = flat[place].clone()
        try:
            flat[place] = kept + STEP
            above, ahead = loss(seed), float(flat[place])
            flat[place] = kept - STEP
            return (above - loss(seed)) / (ahead - float(flat[place]))  # the step as it was rounded
        finally:
            flat[place] = kept

    with torch.no_grad():
        seeds = torch.randint(2**62, (n,)).tolist()
        for seed in seeds:
            moments.add(
                {
                    name: torch.stack([slope(params[name].view(-1), place, seed) for place in chosen])
                    for name, chosen in places.items()
                }
            )
    gradient = {name: torch.full_like(param, torch.nan, dtype=torch.float64) for name, param in params.items()}
    error = {name: torch.zeros_like(unknown) for name, unknown in gradient.items()}
    for name, chosen in places.items():
        gradient[name].view(-1)[chosen] = moments.mean[name]
        error[name].view(-1)[chosen] = moments.error()[name]
    return Reference(gradient, error, f"finite differences, {n:,} pairs with common random numbers")


def _places(params: Mapping[str, Tensor]) -> dict[str, list[int]]:
    """A few flat positions of each parameter, evenly spread."""
    each = max(1, COORDINATES // max(1, len(params)))
    return {
        name: torch.linspace(0, p.numel() - 1, min(each, p.numel())).long().tolist()
        for name, p in params.items()
        if p.numel()
    }


__all__ = ["METHODS", "Reference", "find_reference"]

"""Settings measured side by side: each gets its turn, so that a busy machine slows all of them alike.

The figure of merit is the work-normalised variance, the total variance of the gradient times the seconds of a step: the
smaller it is, the fewer seconds a given accuracy of the gradient takes. Far from an optimum the second moment takes its
place, which bounds the seconds that stochastic gradient descent takes (Geffner and Domke 2020).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from scg.errors import ScgError
from scg.estimators import Estimator
from scg.exact import exact_within
from scg.ir import Sample
from scg.measure.draws import Estimates, model_parameters, original, traced
from scg.measure.sites import label, variant
from scg.measure.work import peak_bytes
from scg.pipeline import CompiledModule

FIRST = 8
"""Estimates that every setting gets: fewer say nothing of a variance."""

WARM_UP = 10
"""Calls before a setting is measured: moving averages gather a history, the allocator its blocks."""

OUTCOMES = 1024
"""Most joint outcomes that are summed for an exact reference."""


@dataclass(frozen=True)
class Setting:
    """One choice: an estimator for every site and a number of samples."""

    label: str
    estimators: Mapping[str, Any]
    """By site; the rest is left to ``auto``."""
    samples: int

    def __str__(self) -> str:
        return f"{self.label}, K={self.samples}"


@dataclass(frozen=True)
class Measured:
    """What one setting's gradient estimates are like."""

    setting: Setting
    unbiased: bool
    """Whether every estimator in it says so."""
    draws: int
    seconds: float
    """Of a forward and backward pass, the fastest seen: whatever else the machine does only adds."""
    memory: int
    """The most bytes that a step holds."""
    compile_seconds: float
    variances: Mapping[str, float]
    """By parameter, summed over its elements."""
    biases: Mapping[str, float]
    """By parameter, the length of the bias without what is noise; empty where there is nothing to compare with."""
    bias_error: float
    """The length that noise alone gives the whole bias."""
    power: float
    """Squared length of the mean gradient, without what is noise."""

    @property
    def variance(self) -> float:
        """Of one estimate, summed over all parameters."""
        return math.fsum(self.variances.values())

    @property
    def bias(self) -> float | None:
        """The length of the bias of the whole gradient."""
        return math.hypot(*self.biases.values()) if self.biases else None

    @property
    def work(self) -> float:
        """Work-normalised variance, seconds times variance; of a biased estimator, times its mean squared error."""
        squared = 0.0 if self.unbiased else (self.bias or 0.0) ** 2
        return self.seconds * (self.variance + squared)

    @property
    def second_moment(self) -> float:
        """Seconds times the expected squared length of the gradient, what bounds the steps that SGD needs."""
        return self.work + self.seconds * self.power


@dataclass
class Runner:
    """One setting, compiled, with its estimates so far."""

    setting: Setting
    resolved: Mapping[str, Estimator | None]
    """What stands at each site, those left to ``auto`` included."""
    estimates: Estimates
    memory: int
    compile_seconds: float

    @property
    def unbiased(self) -> bool:
        """Whether every estimator in it says so."""
        return all(estimator is None or estimator.unbiased for estimator in self.resolved.values())

    @property
    def seconds(self) -> float:
        """Of a step, the fastest."""
        return min(self.estimates.seconds)

    def sums(self) -> dict[str, float]:
        """Variance by parameter; what is rounding is zero."""
        moments = self.estimates.moments
        size = max((float(mean.abs().max()) for mean in moments.mean.values() if mean.numel()), default=0.0)
        dust = {name: mean.numel() * (1e-6 * size) ** 2 for name, mean in moments.mean.items()}
        found = {name: float(variance.sum()) for name, variance in moments.variance().items()}
        return {name: value if value > dust[name] else 0.0 for name, value in found.items()}


@dataclass
class Race:
    """Settings of one compiled call, measured in turns.

    Args:
        compiled: the model with the options that all settings share.
        args, kwargs: what it is called with.
        most: estimates a setting, at most.
    """

    compiled: CompiledModule
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    most: int
    runners: list[Runner] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)
    """Why a setting does not run, by its text."""
    tick: Callable[[], object] = lambda: None
    """Called whenever something was measured."""

    def enter(self, setting: Setting) -> Runner | None:
        """Compiles and warms up a setting; the one already there for the same program under another name.

        None, with the reason in `refused`, where it cannot be done.
        """
        start = time.perf_counter()
        compiled = variant(self.compiled, estimator="auto", estimators=setting.estimators, samples=setting.samples)
        try:
            traced(compiled, self.args, self.kwargs)
            took = time.perf_counter() - start
            resolved = {site.name: site.estimator for site in compiled.graph.of(Sample)}
            for known in self.runners:
                if known.resolved == resolved and known.setting.samples == setting.samples:
                    if known.setting.label != setting.label:
                        self.refused[str(setting)] = f"the same program as {known.setting.label}"
                    return known
            estimates = Estimates(compiled, self.args, self.kwargs, WARM_UP)
        except (ScgError, NotImplementedError) as error:
            self.refused[str(setting)] = str(error).splitlines()[0]
            return None
        device = next((param.device for param in estimates.params.values()), torch.device("cpu"))
        runner = Runner(setting, resolved, estimates, peak_bytes(estimates.step, device), took)
        estimates.take(FIRST)
        self.runners.append(runner)
        self.tick()
        return runner

    def run(self, runners: Sequence[Runner], seconds: float) -> None:
        """Gives each runner its turns until the time is over or all have enough."""
        end = time.perf_counter() + seconds
        each = seconds / max(1, len(runners)) / 10
        while waiting := [runner for runner in runners if runner.estimates.moments.n < self.most]:
            for runner in waiting:
                n = int(max(1, min(each / runner.seconds, self.most - runner.estimates.moments.n)))
                runner.estimates.take(n)
                self.tick()
                if time.perf_counter() > end:
                    return

    def results(self) -> list[Measured]:
        """All that ran, the least work-normalised variance first, equals by their time."""
        truth = self._truth()
        found = [self._measured(runner, truth) for runner in self.runners]
        return sorted(found, key=lambda row: (row.work, row.seconds))

    def _measured(self, runner: Runner, truth: tuple[dict[str, Tensor], dict[str, Tensor]] | None) -> Measured:
        moments = runner.estimates.moments
        biases: dict[str, float] = {}
        error = moments.error()
        noise_power = math.fsum(float((e**2).sum()) for e in error.values())
        power = math.fsum(float((mean**2).sum()) for mean in moments.mean.values()) - noise_power
        bias_error = 0.0
        if truth is not None:
            gradient, noise = truth
            bias_error = math.sqrt(noise_power + math.fsum(float((e**2).sum()) for e in noise.values()))
            for name, mean in moments.mean.items():
                squared = (mean - gradient[name]) ** 2 - error[name] ** 2 - noise[name] ** 2
                biases[name] = math.sqrt(max(0.0, float(squared.sum())))
        return Measured(
            setting=runner.setting,
            unbiased=runner.unbiased,
            draws=moments.n,
            seconds=runner.seconds,
            memory=runner.memory,
            compile_seconds=runner.compile_seconds,
            variances=runner.sums(),
            biases=biases,
            bias_error=bias_error,
            power=max(0.0, power),
        )

    def _truth(self) -> tuple[dict[str, Tensor], dict[str, Tensor]] | None:
        """The gradient with its standard error: exact where that is cheap, else the mean of all unbiased estimates."""
        names = list(model_parameters(self.compiled))
        if self._exact is not None:
            return self._exact, {name: torch.zeros_like(self._exact[name]) for name in names}
        moments = [runner.estimates.moments for runner in self.runners if runner.unbiased]
        noise = [math.fsum(float((e**2).sum()) for e in m.error().values()) for m in moments]
        if not moments:
            return None
        weights = [1 / max(value, 1e-30) for value in noise]
        total = math.fsum(weights)
        shares = [weight / total for weight in weights]
        mean = {name: sum(s * m.mean[name] for s, m in zip(shares, moments, strict=True)) for name in names}
        error = {
            name: sum((s * m.error()[name]) ** 2 for s, m in zip(shares, moments, strict=True)) ** 0.5 for name in names
        }
        return mean, error  # type: ignore[return-value]

    def __post_init__(self) -> None:
        self._exact: dict[str, Tensor] | None = None
        try:
            _, gradient = exact_within(OUTCOMES, original(self.compiled), self.args, self.kwargs)
        except ScgError:
            return
        self._exact = {name: gradient[name].double() for name in model_parameters(self.compiled)}


def uniform(estimator: Any, fitting: Iterable[str], samples: int) -> Setting:
    """One estimator at all sites that it fits."""
    return Setting(label(estimator), {name: estimator for name in fitting}, samples)

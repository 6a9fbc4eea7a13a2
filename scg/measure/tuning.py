"""`autotune`: the estimator of each site and the number of samples, chosen by measuring."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from scg.errors import EstimatorError
from scg.estimators import ESTIMATORS
from scg.estimators.base import SiteInfo
from scg.estimators.lookup import near_miss
from scg.ir import Sample
from scg.measure.comparison import Comparison, as_compiled, progress_bar, setting_of
from scg.measure.draws import traced, untouched
from scg.measure.race import Measured, Race, Runner, Setting
from scg.measure.sites import candidates, every_estimator
from scg.pipeline import CompiledModule, compile

CRITERIA: dict[str, Callable[[Measured], tuple[float, float]]] = {
    "work": lambda row: (row.work, row.seconds),
    "second_moment": lambda row: (row.second_moment, row.seconds),
}
"""What is made small, equals by their time."""

FINALISTS = 4
"""Settings that are measured to the end."""


@dataclass(frozen=True)
class Tuned:
    """The choice, ready for `scg.compile`, and everything that was measured on the way."""

    arguments: dict[str, Any]
    """``scg.compile(model, **arguments)``."""
    choice: Measured
    comparison: Comparison
    reasons: tuple[str, ...]
    """What was decided and why, whole sentences."""

    def compile(self, model: Callable[..., Any], **options: Any) -> CompiledModule:
        """``scg.compile`` with the chosen arguments and your other options."""
        return compile(model, **self.arguments, **options)

    def __str__(self) -> str:
        return "\n".join([*self.reasons, "", str(self.comparison)])

    def _repr_html_(self) -> str:
        return f"<p>{'<br>'.join(self.reasons)}</p>{self.comparison._repr_html_()}"


def autotune(
    model: Callable[..., Any],
    *args: Any,
    budget: float = 40.0,
    estimators: Iterable[Any] | None = None,
    samples: Sequence[int] = (1, 2, 4, 8),
    allow_biased: bool = False,
    criterion: str = "work",
    seed: int = 0,
    progress: bool = True,
    **kwargs: Any,
) -> Tuned:
    """Chooses estimators and samples by work-normalised variance: variance of the gradient times seconds of a step.

    Every estimator is tried at all sites that it fits; then, from the best, each site on its own; then numbers of
    samples. Half of the field is dropped at each round, so that the time goes to those that are close. Run it again
    during training: what is best changes as the distributions sharpen.

    Args:
        model: as for `scg.compile`, or what it returned: its other options are kept, and its own choice takes part.
        *args, **kwargs: what it is called with: a typical batch.
        budget: seconds in all, about.
        estimators: what to choose from, names or objects; by default all registered ones.
        samples: numbers of samples K to choose from. Give what fits your memory.
        allow_biased: let biased estimators take part, by their mean squared error.
        criterion: ``"work"`` (variance times seconds), or ``"second_moment"`` (expected squared length of the gradient
            times seconds: far from an optimum an exact gradient is not worth any price; Geffner and Domke 2020).
        seed: of the random number generator, for these draws only.
        progress: show a bar, where tqdm is installed and the output is a terminal.

    Raises:
        EstimatorError: nothing fits.
    """
    if criterion not in CRITERIA:
        raise EstimatorError(near_miss("criterion", criterion, CRITERIA))
    compiled = traced(as_compiled(model), args, kwargs)
    specs = ["auto", *(every_estimator() if estimators is None else estimators)]
    with untouched(compiled, seed=seed), progress_bar(0, progress) as tick:
        race = Race(compiled, args, kwargs, most=4000, tick=tick)
        infos = candidates(compiled, args, kwargs)
        search = _Search(race, infos, specs, tuple(samples), allow_biased, CRITERIA[criterion], budget)
        reasons = search.run(_incumbent(compiled))
        rows = [row for row in race.results() if row.unbiased or allow_biased]
    last = sorted((row for row in rows if row.setting in search.finalists), key=CRITERIA[criterion])
    exact = [row for row in last if row.work == last[0].work == 0]  # of these more draws are no better
    choice = min(exact or last[:1], key=lambda row: (row.setting.samples, row.seconds))
    reasons.append(f"chosen: {choice.setting}; variance {choice.variance:.3g}, {1e3 * choice.seconds:.3g} ms a step.")
    comparison = Comparison(compiled.graph.name, tuple(rows), race.refused)
    return Tuned(_arguments(choice.setting), choice, comparison, tuple(reasons))


@dataclass
class _Search:
    """The rounds of one `autotune`."""

    race: Race
    infos: Mapping[str, SiteInfo]
    specs: Sequence[Any]
    samples: tuple[int, ...]
    allow_biased: bool
    key: Callable[[Measured], tuple[float, float]]
    budget: float
    finalists: tuple[Setting, ...] = ()

    def run(self, incumbent: Setting | None) -> list[str]:
        """Measures; what it says is one sentence a round."""
        self.end = time.perf_counter() + self.budget
        K = self.samples[len(self.samples) // 2]
        everywhere = [s for spec in self.specs if (s := setting_of(spec, self.infos, K, self.race.refused)) is not None]
        field = [*([incumbent] if incumbent is not None else []), *everywhere]
        best = self.round(field, 0.4)
        said = [f"{len(field)} settings with one estimator, K={K}: {self.names(best)} lead."]
        if len(self.infos) > 1:
            best = self.round([*best, *self.neighbours(best[0])], 0.4)
            said.append(f"each of {len(self.infos)} sites on its own: {self.names(best)} lead.")
        others = [dataclasses.replace(s, samples=k) for k in self.samples for s in best if k != s.samples]
        best = self.round([*best, *others], 1.0)
        self.finalists = tuple(best)
        said.append(f"samples {', '.join(map(str, self.samples))}: {self.names(best)} lead.")
        return said

    def round(self, settings: Sequence[Setting], share: float) -> list[Setting]:
        """The best few, after measuring for a share of the time that is left."""
        until = time.perf_counter() + share * max(0.0, self.end - time.perf_counter())
        runners: list[Runner] = []
        for setting in settings:
            if runners and time.perf_counter() > until:
                break
            runner = self.race.enter(setting)
            if runner is not None and runner not in runners and (self.allow_biased or runner.unbiased):
                runners.append(runner)
        if not runners:
            raise EstimatorError(f"no estimator fits: {'; '.join(self.race.refused.values()) or 'none was given'}")
        while True:
            left = max(0.0, until - time.perf_counter())
            last = len(runners) <= FINALISTS
            self.race.run(runners, left if last else 0.4 * left)
            order = [row.setting for row in sorted(self.race.results(), key=self.key)]
            runners.sort(key=lambda runner: order.index(runner.setting))
            if last:
                return [runner.setting for runner in runners]
            runners = runners[: max(FINALISTS, len(runners) // 2)]

    def neighbours(self, best: Setting) -> list[Setting]:
        """The best setting with another estimator at one of the sites."""
        found = []
        for site, info in self.infos.items():
            for spec in self.specs:
                one = setting_of(spec, {site: info}, best.samples, {})
                if one is not None and one.estimators:
                    changed = {**best.estimators, **one.estimators}
                    text = f"{best.label}; {site}: {one.label}"
                    found.append(Setting(text, changed, best.samples))
        return found

    def names(self, settings: Sequence[Setting]) -> str:
        """The first three, for people."""
        return ", ".join(str(setting) for setting in settings[:3])


def _incumbent(compiled: CompiledModule) -> Setting | None:
    """What a compiled module uses now."""
    sites = {site.name: site.estimator for site in compiled.graph.of(Sample) if site.estimator is not None}
    return Setting("as compiled", sites, compiled.options.samples) if sites else None


def _arguments(setting: Setting) -> dict[str, Any]:
    """Of `scg.compile`, names where an estimator has no hyperparameters set."""
    return {"estimators": {site: _short(spec) for site, spec in setting.estimators.items()}, "samples": setting.samples}


def _short(spec: Any) -> Any:
    cls = ESTIMATORS.get(getattr(spec, "name", ""))
    return spec.name if cls is not None and type(spec) is cls and spec == cls() else spec

"""`compare`: variance, time, memory and bias of several estimators on one call of a model."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from scg.errors import EstimatorError
from scg.estimators import Estimator, get_estimator
from scg.estimators.base import SiteInfo
from scg.measure.draws import traced, untouched
from scg.measure.race import Measured, Race, Setting, uniform
from scg.measure.sites import candidates, every_estimator, label, misfit
from scg.measure.table import Table, page, to_csv
from scg.pipeline import CompiledModule, Options

HEADER = ("estimator", "K", "variance", "ms a step", "MiB", "variance x s", "to the best", "bias", "draws")


@dataclass(frozen=True)
class Comparison:
    """What `compare` measured, the best first; print it, save it, plot it."""

    name: str
    """Of the model."""
    rows: tuple[Measured, ...]
    refused: Mapping[str, str]
    """Why an estimator was left out, by its label."""

    @property
    def best(self) -> Measured:
        """The unbiased setting of least work-normalised variance.

        Raises:
            EstimatorError: every setting is biased.
        """
        for row in self.rows:
            if row.unbiased:
                return row
        raise EstimatorError("no unbiased estimator was measured")

    def table(self) -> Table:
        """One row a setting."""
        least = next((row.work for row in self.rows if row.unbiased and row.work > 0), 0.0)
        notes = [f"left out: {name}: {why}" for name, why in self.refused.items()]
        return Table(f"estimators of {self.name}", HEADER, [self._cells(row, least) for row in self.rows], notes)

    def _cells(self, row: Measured, least: float) -> tuple[str, ...]:
        return (
            row.setting.label,
            str(row.setting.samples),
            f"{row.variance:.3g}",
            f"{1e3 * row.seconds:.3g}",
            f"{row.memory / 2**20:.3g}",
            f"{row.work:.3g}",
            "exact" if row.work == 0 else f"{row.work / least:.2f}x" if least else "",
            _bias(row),
            str(row.draws),
        )

    def parameters(self) -> Table:
        """The variance of each parameter, one row a setting."""
        names = list(self.rows[0].variances) if self.rows else []
        rows = [(str(row.setting), *(f"{row.variances[name]:.3g}" for name in names)) for row in self.rows]
        return Table("variance by parameter", ("estimator", *names), rows)

    def __str__(self) -> str:
        return str(self.table())

    def _repr_html_(self) -> str:
        return self.table().to_html()

    def to_dicts(self) -> list[dict[str, Any]]:
        """One dict a setting, numbers as numbers."""
        return [
            {
                "estimator": row.setting.label,
                "sites": {site: label(estimator) for site, estimator in row.setting.estimators.items()},
                "samples": row.setting.samples,
                "unbiased": row.unbiased,
                "variance": row.variance,
                "seconds": row.seconds,
                "memory": row.memory,
                "work": row.work,
                "bias": row.bias,
                "bias_error": row.bias_error,
                "draws": row.draws,
                "compile_seconds": row.compile_seconds,
                "variances": dict(row.variances),
                "biases": dict(row.biases),
            }
            for row in self.rows
        ]

    def to_json(self) -> str:
        """All of it, with the version of torch."""
        content = {
            "model": self.name,
            "torch": torch.__version__,
            "rows": self.to_dicts(),
            "refused": dict(self.refused),
        }
        return json.dumps(content, indent=2) + "\n"

    def to_csv(self) -> str:
        """One line a setting and parameter; the line without a parameter is the whole gradient."""
        header = ("estimator", "samples", "unbiased", "parameter", "variance", "bias", "seconds", "memory", "draws")
        lines: list[Sequence[object]] = []
        for row in self.rows:
            start = (row.setting.label, row.setting.samples, row.unbiased)
            end = (row.seconds, row.memory, row.draws)
            lines.append((*start, "", row.variance, row.bias, *end))
            lines += [(*start, name, value, row.biases.get(name), *end) for name, value in row.variances.items()]
        return to_csv(header, lines)

    def to_html(self) -> str:
        """A whole file that needs no network."""
        return page(f"estimators of {self.name}", self.table().to_html(), self.parameters().to_html())

    def save(self, path: str | Path) -> Path:
        """Writes csv, json, html, md, or a plot (png, svg, pdf), by the suffix of ``path``."""
        path = Path(path)
        texts: dict[str, Callable[[], str]] = {
            ".csv": self.to_csv,
            ".json": self.to_json,
            ".html": self.to_html,
            ".md": self.table().to_markdown,
        }
        if path.suffix in texts:
            path.write_text(texts[path.suffix](), encoding="utf-8")
        elif path.suffix in (".png", ".svg", ".pdf"):
            self.plot(path)
        else:
            raise ValueError(f"cannot save as {path.suffix!r}; known: {', '.join([*texts, '.png', '.svg', '.pdf'])}")
        return path

    def plot(self, path: Any = None) -> Any:
        """Variance against time of a step, both in logarithms; along a dotted line the work is the same.

        Needs matplotlib: ``pip install scg[plot]``.

        Args:
            path: where to write it; None only returns the figure.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError("plot() needs matplotlib: pip install 'scg[plot]'") from error
        rows = [row for row in self.rows if row.variance > 0]
        figure = Figure(figsize=(8, 5), layout="constrained")
        axes = figure.add_subplot()
        axes.set(xscale="log", yscale="log", xlabel="milliseconds a step", ylabel="variance of the gradient")
        axes.set_title(f"estimators of {self.name}")
        axes.margins(x=0.3)  # room for names
        for unbiased, marker, name in ((True, "o", "unbiased"), (False, "x", "biased")):
            chosen = [row for row in rows if row.unbiased is unbiased]
            if chosen:
                times, variances = [1e3 * row.seconds for row in chosen], [row.variance for row in chosen]
                axes.scatter(times, variances, marker=marker, label=name)
        for row in rows:
            place = (1e3 * row.seconds, row.variance)
            axes.annotate(str(row.setting), place, xytext=(5, 3), textcoords="offset points", fontsize="small")
        if rows:
            low, high = min(row.seconds for row in rows), max(row.seconds for row in rows)
            least = min(row.seconds * row.variance for row in rows)
            axes.plot([1e3 * low, 1e3 * high], [least / low, least / high], ":", color="grey", label="equal work")
            axes.legend()
        if path is not None:
            figure.savefig(path)
        return figure


def _bias(row: Measured) -> str:
    """With the length that noise alone would have."""
    if row.bias is None:
        return ""
    return f"{row.bias:.2g} ± {row.bias_error:.1g}" + ("" if row.unbiased else ", biased")


def compare(
    model: Callable[..., Any],
    *args: Any,
    estimators: Iterable[Any] | None = None,
    samples: Iterable[int] = (1,),
    n: int = 1000,
    time_budget: float = 30.0,
    seed: int = 0,
    progress: bool = True,
    **kwargs: Any,
) -> Comparison:
    """Measures estimators against each other on one call of a model.

    Args:
        model: as for `scg.compile`, or what it returned: then its other options are kept.
        *args, **kwargs: what it is called with.
        estimators: names, objects, or dicts from site to either; by default all registered ones. Each stands at every
            site that it fits, the other sites are left to ``auto``.
        samples: numbers of samples K.
        n: gradient estimates a setting, at most.
        time_budget: seconds of measuring, shared by all settings in turns; compiling comes on top.
        seed: of the random number generator, for these draws only.
        progress: show a bar, where tqdm is installed and the output is a terminal.

    Returns:
        Variance, time, memory, work-normalised variance (variance times seconds) and bias of every setting. The bias
        is against the exact gradient where the program is small, else against the mean of all unbiased estimates.
    """
    compiled = traced(as_compiled(model), args, kwargs)
    refused: dict[str, str] = {}
    specs = list(every_estimator() if estimators is None else estimators)
    infos = candidates(compiled, args, kwargs)
    settings = [
        setting for K in samples for spec in specs if (setting := setting_of(spec, infos, K, refused)) is not None
    ]
    with untouched(compiled, seed=seed), progress_bar(len(settings), progress) as tick:
        race = Race(compiled, args, kwargs, most=n, refused=refused)
        for setting in settings:
            race.enter(setting)
            tick()
        race.run(race.runners, time_budget)
        rows = race.results()
    return Comparison(compiled.graph.name, tuple(rows), refused)


def as_compiled(model: Callable[..., Any]) -> CompiledModule:
    """A compiled module as it is; anything else with default options."""
    return model if isinstance(model, CompiledModule) else CompiledModule(model, Options())


def setting_of(spec: Any, infos: Mapping[str, SiteInfo], samples: int, refused: dict[str, str]) -> Setting | None:
    """What a user's ``spec`` stands for; None, with the reason in ``refused``, where it fits no site."""
    if isinstance(spec, Mapping):
        return Setting(", ".join(f"{site}: {label(est)}" for site, est in spec.items()), dict(spec), samples)
    estimator: Estimator | None = get_estimator(spec)
    if estimator is None:
        return Setting("auto", {}, samples)
    reasons = {name: misfit(estimator, info, samples) for name, info in infos.items()}
    fitting = [name for name, why in reasons.items() if not why]
    if not fitting:
        refused[label(estimator)] = next(iter(reasons.values()), "there is no site that needs an estimator")
        return None
    return uniform(estimator, fitting, samples)


@contextmanager
def progress_bar(total: int, wanted: bool) -> Iterator[Callable[[], object]]:
    """A function to call at each of ``total`` steps; it shows a bar where tqdm is installed and there is a terminal."""
    try:
        from tqdm import tqdm
    except ImportError:
        wanted = False
    if not wanted:
        yield lambda: None
        return
    with tqdm(total=total, disable=None, leave=False) as bar:
        yield bar.update

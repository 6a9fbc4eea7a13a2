"""`gradcheck`: is the gradient of a compiled model the gradient of its expected loss?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from scg.errors import EstimatorError
from scg.ir import Sample
from scg.measure.blame import Blame, Suspect
from scg.measure.draws import Estimates, traced, untouched
from scg.measure.reference import find_reference
from scg.measure.table import Table, page
from scg.measure.verdict import Judge, ParameterCheck, failed
from scg.pipeline import CompiledModule

WARM_UP = 5
"""Calls before anything is measured: a moving average without a history would be tested at zero only."""


@dataclass(frozen=True)
class GradientCheck:
    """What `gradcheck` found; true when no estimator that says it is unbiased was seen to be biased."""

    name: str
    """Of the model."""
    parameters: tuple[ParameterCheck, ...]
    reference: str
    """What the gradient was compared with."""
    draws: int
    confidence: float
    suspects: tuple[Suspect, ...] = ()
    """What is most likely at fault, after a failure."""

    @property
    def passed(self) -> bool:
        """Whether there is no bias that was not declared."""
        return not failed(self.parameters)

    def __bool__(self) -> bool:
        return self.passed

    def table(self) -> Table:
        """One row a parameter."""
        header = ("parameter", "gradient", "bias", "interval", "at", "times the truth", "verdict")
        rows = [
            (
                check.name,
                f"{check.gradient:.3g}",
                f"{check.bias:+.2g}",
                f"± {check.half_width:.2g}",
                ", ".join(map(str, check.index)),
                "" if check.scale is None else f"{check.scale:.2f}",
                check.verdict,
            )
            for check in self.parameters
        ]
        word = "passed" if self.passed else "FAILED"
        title = (
            f"gradcheck of {self.name}: {word}; {self.draws:,} draws against {self.reference}, "
            f"{self.confidence:.4%} confidence over all elements"
        )
        return Table(title, header, rows, [f"most likely at fault: {suspect}" for suspect in self.suspects])

    def __str__(self) -> str:
        return str(self.table())

    def to_html(self) -> str:
        """A whole HTML file."""
        return page(f"gradcheck of {self.name}", self.table().to_html())

    def _repr_html_(self) -> str:
        return self.table().to_html()


def gradcheck(
    compiled: CompiledModule,
    *args: Any,
    n: int = 1000,
    seed: int = 0,
    confidence: float = 0.9999,
    tolerance: float = 0.01,
    reference: Any = "auto",
    blame: bool = True,
    **kwargs: Any,
) -> GradientCheck:
    """Compares the mean of many gradient estimates with the true gradient, and names the culprit of a difference.

    Every estimate starts from the same state, as in a step of training; nothing is left changed afterwards.

    Args:
        compiled: what `scg.compile` returns.
        *args, **kwargs: what it is called with.
        n: gradient estimates; a bias is confirmed with three times as many more before it is reported.
        seed: of the random number generator, for these draws only.
        confidence: that an unbiased estimator passes, all elements of all parameters taken together.
        tolerance: a bias below this share of the parameter's largest gradient is none. An outcome so rare that it
            was never drawn has a share of the gradient too.
        reference: ``"exact"`` (the sum over all outcomes), ``"score_function"`` (many replicas, no credit assignment),
            ``"finite_differences"`` (common random numbers, a few elements of each parameter), ``"auto"`` (the first
            of these that fits), or the true gradient by parameter.
        blame: after a failure, measure variants of the program to find the site and the pass at fault.

    Returns:
        The bias of each parameter with its confidence interval; print it. Biased estimators get theirs measured, and
        pass.

    Raises:
        EstimatorError: there is nothing to compare with.

    Example:
        >>> import scg, torch
        >>> theta = torch.nn.Parameter(torch.tensor(0.3))
        >>> def loss():
        ...     return (torch.distributions.Bernoulli(logits=theta).sample() - 0.2) ** 2
        >>> bool(scg.gradcheck(scg.compile(loss, estimator="score_function"), n=200))
        True
    """
    traced(compiled, args, kwargs)
    declared = any(site.estimator is not None and not site.estimator.unbiased for site in compiled.graph.of(Sample))
    judge = Judge(confidence, tolerance, declared)
    with untouched(compiled, seed=seed):
        truth = find_reference(compiled, args, kwargs, n=4 * n, method=reference)
        estimates = Estimates(compiled, args, kwargs, warm_up=WARM_UP)
        estimates.take(n)
        checks = judge(estimates.moments, truth)
        if not checks:
            raise EstimatorError("the reference gradient is not known for any parameter: it is NaN everywhere")
        if failed(checks):
            estimates.take(3 * n)
            checks = judge(estimates.moments, truth)
        suspects: tuple[Suspect, ...] = ()
        if blame and failed(checks):
            found = Blame(compiled, args, kwargs, truth, judge, failed(checks), n, WARM_UP)
            suspects = found.suspects()
    return GradientCheck(
        compiled.graph.name, checks, truth.method, estimates.moments.n, confidence, suspects
    )  # fmt: skip

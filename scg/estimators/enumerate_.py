"""Exact expectation over a finite support."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from scg.analysis.support import UNBOUNDED_COUNTS
from scg.estimators.base import YES, EnumeratingEstimator, SiteInfo, Support


@dataclass(frozen=True)
class Enumerate(EnumeratingEstimator):
    r"""Sums over every outcome, with its probability as differentiable weight.

    .. math:: E[f(z)] = \sum_{v} p_\theta(v) f(v)

    Elements that meet in no cost share rows: a vector of independent Bernoulli draws costs 2 rows where each cost
    element sees one of them, 2^D where one cost sees all D. Unbiased, and the variance over this site is gone.
    """

    limit: int = 2**16
    """Most rows that are built before it is an error."""
    bound: int | None = None
    """Last outcome summed over, of `Poisson`, `Geometric` and `NegativeBinomial`.

    The site then follows its distribution given that it is at most the bound: biased by no more than the probability of
    the tail, times how far costs there are from those below. Inside of `scg.logmarginal` the tail's terms are left out
    of the sum, so that the likelihood is never above the true one.
    """

    name: ClassVar[str] = "enumerate"
    unbiased: ClassVar[bool] = True
    orders: ClassVar[int] = 2
    reference: ClassVar[str] = "exact sum"
    formula: ClassVar[str] = r"\nabla_\theta \sum_v p_\theta(v) f(v)"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bound is not None:
            if self.bound < 0:
                raise ValueError(f"enumerate: bound={self.bound} must be at least 0")
            object.__setattr__(self, "unbiased", False)

    @property
    def biases(self) -> tuple[str, ...]:
        return () if self.bound is None else (f"counts beyond {self.bound} are left out",)

    @classmethod
    def supports(cls, site: SiteInfo) -> Support:
        if site.replayed:
            return Support(False, "a replayed outcome is one outcome: there is nothing to enumerate")
        if site.multisample:
            return Support(False, "a multi-sample bound joins draws, and an expectation is not one")
        if site.pathwise_only:
            return Support(False, site.pathwise_only)
        if site.support is None or site.rows is None:
            bounded = issubclass(site.template.cls, UNBOUNDED_COUNTS)
            hint = ": give it the last outcome to sum over, scg.ESTIMATORS['enumerate'](bound=…)" if bounded else ""
            return Support(False, f"{site.family} has no finite support of known size{hint}")
        return YES

    def check(self, site: SiteInfo) -> Support:
        found = self.supports(site)
        if found and self.bound is not None and not issubclass(site.template.cls, UNBOUNDED_COUNTS):
            return Support(False, f"bound={self.bound} is for counts without one, and {site.family} has a last outcome")
        if found and site.rows is not None and site.rows > self.limit:
            assert site.support is not None
            return Support(False, f"its support needs {site.rows:.3g} rows, over the limit of {self.limit}")
        return found

    def evaluations(self, site: SiteInfo) -> int:
        return site.rows or 1

"""Where a bias comes from: the same gradient measured again with one part of the compiler exchanged at a time.

1. Credit by whole cost tensors, then by the whole loss: where the bias goes, the pass in between is at fault.
2. A plain estimator at every site, and the user's at some of them alone, halving the set: where the bias stays, that
   site is at fault.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from scg.errors import ScgError
from scg.estimators import Estimator
from scg.estimators.base import SiteInfo
from scg.estimators.enumerate_ import Enumerate
from scg.estimators.score_function import ScoreFunction
from scg.estimators.state import draws
from scg.ir import Sample
from scg.measure.draws import Estimates, traced
from scg.measure.reference import Reference
from scg.measure.sites import candidates, label, variant
from scg.measure.verdict import Judge, ParameterCheck, failed
from scg.pipeline import CompiledModule

ROWS = 64
"""Most rows of exact enumeration in the place of another estimator."""

CLEAN, BIASED, UNSURE = "clean", "biased", "unsure"

FINER = {
    "element": (("node", "assign_credit"), ("none", "split_costs")),
    "node": (("none", "split_costs"),),
    "none": (),
}
"""For each granularity of credit the coarser ones, and the pass that does no harm there."""


@dataclass(frozen=True)
class Suspect:
    """What is most likely at fault."""

    part: str
    """"estimator", "baseline", "pass" or "backend"."""
    name: str
    """``disarm``, ``leave_one_out``, ``assign_credit``, ``inductor``."""
    site: str | None
    """The site where it shows."""
    loc: str
    """``file.py:line`` of the site."""
    evidence: str
    """The experiment that says so."""

    def __str__(self) -> str:
        where = f" of site {self.site!r} ({self.loc})" if self.site else ""
        return f"{self.part} {self.name!r}{where}: {self.evidence}"


@dataclass
class Blame:
    """The experiments on one compiled call whose gradient failed."""

    compiled: CompiledModule
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    reference: Reference
    judge: Judge
    failed: Mapping[str, ParameterCheck]
    n: int
    warm_up: int
    plain: dict[str, Estimator] = field(init=False)
    """An estimator of another make for each site that has one."""

    def __post_init__(self) -> None:
        graph = self.compiled.graph
        self.sites = {site.name: site for site in graph.of(Sample) if site.estimator is not None and site.credits}
        infos = candidates(self.compiled, self.args, self.kwargs)
        found = {name: _plain(site.estimator, infos[name]) for name, site in self.sites.items() if name in infos}
        self.plain = {name: estimator for name, estimator in found.items() if estimator is not None}

    def suspects(self) -> tuple[Suspect, ...]:
        """The likely culprits, by experiment; one that names what remains, where no experiment tells."""
        if self.compiled.options.backend != "eager" and self.state(set(self.sites)) == CLEAN:
            name = self.compiled.options.backend
            return (Suspect("backend", name, None, "", "the same program is unbiased with backend='eager'"),)
        culprits = self.culprits()
        pass_ = self.guilty_pass()
        if pass_ is not None:
            name, evidence = pass_
            found = [Suspect("pass", name, site, self.sites[site].loc, evidence) for site in culprits]
            return tuple(found) or (Suspect("pass", name, None, "", evidence),)
        if culprits:
            return tuple(self._estimator(name) for name in culprits)
        return (self._rest(),)

    def state(self, users: set[str], credit: str | None = None) -> str:
        """Whether the bias is there with the user's estimators at ``users`` and plain ones at all other sites."""
        chosen = {
            name: self.plain[name] if name in self.plain and name not in users else site.estimator
            for name, site in self.sites.items()
        }
        credit = credit or self.compiled.options.credit
        changed = variant(self.compiled, estimators=chosen, credit=credit, backend="eager")
        try:
            estimates = Estimates(traced(changed, self.args, self.kwargs), self.args, self.kwargs, self.warm_up)
        except ScgError:
            return UNSURE
        for n in (self.n, 3 * self.n):
            estimates.take(n)
            checks = self.judge(estimates.moments, self.reference)
            if self.failed.keys() & failed(checks).keys():
                return BIASED
            if self._moved(checks):
                return CLEAN
        return UNSURE

    def _moved(self, checks: Sequence[ParameterCheck]) -> bool:
        """Whether the interval no longer holds the bias that was found: its absence is no lack of draws."""
        now = {check.name: check for check in checks}
        return all(now[name].half_width + abs(now[name].bias) < abs(was.bias) for name, was in self.failed.items())

    def culprits(self) -> list[str]:
        """Sites whose estimator alone brings the bias back."""
        swapped = [name for name in self.sites if name in self.plain]
        if not swapped or self.state(set(self.sites) - set(swapped)) != CLEAN:
            return []
        return _halve(swapped, lambda some: self.state(set(some)) == BIASED)

    def guilty_pass(self) -> tuple[str, str] | None:
        """The pass after which the bias is there, and the experiment that shows it."""
        for credit, name in FINER[self.compiled.options.credit]:
            if self.state(set(self.sites), credit) == CLEAN:
                return name, f"with credit={credit!r} the bias is gone"
        return None

    def _estimator(self, name: str) -> Suspect:
        site = self.sites[name]
        estimator = site.estimator
        evidence = f"with {label(self.plain[name])} in its place the bias is gone, with it alone it is there"
        if type(estimator) is ScoreFunction:
            baseline = estimator.resolve(draws(self.compiled.graph, site))
            kind = type(baseline).__name__ if not baseline.name else baseline.name
            return Suspect("baseline", kind, name, site.loc, evidence)
        return Suspect("estimator", estimator.name or type(estimator).__name__, name, site.loc, evidence)

    def _rest(self) -> Suspect:
        stuck = [name for name in self.sites if name not in self.plain]
        if len(stuck) == 1:
            site = self.sites[stuck[0]]
            return Suspect(
                "estimator", site.estimator.name, site.name, site.loc, "no other estimator fits there to try"
            )
        return Suspect(
            "pass", "normalize", None, "", "it stays with plain estimators at every site and no credit assignment: "
            "the trace, what comes before the costs are split, or the backend"
        )  # fmt: skip


def _plain(estimator: Any, info: SiteInfo) -> Estimator | None:
    """An estimator that has nothing in common with ``estimator``, of little variance where that is to be had."""
    exact = Enumerate()
    if type(estimator) is not Enumerate and exact.check(info) and (info.rows or 0) <= ROWS:
        return exact
    score = ScoreFunction()
    return score if score.check(info) and estimator != score else None


def _halve(names: Sequence[str], guilty: Callable[[Sequence[str]], bool]) -> list[str]:
    """The names that are guilty alone, found by trying halves.

    >>> _halve("abcdefgh", lambda some: "c" in some or "h" in some)
    ['c', 'h']
    """
    if not guilty(names):
        return []
    if len(names) == 1:
        return list(names)
    middle = len(names) // 2
    return _halve(names[:middle], guilty) + _halve(names[middle:], guilty)

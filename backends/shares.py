"""Shares of the gradient's variance: what the variance view colours sites and credit edges by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from scg.backends.boxes import Arrow, Box, Picture
from scg.ir import Graph

STEPS = (0.01, 0.05, 0.15, 0.35)
"""Where the colour changes."""


@dataclass(frozen=True)
class VarianceShares:
    """How much of the gradient's variance each credit edge brings in.

    >>> VarianceShares({("z", "nll"): 0.7, ("z", "kl"): 0.1, ("w", "nll"): 0.2}).site("z")
    0.8
    """

    shares: Mapping[tuple[str, str], float]
    """(site, name of the cost node or its label) to a share; what is missing was not measured."""
    note: str = ""
    """How it was measured, for the caption: ``1,000 draws``."""
    sites: Mapping[str, float] = field(default_factory=dict)
    """Shares of whole sites, where they are not the sums of their edges'."""

    @classmethod
    def of(cls, measured: Any) -> VarianceShares:
        """From a mapping, or from what holds one as ``shares``, as `scg.VarianceBudget` does."""
        if isinstance(measured, cls):
            return measured
        shares = measured if isinstance(measured, Mapping) else measured.shares
        draws = getattr(measured, "draws", None)
        return cls({key: share for key, share in shares.items() if key[0]}, f"{draws:,} draws" if draws else "")

    def site(self, name: str) -> float:
        """Share of one site."""
        known = self.sites.get(name)
        return (
            round(sum(share for (site, _), share in self.shares.items() if site == name), 12)
            if known is None
            else known
        )

    def edge(self, site: str, cost: str, label: str = "") -> float | None:
        """Share of one credit edge; None if it was not measured."""
        return self.shares.get((site, cost), self.shares.get((site, label)))


def level(share: float) -> int:
    """Index of the colour of ``share``, 0 to 4."""
    return sum(share >= step for step in STEPS)


def percent(share: float) -> str:
    """``31 %``, ``0.4 %``, ``< 0.1 %``."""
    if 0 < share < 0.001:
        return "< 0.1 %"
    return f"{100 * share:.1f} %" if 0 < share < 0.01 else f"{100 * share:.0f} %"


def coloured(graph: Graph, drawn: Picture, shares: VarianceShares) -> Picture:
    """The stochastic view with measured shares.

    Raises:
        ValueError: a measured site or cost is not in the graph.
    """
    costs = {cost.label for cost in graph.costs.values()} | set(graph.costs)
    for site, cost in [*shares.shares, *((site, "") for site in shares.sites)]:
        if site not in graph.sites or (cost and cost not in costs):
            what = f"site {site!r}" if site not in graph.sites else f"cost {cost!r}"
            raise ValueError(f"the measurements name {what}, which {graph.name} does not have")
    measured = {site for site, _ in shares.shares} | set(shares.sites)
    ends = {box.id: box.members[-1] for box in drawn.boxes}

    def box(old: Box) -> Box:
        name = ends[old.id]
        return replace(old, share=shares.site(name)) if name in measured and old.kind == "site" else old

    def arrow(old: Arrow) -> Arrow:
        if old.kind != "credit":
            return old
        cost = ends[old.tail]
        return replace(old, share=shares.edge(ends[old.head], cost, graph.costs[cost].label))

    return replace(
        drawn,
        title=drawn.title.replace("stochastic view", "variance view"),
        caption=f"shares of the gradient's variance{f' · {shares.note}' if shares.note else ''}",
        boxes=tuple(map(box, drawn.boxes)),
        arrows=tuple(map(arrow, drawn.arrows)),
    )

"""Which costs do not teach which sites, and why: what credit assignment left out."""

from __future__ import annotations

from scg.analysis.smoothness import smoothness
from scg.ir import Cost, Graph, Sample


def dropped(graph: Graph) -> dict[tuple[str, str], str]:
    """A reason for every (site, cost) without a credit edge; nothing before credit is assigned."""
    if not graph.credit:
        return {}
    stopped = None
    found: dict[tuple[str, str], str] = {}
    for site in graph.of(Sample):
        below = graph.descendants([site.name])
        for cost in graph.of(Cost):
            if (site.name, cost.name) in graph.credit:
                continue
            if site.data:
                why = "drawn under no_grad"
            elif cost.name not in below:
                why = "not downstream"
            else:
                stopped = stopped or smoothness(graph)
                why = "only stopped paths" if stopped.stopped(site.name, cost.name) else "no element meets"
            found[site.name, cost.name] = why
    return found

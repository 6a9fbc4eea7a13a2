"""Pairs of log densities of one draw that are a divergence.

    before   %a = logprob f32[B, D]   %q.log_prob(%z)            after   %a = expected f32[B, D]  kl_divergence(%q, %p)
             %b = logprob f32[B, D]   %p.log_prob(%z)                    %c = sum(%a, [-1])
             %c = sum(%a - %b, [-1])

wherever the two stand in the objective, if with opposite coefficients.
"""

from __future__ import annotations

from scg.ir import LogProb, Ref
from scg.passes.closed_forms.expander import Expander
from scg.passes.closed_forms.forms import has_divergence, kl_divergence
from scg.passes.closed_forms.region import Region, opposite


def divergences(of: Expander, region: Region) -> dict[str, Ref | None]:
    """What stands for each log density of a pair: the divergence for that of q, nothing (None) for that of p."""
    densities = [node for name in region.terms if isinstance(node := region.graph[name], LogProb)]
    densities = [node for node in densities if of.is_draw(node.value) and not of.moving(region.graph[node.dist])]
    own = [node for node in densities if node.dist == of.site.dist]
    others = [node for node in densities if node.dist != of.site.dist]
    found: dict[str, Ref | None] = {}
    if not own or not others:
        return found
    paths = region.paths()
    family = of.draft.dist(of.site.dist).template.cls
    for q in own:
        for p in others:
            if p.name in found or q.type != p.type or not opposite(paths[q.name], paths[p.name]):
                continue
            if not has_divergence(family, of.draft.dist(p.dist).template.cls):
                continue
            value = of.draft.expected(kl_divergence, q.dist, p.dist, at=q)
            if value is not None:
                found[q.name], found[p.name] = of.draft.tensor(value, q.tensor, at=q), None
                break
    return found

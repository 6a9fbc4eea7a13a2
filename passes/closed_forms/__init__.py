"""Closed forms: terms of the objective whose expectation over a draw is known are replaced by it.

    before   %z    = sample f32[B, D]   %q
             %a    = logprob f32[B, D]  %q.log_prob(%z)
             %b    = logprob f32[B, D]  %p.log_prob(%z)
             %kl   = op f32[B, D]       sub(%a, %b)
    after    %a_kl = expected f32[B, D] kl_divergence(%q, %p)
             %kl   = op f32[B, D]       …

The expectation is unchanged: the objective is linear in each term with coefficients that do not follow from the draw,
and given the draw's parameters it is independent of all such (tower rule). The variance may go either way: what was
sampled may have moved against the rest of the objective.
"""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from scg.errors import EstimatorError
from scg.ir import Depends, Graph, LogProb, Node, Op, Ref, Sample, map_refs
from scg.passes.clean import eliminate_dead_code
from scg.passes.closed_forms.divergences import divergences
from scg.passes.closed_forms.draft import Draft, in_order
from scg.passes.closed_forms.expander import Expander
from scg.passes.closed_forms.region import Region


@dataclass(frozen=True)
class ClosedForms:
    """The pass with its options."""

    wanted: bool | Mapping[str, bool] = False
    """For all sites, or by glob over site names: the first match wins, and a site without one is left alone."""
    sampled: Callable[[Sample], str | None] = lambda site: None
    """Why the terms of a site must stay sampled, as its estimator has it."""

    def __call__(self, graph: Graph) -> Graph:
        """Rewrites the objective, children before their parents, and notes what was replaced.

        Raises:
            EstimatorError: for a glob that matches no site.
        """
        names = [site.name for site in graph.of(Sample)]
        globs = self.wanted if isinstance(self.wanted, Mapping) else {}
        for glob in globs:
            if not any(fnmatch.fnmatchcase(name, glob) for name in names):
                raise EstimatorError(
                    f"closed_forms={{{glob!r}: …}} matches no site; sites: {', '.join(names) or 'none'}"
                )
        for name in reversed(names):
            if self._wants(name):
                graph = self._site(graph, name)
        return graph

    def _wants(self, name: str) -> bool:
        if not isinstance(self.wanted, Mapping):
            return self.wanted
        return next((on for glob, on in self.wanted.items() if fnmatch.fnmatchcase(name, glob)), False)

    def _site(self, graph: Graph, name: str) -> Graph:
        site = graph[name]
        assert isinstance(site, Sample)
        if site.data or site.value is not None or any(node.on == name for node in graph.of(Depends)):
            return graph  # data asks for no derivative; a replayed outcome was seen, not drawn
        region = Region(graph, name)
        if not region.terms:
            return graph
        if (why := self.sampled(site)) is not None:
            return _noted(graph, f"no closed forms for %{name}: {why}")
        draft = Draft(graph)
        of = Expander(draft, graph, site, region.below)
        instead = divergences(of, region)
        notes = [_pair_note(graph, name, instead)] if instead else []
        for term in region.terms:
            if term not in instead and (mean := of.mean(term)) is not None:
                instead[term] = mean
                notes.append(f"closed form over %{name}: the expectation of {_what(graph[term], name)}")
        if not instead:
            return graph
        objective = region.rewrite(draft, instead)
        outputs = map_refs(lambda ref: objective if ref == graph.objective else ref, graph.outputs)
        new = in_order(graph, draft, objective=objective, outputs=outputs)
        return _noted(eliminate_dead_code(new), *notes)


def _noted(graph: Graph, *notes: str) -> Graph:
    return dataclasses.replace(graph, notes=(*graph.notes, *notes))


def _pair_note(graph: Graph, name: str, pairs: Mapping[str, Ref | None]) -> str:
    texts = [_what(graph[term], name) for term in pairs]
    return f"closed form over %{name}: kl_divergence for {', less '.join(texts)}"


def _what(node: Node, site: str) -> str:
    """A term as the user wrote it."""
    where = f" ({node.loc})" if node.loc else ""
    if node.name == site:
        return f"%{site} itself, its mean"
    if isinstance(node, LogProb):
        return f"{node.describe()}{where}"
    return f"%{node.name} = {node.op_name if isinstance(node, Op) else node.kind}{where}"

"""Takes the likelihood of every marginal apart into factors, before anything else looks at the sum they stood in.

before   %nll = op f32[B] add(%a, %b)       %m = marginal f32[B] -log E exp(-%nll)
after                                       %m = marginal f32[B] -log E exp(-(%a + %b)) over z_0, z_1
"""

from __future__ import annotations

import dataclasses

from scg.analysis.factors import factorize
from scg.analysis.influence import influence
from scg.ir import Cost, Graph, Marginal, Sample, refs_in
from scg.passes.clean import eliminate_dead_code


def split_marginals(graph: Graph) -> Graph:
    """Fills the factors, sites and plates of every `Marginal`.

    Raises:
        EstimatorError: a site outside of the logarithm depends on one inside.
    """
    whole = [node for node in graph.of(Marginal) if node.value is not None]
    if not whole:
        return graph
    found = influence(graph, [node.name for node in graph.of(Sample)])
    split = graph.replace(*(factorize(graph, found, node) for node in whole))
    left = split.ancestors([split.objective, *refs_in(split.outputs)])
    inside = [cost for cost in split.of(Cost) if cost.name not in left]  # a term that the user named is a factor now
    return eliminate_dead_code(split.replace(*(dataclasses.replace(cost, declared=False) for cost in inside)))

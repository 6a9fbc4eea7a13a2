"""What a change of one element does to the costs and to the likelihood of the draws below, all kept as they were drawn.

    z -> y -> c(z, y)     gain        c(z', y) - c(z, y)
                          log ratio   log p(y | z') - log p(y | z)

Only what lies between the site and the next draws is evaluated again (Young 2021).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.distributions import Bernoulli

from scg.analysis.edges import element_edge
from scg.analysis.influence import Relation
from scg.backends.linear_rows import product_of
from scg.backends.log_ratio import LOG_RATIO_OF_BITS
from scg.backends.recorder import compile_time, record_call
from scg.backends.sample_dims import Batched, stop_gradient
from scg.backends.single_changes import Part, Rows, SingleChanges
from scg.errors import EstimatorError
from scg.estimators.base import EnumeratingEstimator, Hindsight, PathwiseEstimator, RowEstimator
from scg.ir import CreditEdge, Graph, Op, Ref, Sample
from scg.operations import is_linear

if TYPE_CHECKING:
    from scg.backends.lowering import Interpreter


def hindsight(run: Interpreter, site: Sample, dims: tuple[str, ...], outcomes: Tensor) -> Hindsight:
    """Costs and likelihoods at outcomes of one element each.

    Args:
        run: where everything else is taken from, without gradient.
        site: whose elements change.
        dims: sample dims of the draw.
        outcomes: ``[R, *dims | *elements | *event]``.
    """
    signals = run.signals
    edges = [edge for edge in signals.edges(site) if signals.bound_of(edge.cost) is None]
    scale = signals.scale(edges)
    between, next_draws = _between(run.graph, site)
    later = [edge for edge in edges if any(_moves(run, draw, edge.cost) for draw in next_draws)]
    draws = [draw for draw in next_draws if any(_moves(run, draw, edge.cost) for edge in later)]
    for draw in draws:
        _check(run, site, draw, dims)
    changes = SingleChanges(run, site, dims, outcomes.detach(), between, run.direct)

    def gain(edges: Sequence[CreditEdge]) -> Tensor | None:
        related = [(edge.cost, run.direct.relation(edge.cost, site.name)) for edge in edges]
        parts = [_gain(changes, cost, relation, scale) for cost, relation in related if relation is not None]
        return changes.total(parts) if parts else None

    alone = gain([edge for edge in edges if edge not in later])
    if not later:
        return Hindsight(alone)
    ratios = {draw.name: _log_ratio_of_bits(changes, draw) for draw in draws}
    found = [ratio for ratio in ratios.values() if ratio is not None]
    if rest := [_log_ratio(changes, draw) for draw in draws if ratios[draw.name] is None]:
        found.append(changes.total(rest))
    ratio = functools.reduce(torch.add, found)
    return Hindsight(alone, signals.total(later, dims, scale), gain(later), ratio)


def _between(graph: Graph, site: Sample) -> tuple[set[str], list[Sample]]:
    """What lies between a site and the next draws, and these."""
    between: set[str] = set()
    draws: dict[str, Sample] = {}
    stack = list(graph.users[site.name])
    while stack:
        node = graph[stack.pop()]
        if isinstance(node, Sample):
            draws[node.name] = node
        elif node.name not in between:
            between.add(node.name)
            stack.extend(graph.users[node.name])
    return between, list(draws.values())


def _moves(run: Interpreter, draw: Sample, cost: str) -> bool:
    return run.found.relation(cost, draw.name) is not None


def _check(run: Interpreter, site: Sample, draw: Sample, dims: tuple[str, ...]) -> None:
    """That the draw follows its density, and is one for each draw of the site."""
    chosen = draw.estimator
    reason = None
    if isinstance(chosen, EnumeratingEstimator):
        reason = "is enumerated: it has no draw whose likelihood would tell; use 'local_expectation' above it"
    elif isinstance(chosen, RowEstimator):
        reason = f"has several coupled draws ({chosen.name})"
    elif isinstance(chosen, PathwiseEstimator) and not chosen.unbiased:
        reason = f"is relaxed ({chosen.name}): its value does not follow its density"
    elif not set(run.env[draw.name].dims) <= {*dims}:
        reason = f"has several draws for each of %{site.name}; give samples= to scg.compile instead"
    if reason is not None:
        raise EstimatorError(
            f"%{site.name} ({site.loc}): {site.estimator.name!r} weighs each outcome by the likelihood of the draws "
            f"below, but %{draw.name} ({draw.loc}) {reason}"
        )


def _gain(changes: SingleChanges, cost: str, relation: Relation, scale: float) -> Part:
    """By how much each element's row changes its share of a cost."""
    with compile_time():
        edge = element_edge(changes.site, cost, relation)

    def share(rows: Rows, level: frozenset[int]) -> Tensor:
        signals = rows.child.signals
        before = signals.share(edge, changes.dims, scale, rows.base(cost))
        return rows.share(edge, rows.at(cost, level), level, scale) - rows.unchanged(before, level)

    return Part([cost], changes.crediting_level(edge, changes.levels[cost]), share)


def _log_ratio(changes: SingleChanges, draw: Sample) -> Part:
    """By how much each element's row changes the log likelihood of what was drawn."""
    run, site = changes.run, changes.site
    relation = changes.found.relation(draw.dist, site.name)
    assert relation is not None
    with compile_time():
        edge = element_edge(site, draw.dist, relation)
        level = frozenset(dim for dim in changes.levels[draw.dist] if relation.pointlike(dim))
    drawn = stop_gradient(run.env[draw.name])

    def summed(log_prob: Batched) -> Batched:
        """Over the leading dims of ``sample((n,))``, which all follow one distribution."""
        first = len(log_prob.dims)
        axes = list(range(first, first + len(draw.sample_shape)))
        return Batched(log_prob.tensor.sum(axes), log_prob.dims) if axes else log_prob

    def share(rows: Rows, level: frozenset[int]) -> Tensor:
        rows.level = level
        rows.take_parameters(draw.dist)
        after = summed(rows.child.log_prob(draw.dist, drawn, draw.name))
        before = summed(run.log_prob(draw.dist, drawn, draw.name, stop=True))
        signals = rows.child.signals
        now = rows.own_of(signals.credited_sum(edge, rows.lead_of(level), after), level)
        return now - rows.unchanged(signals.credited_sum(edge, changes.dims, before), level)

    return Part([draw.dist], changes.crediting_level(edge, level), share)


def _log_ratio_of_bits(changes: SingleChanges, draw: Sample) -> Tensor | None:
    """By how much each element's change moves the log likelihood of the bits that were drawn below it.

        z [B, D] -> l = z @ w + b -> y ~ Bernoulli(l) [B, H]         [R, B, D], no value of [R, D, B, H] but in a leaf

    Returns:
        ``[R, *dims | *elements]``; None unless the draw's logits are a product of the site with a matrix.
    """
    run, site, dims = changes.run, changes.site, changes.dims
    dist = run.dist_node(draw.dist)
    node, own = run.graph[dist.params[0]], Ref(site.name)
    bits = dist.template.cls is Bernoulli and dist.template.names == ("logits",) and not draw.sample_shape
    if not bits or not isinstance(node, Op) or node.inputs.count(own) != 1 or site.tensor.event_ndim:
        return None
    product = product_of(run.graph, node, own) if is_linear(node, {own}) else None
    if product is None or not product.out or draw.tensor.shape != node.tensor.shape:
        return None
    *batch, summed = product.own
    matrix_of = batch == [*product.out[:-1]] and {*product.others} == {summed, product.out[-1]}
    fixed = all(changes.found.relation(ref, site.name) is None for ref in node.inputs if ref != own)
    weight = stop_gradient(run.env[product.other])
    if not matrix_of or not fixed or weight.dims or len(product.others) != 2:
        return None
    matrix = weight.tensor if product.others[0] == summed else weight.tensor.t()  # [D, H]
    logits, drawn = (run.dims.align(stop_gradient(run.env[name]), dims) for name in (node.name, draw.name))
    change = changes.outcomes - run.dims.align(run.env[site.name], dims)  # [R, *dims | *batch, D]
    return record_call(LOG_RATIO_OF_BITS, logits, change, matrix, drawn, changes.size)  # type: ignore[no-any-return]

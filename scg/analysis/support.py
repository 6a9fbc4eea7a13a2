"""What is known at compile time about the support of a distribution."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributions import (
    Bernoulli,
    Binomial,
    Categorical,
    Geometric,
    LKJCholesky,
    NegativeBinomial,
    OneHotCategorical,
    Poisson,
)
from torch.distributions.constraints import Constraint

from scg.ir import Dist, Graph, Input, Param, Ref, Sample, TensorType

_MOVING = {"Uniform": ("low", "high"), "Pareto": ("scale",)}
"""Parameters that move the bounds of the support."""


UNBOUNDED_COUNTS = (Poisson, Geometric, NegativeBinomial)
"""Distributions over 0, 1, 2, …, which can be summed over up to a bound."""


def site_support(graph: Graph, site: Sample) -> Tensor | None:
    """All outcomes of one element of a site that its estimator looks at."""
    dist = graph[site.dist]
    assert isinstance(dist, Dist)
    return finite_support(graph, dist, getattr(site.estimator, "bound", None))


def finite_support(graph: Graph, dist: Dist, bound: int | None = None) -> Tensor | None:
    """All outcomes of one element, ``[S, *event]``; None where they are infinite or not known at compile time.

    Args:
        bound: last outcome to look at of counts that have none.

    >>> # Categorical over 3 -> tensor([0, 1, 2]); OneHotCategorical over 2 -> tensor([[1., 0.], [0., 1.]])
    """
    template = dist.template
    if bound is not None and issubclass(template.cls, UNBOUNDED_COUNTS):
        return torch.arange(bound + 1, dtype=graph[dist.params[0]].tensor.dtype)
    if not template.has_enumerate_support or not dist.params:
        return None
    first = graph[dist.params[0]].type
    assert isinstance(first, TensorType)
    if issubclass(template.cls, Bernoulli):
        return torch.tensor([0.0, 1.0], dtype=first.dtype)
    if issubclass(template.cls, Categorical):
        return torch.arange(first.shape[-1])
    if issubclass(template.cls, OneHotCategorical):
        return torch.eye(first.shape[-1], dtype=first.dtype)
    if issubclass(template.cls, Binomial):
        return _counts(graph, dist, first.dtype)
    return None


def _counts(graph: Graph, dist: Dist, dtype: torch.dtype) -> Tensor | None:
    where = [i for i, name in enumerate(dist.template.names) if name == "total_count"]
    if not where:
        return None
    total = constant_value(graph, dist.params[where[0]])
    if total is None or bool((total != total.max()).any()):
        return None
    floating = [graph[ref].tensor.dtype for i, ref in enumerate(dist.params) if i != where[0]]
    return torch.arange(int(total.max()) + 1, dtype=floating[0] if floating else dtype)


def constant_value(graph: Graph, ref: Ref) -> Tensor | None:
    """The value of a node that is a constant of the trace."""
    node = graph[ref]
    if isinstance(node, Param) and node.role == "constant" and not node.requires_grad:
        return graph.tensors[node.path]
    return None


def moving_bound(graph: Graph, dist: Dist) -> str | None:
    """The parameter that both moves the support's bounds and depends on something that asks for a gradient."""
    names = _MOVING.get(dist.template.cls.__name__, ())
    for name, ref in zip(dist.template.names, dist.params, strict=True):
        if name.rsplit(".", 1)[-1] in names and _learned(graph, ref):
            return name
    return None


def wrong_density(graph: Graph, site: Sample) -> str | None:
    """Why the score of a draw has a mean, where torch draws from another law than that of ``log_prob``."""
    dist = graph[site.dist]
    assert isinstance(dist, Dist)
    wrong = dist.template.cls is LKJCholesky and site.tensor.shape[-1] > 2 and site.value is None
    if not wrong or not any(_learned(graph, ref) for ref in dist.params):
        return None
    return "torch draws LKJCholesky of more than two dimensions from another law than that of its log_prob"


def _learned(graph: Graph, ref: Ref) -> bool:
    above = (graph[name] for name in graph.ancestors([ref]))
    return any(node.requires_grad for node in above if isinstance(node, (Param, Input)))


def is_discrete(dist: Dist) -> bool:
    """Are the outcomes of ``dist`` discrete?"""
    cls = dist.template.cls
    support = cls.support
    if isinstance(support, property):
        return dist.template.has_enumerate_support
    return isinstance(support, Constraint) and bool(support.is_discrete)

"""Where a gradient's variance comes from: the share of every site, every cost, every parameter."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from scg.errors import EstimatorError
from scg.exact import objective_of
from scg.ir import Cost, Graph
from scg.measure.draws import model_parameters, traced, untouched
from scg.measure.table import Table
from scg.pipeline import CompiledModule

REST = ("", "")
"""What no cost credited to a site brings: the pathwise derivative, and baselines that do not follow from the signal."""


@dataclass(frozen=True)
class VarianceBudget:
    """What `variance_budget` found. Shares of one total sum to one; anti-correlated parts have negative ones."""

    name: str
    """Of the model."""
    total: float
    """Variance of one gradient estimate, summed over all elements of all parameters."""
    shares: Mapping[tuple[str, str], float]
    """(site, label of a cost) to its share of the total; `REST` for what is left."""
    by_parameter: Mapping[str, Mapping[tuple[str, str], float]]
    """The same for each parameter's own variance."""
    variances: Mapping[str, float]
    """Of each parameter, summed over its elements."""
    draws: int

    def table(self) -> Table:
        """One row a part, largest first."""
        header = ("site", "cost", "share", *self.variances)
        rows = [
            (site or "rest", cost, f"{share:.1%}", *(f"{self.by_parameter[p][site, cost]:.1%}" for p in self.variances))
            for (site, cost), share in sorted(self.shares.items(), key=lambda item: -item[1])
        ]
        rows.append(("variance", "", f"{self.total:.3g}", *(f"{value:.3g}" for value in self.variances.values())))
        return Table(f"gradient variance of {self.name}, {self.draws:,} draws", header, rows)

    def __str__(self) -> str:
        return str(self.table())

    def _repr_html_(self) -> str:
        return self.table().to_html()


def variance_budget(compiled: CompiledModule, *args: Any, n: int = 200, seed: int = 0, **kwargs: Any) -> VarianceBudget:
    r"""Splits the variance of the gradient by site and cost.

    The estimate is a sum of parts, one for each cost credited to each site, :math:`g = \sum_j g_j`; with the noise
    shared, part ``j`` has the share :math:`\operatorname{Cov}(g_j, g) / \operatorname{Var}(g)`, summed over elements.

    Args:
        compiled: what `scg.compile` returns, of ``order=1``.
        *args, **kwargs: what it is called with.
        n: gradient estimates, each a forward and a backward pass for every part.
        seed: of the random number generator, for these draws only. Nothing is left changed.

    Raises:
        EstimatorError: for ``order=2``, whose costs carry the scores themselves.

    Example:
        >>> import scg, torch
        >>> theta = torch.nn.Parameter(torch.tensor(0.3))
        >>> def loss():
        ...     z = scg.sample(torch.distributions.Bernoulli(logits=theta), "z")
        ...     return scg.cost(5 * z, "large") + scg.cost((z - 0.2) ** 2, "small")
        >>> found = scg.variance_budget(scg.compile(loss, estimator="score_function"), n=50)
        >>> found.shares["z", "large"] > found.shares["z", "small"]
        True
    """
    if compiled.options.order > 1:
        raise EstimatorError("variance_budget measures first derivatives: compile with order=1")
    traced(compiled, args, kwargs)
    graph, params = compiled.graph, model_parameters(compiled)
    groups: dict[tuple[str, str], set[tuple[str, str]]] = {}
    for site, cost in graph.credit:
        node = graph[cost]
        assert isinstance(node, Cost)
        if graph.sites[site].estimator is not None:
            groups.setdefault((site, node.label), set()).add((site, cost))
    with untouched(compiled, seed=seed), compiled.frozen():
        runs = [
            compiled.variant(variant, args, kwargs)
            for variant in (graph, *(only(graph, kept) for kept in (set(), *groups.values())))
        ]

        def gradient(run: Any, noise: int) -> Tensor:
            torch.manual_seed(noise)
            objective = objective_of(run(args, kwargs))
            if not objective.requires_grad:
                return torch.zeros(sum(p.numel() for p in params.values()), dtype=torch.float64)
            found = torch.autograd.grad(objective, [*params.values()], allow_unused=True, materialize_grads=True)
            return torch.cat([part.flatten().double() for part in found])

        tally = _Covariance(len(groups) + 2)
        for _ in range(n):
            noise = int(torch.randint(2**62, ()))
            with torch.random.fork_rng():
                whole, rest, *parts = (gradient(run, noise) for run in runs)
            tally.add(torch.stack([whole, rest, *(part - rest for part in parts)]))
    keys = [REST, *groups]
    covariance = tally.with_first().split([p.numel() for p in params.values()], dim=1)
    sums = {name: part.sum(1) for name, part in zip(params, covariance, strict=True)}
    together = torch.stack([*sums.values()]).sum(0)
    return VarianceBudget(
        name=graph.name,
        total=float(together[0]),
        shares=_shares(keys, together),
        by_parameter={name: _shares(keys, part) for name, part in sums.items()},
        variances={name: float(part[0]) for name, part in sums.items()},
        draws=n,
    )


def only(graph: Graph, kept: set[tuple[str, str]]) -> Graph:
    """The graph in which the credit edges ``kept`` alone carry a signal; its draws are the same."""
    credit = {key: edge if key in kept else dataclasses.replace(edge, share=0.0) for key, edge in graph.credit.items()}
    return dataclasses.replace(graph, credit=credit)


def _shares(keys: list[tuple[str, str]], covariance: Tensor) -> dict[tuple[str, str], float]:
    """From ``[whole, *keys]``; a parameter without variance has no shares."""
    total = float(covariance[0])
    return {key: float(part) / total if total > 0 else 0.0 for key, part in zip(keys, covariance[1:], strict=True)}


class _Covariance:
    """Covariances of several rows with the first, element by element (Welford 1962)."""

    def __init__(self, rows: int) -> None:
        self.n = 0
        self._mean = self._products = torch.zeros(rows, 1, dtype=torch.float64)

    def add(self, rows: Tensor) -> None:
        self.n += 1
        step = rows - self._mean
        self._mean = self._mean + step / self.n
        self._products = self._products + step * (rows[0] - self._mean[0])

    def with_first(self) -> Tensor:
        """``[rows, elements]``"""
        return self._products / max(self.n - 1, 1)

"""Second and higher derivatives: the surrogate in MagicBox form.

    S = tail(E[box(sum of log p of all score-type samples that influence c) c]) + sum_s (1 - box(log p_s)) b_s,
    box(x) = exp(x - stop(x))

Every derivative of ``S`` is an unbiased estimate of that derivative of the objective (Foerster et al. 2018, eq. 7);
the second sum is the baseline (Mao et al. 2019), with mean zero at every order. Each cost element meets the box of
just the site elements it is credited to.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from scg.backends.credit_sums import spread
from scg.backends.lowering import Interpreter
from scg.backends.sample_dims import Batched
from scg.backends.terms import Weighted, total_of
from scg.estimators.score_function import ScoreFunction
from scg.ir import Sample


class HigherOrder(Interpreter):
    """The interpreter for ``order=2``."""

    order = 2

    def _expected_cost(self, cost: str) -> Tensor:
        value: Batched = self.env[cost]
        exponent: Batched | None = None
        for site in self._scored() if self.learning else ():
            edge = self.graph.credit.get((site.name, cost))
            if edge is None:
                continue
            log_p = self.log_prob(site.dist, self.env[site.name], site.name)
            part = Batched(spread(log_p.tensor, len(log_p.dims), edge, value.shape), log_p.dims)
            exponent = part if exponent is None else self._add(exponent, part)
        if exponent is not None:
            dims = self.dims.union(value.dims, exponent.dims)
            boxed = Batched(box(exponent.tensor), exponent.dims)
            value = Batched(self.dims.align(value, dims) * self.dims.align(boxed, dims), dims)
        return self.expectation(value, cost).tensor

    def _uniform_costs(self) -> Tensor | None:
        return None  # every cost meets its own box

    def _terms(self, named: Callable[[str], Any]) -> Tensor | None:
        """The baselines alone: the scores stand in the boxes of the costs."""
        self.signals = self.make_signals()
        parts: list[Weighted] = []
        for site in self._scored():
            context = self.context_of(site)
            if context is None:
                continue
            assert isinstance(site.estimator, ScoreFunction)
            baseline = site.estimator.baseline_value(context)
            if baseline is None:
                continue
            with named(f"{site.name}_term"):
                term = (1 - box(context.log_prob)) * baseline.detach()
                parts.append(self._mean_of_term(term, site, context.dims, context.scale))
                if context.surrogate is not None:
                    parts.append(Weighted(context.surrogate, context.scale))
        return total_of(parts)

    def _scored(self) -> list[Sample]:
        sites = [site for site in self.graph.of(Sample) if isinstance(site.estimator, ScoreFunction)]
        return [site for site in sites if site.name in self.env and self.learns(site)]

    def _add(self, a: Batched, b: Batched) -> Batched:
        dims = self.dims.union(a.dims, b.dims)
        return Batched(self.dims.align(a, dims) + self.dims.align(b, dims), dims)


def box(x: Tensor) -> Tensor:
    """One in value, with the derivatives of ``exp(x)``: the MagicBox operator of DiCE."""
    return (x - x.detach()).exp()

"""The passes, and the order they run in, as data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from scg.ir import Graph
from scg.passes.check import check_gradients
from scg.passes.clean import eliminate_dead_code, share
from scg.passes.closed_forms import ClosedForms
from scg.passes.credit import assign_credit
from scg.passes.index_to_one_hot import index_to_one_hot
from scg.passes.insert_estimators import InsertEstimators
from scg.passes.normalize import normalize
from scg.passes.split_costs import split_costs
from scg.passes.split_marginals import split_marginals

Pass = Callable[[Graph], Graph]


def pipeline(
    insert: InsertEstimators, credit: str = "element", closed_forms: bool | Mapping[str, bool] = False
) -> tuple[tuple[str, Pass], ...]:
    """Name and pass, in order, for the given options."""

    def split(graph: Graph) -> Graph:
        return split_costs(graph, credit)

    def assign(graph: Graph) -> Graph:
        return assign_credit(graph, credit)

    def one_hot(graph: Graph) -> Graph:
        return index_to_one_hot(graph, insert.wants_one_hot)

    def check(graph: Graph) -> Graph:
        return check_gradients(graph, insert.allow_biased)

    return (
        ("normalize", normalize),
        ("index_to_one_hot", one_hot),
        ("split_marginals", split_marginals),
        ("check_gradients", check),
        ("closed_forms", ClosedForms(closed_forms, insert.sampled)),
        ("split_costs", split),
        ("assign_credit", assign),
        ("insert_estimators", insert),
    )


__all__: list[Any] = ["InsertEstimators", "Pass", "eliminate_dead_code", "pipeline", "share"]

"""Evaluates an expectation that is a function of distributions alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from scg.backends.sample_dims import Batched
from scg.ir import Expected

if TYPE_CHECKING:
    from scg.backends.lowering import Interpreter


def closed_form(run: Interpreter, node: Expected, params: Mapping[str, list[Batched]]) -> Batched:
    """The form at the distributions with ``params``, with their sample dims in front.  ``[*dims | *S]``"""
    dims = run.dims.union(*(param.dims for ref in node.dists for param in params[ref]))
    ranks = [len(run.dist_node(ref).template.batch_shape) for ref in node.dists]
    dists = []
    for ref, rank in zip(node.dists, ranks, strict=True):
        carried = dims if any(param.dims for param in params[ref]) else ()
        # without sample dims, broadcasting from the right is enough
        extra = [1] * (max(ranks) - rank if carried else 0)
        dists.append(run.distribution(ref, carried, extra, params[ref]))
    value = node.form(*dists)
    shape = (*run.dims.sizes(dims), *node.tensor.shape)
    return Batched(value if tuple(value.shape) == shape else value.expand(shape), dims)

"""Draws the sites of a sequence: one at a time, in rows of joint outcomes that they share."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from scg.backends.recorder import record_constant
from scg.backends.sample_dims import Batched
from scg.errors import EstimatorError
from scg.estimators.base import SequenceContext, SequenceEstimator
from scg.estimators.categorical import log_prob_of_support
from scg.estimators.frames import Frame
from scg.estimators.rows import own_dims
from scg.ir import Sample

if TYPE_CHECKING:
    from scg.backends.lowering import Interpreter


def draw_in_sequence(run: Interpreter, site: Sample) -> Batched:
    """The site's outcomes in all rows; rearranges the rows of what was drawn before, weighs them at the last site.

    Returns:
        ``[*dims | *elements | *E]``, the rows among ``dims``.
    """
    if run.rerunning:
        raise _cannot_rerun(run, site)
    frame, estimator = run.frames[site.sequence], site.estimator
    assert isinstance(estimator, SequenceEstimator)
    first = site.name == frame.name
    dims = run.dims.union(run._param_dims(site.dist), own_dims(site, run.graph.samples))
    if not first:
        dims = run.dims.union(dims, run.env[frame.name].dims)
    support = run._support(site)
    support = record_constant(functools.partial(support.to, site.tensor.device, site.tensor.dtype))
    place = _Place(frame, site, dims, [1 if first and d == frame.name else run.dims.size(d) for d in dims])
    run._check(site, run.distribution(site.dist, run._param_dims(site.dist)))
    known = [name for name in dims if not (first and name == frame.name)]
    dist = run.distribution(site.dist, known, [1] * len(site.sample_shape))
    log_p = log_prob_of_support(dist, support, len(known) + len(place.elements))
    if first:
        log_p = log_p.unsqueeze(1 + place.row)
    log_p = place.apart(log_p.to(torch.promote_types(log_p.dtype, torch.float32)))
    context = SequenceContext(
        frame.offset(site.name), frame.length, run.states.get(frame.name), run.training and run.learning
    )
    step = estimator.grow(None if first else run.sequences[frame.name], log_p, context)
    run.sequences[frame.name] = step.state
    if step.parents is not None:
        run.lineage.descend(frame.name, Batched(place.framed(step.parents), dims))
    if site.name == frame.last:
        weight, extra = estimator.finish(step.state)
        run.expectation.weights[frame.name] = Batched(place.framed(weight), dims)
        for name in frame.sites:
            other = _Place(frame, run._site(name), dims, place.sizes)
            run.extras[name] = tuple(Batched(other.rows(part), dims) for part in extra)
    return Batched(place.together(support[step.index]), dims)


def _cannot_rerun(run: Interpreter, site: Sample) -> EstimatorError:
    above = [run.graph[name] for name in run.graph.ancestors([site.dist])]
    names = [
        f"%{node.name} ({node.estimator.name!r})"
        for node in above
        if isinstance(node, Sample) and node.estimator is not None and node.sequence != site.sequence
    ]
    return EstimatorError(
        f"%{site.name} ({site.loc}) is drawn in a sequence, which cannot be drawn once more, but the estimator of a "
        f"site above it evaluates what lies below it at other outcomes: {', '.join(sorted(names))}.\n"
        "  Use 'score_function' above a sequence."
    )


class _Place:
    """Where the dims of one site's draw stand: ``[*dims | *elements]`` and ``[*others, *frame, rows, L]``."""

    def __init__(self, frame: Frame, site: Sample, dims: tuple[str, ...], sizes: list[int]) -> None:
        self.sizes, self.row = sizes, dims.index(frame.name)
        self.elements = site.tensor.shape[: site.tensor.ndim - site.tensor.event_ndim]
        self.event = site.tensor.event_ndim
        self.frame, self.joined = frame.dims[site.name], frame.joined[site.name]
        self.others = [i for i in range(len(dims)) if i != self.row]
        kept = {*self.frame, *self.joined}
        self.single = [d for d in range(len(self.elements)) if d not in kept]  # of size 1
        self.order = [
            *self.others,
            *(len(dims) + d for d in (*self.single, *self.frame)),
            self.row,
            *(len(dims) + d for d in self.joined),
        ]

    def apart(self, log_p: Tensor) -> Tensor:
        """From ``[S, *dims | *elements]`` up to broadcasting to ``[*others, *frame, rows, L, S]``."""
        full = log_p.expand([log_p.shape[0], *self.sizes, *self.elements])
        moved = full.permute([*(1 + i for i in self.order), 0])
        lead = len(self.order) - len(self.joined) - 1
        sizes = [size for i, size in enumerate(moved.shape[:lead]) if not self._is_single(i)]
        return moved.reshape([*sizes, moved.shape[lead], -1, log_p.shape[0]])

    def _is_single(self, i: int) -> bool:
        return len(self.others) <= i < len(self.others) + len(self.single)

    def together(self, value: Tensor) -> Tensor:
        """From ``[*others, *frame, k, L, *E]`` to ``[*dims | *elements | *E]``."""
        lead = len(self.others)
        shape = value.shape[lead : len(value.shape) - self.event]
        frame, rows = shape[: len(self.frame)], shape[len(self.frame)]
        sizes = [
            *value.shape[:lead],
            *[1] * len(self.single),
            *frame,
            rows,
            *(self.elements[d] for d in self.joined),
        ]
        event = value.shape[len(value.shape) - self.event :]
        return self._back(value.reshape([*sizes, *event]))

    def rows(self, value: Tensor) -> Tensor:
        """From ``[*others, *frame, k, …]`` to ``[*dims | *elements, …]`` with size 1 along joined dims."""
        lead = len(self.others)
        kept = lead + len(self.frame) + 1
        sizes = [*value.shape[:lead], *[1] * len(self.single), *value.shape[lead:kept], *[1] * len(self.joined)]
        return self._back(value.reshape([*sizes, *value.shape[kept:]]))

    def _back(self, value: Tensor) -> Tensor:
        count = len(self.order)
        back = [self.order.index(i) for i in range(count)]
        return value.permute([*back, *range(count, value.dim())])

    def framed(self, value: Tensor) -> Tensor:
        """From ``[*others, *frame, k]`` to ``[*dims | *frame]``."""
        return value.movedim(-1, self.row)

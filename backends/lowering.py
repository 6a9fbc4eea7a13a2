"""Lowers a graph with estimators to one flat program: the semantics of every estimator, written once.

`Interpreter` computes on tensors with named leading sample dims, in ordinary torch code. Run on real tensors it is the
reference; run on fake ones under a `Recorder` it leaves the flat program that is trained with.

    S = objective + sum over sites of term_s - stop(term_s)
    term_s = sum (Q_s - b_s) log p(z_s) over draws and elements

so that the value is the plain Monte Carlo estimate and the gradient is the estimator's.
"""

from __future__ import annotations

import copy
import functools
import itertools
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, OneHotCategorical, TransformedDistribution
from torch.distributions.constraints import Constraint

from scg.analysis.influence import Influence, Relation
from scg.analysis.support import finite_support
from scg.backends import runtime
from scg.backends.batching import Batched, Batcher, SampleDim, SampleDims, Value, check_shape
from scg.backends.coefficients import Coefficient, CoefficientRule
from scg.backends.credit_sums import credit_sum
from scg.backends.draw_call import LOOPS, DrawCall
from scg.backends.multisample import leave_one_out_gain, multisample_bound
from scg.backends.opaque_call import OpaqueCall
from scg.backends.parameter_check import ParameterCheck
from scg.backends.recorder import compile_time, record_call, record_constant
from scg.backends.single_draw import SingleDraw
from scg.errors import LoweringError
from scg.estimators.base import (
    EnumeratingEstimator,
    PathwiseEstimator,
    Rerun,
    RowEstimator,
    ScoreEstimator,
    SiteInfo,
)
from scg.estimators.rows import SAMPLES, joined_dims, own_dims
from scg.ir import (
    Bound,
    Cost,
    CreditEdge,
    Depends,
    Dist,
    Graph,
    Input,
    LogProb,
    Node,
    Op,
    Opaque,
    Param,
    Ref,
    Sample,
    map_refs,
)
from scg.operations import is_impure

_ALWAYS_VALID = {
    "sigmoid": ("unit_interval",),
    "softmax": ("simplex", "unit_interval"),
    "exp": ("positive", "nonnegative", "greater_than"),
    "softplus": ("positive", "nonnegative", "greater_than"),
}
"""Operations whose results need no check against these constraints."""


class Interpreter:
    """One evaluation of a graph: values of all nodes, expected costs, credited signals, surrogate terms."""

    def __init__(
        self,
        graph: Graph,
        found: Influence,
        fetch: Callable[[Node], Tensor],
        coefficients: CoefficientRule,
        states: Mapping[str, nn.Module],
        *,
        training: bool = True,
        learning: bool = True,
        debug: bool = False,
    ) -> None:
        self.graph, self.found, self.fetch, self.states = graph, found, fetch, states
        self.training, self.learning, self.debug = training, learning, debug
        enumerated = [s for s in graph.of(Sample) if isinstance(s.estimator, EnumeratingEstimator)]
        scored = [s for s in graph.of(Sample) if isinstance(s.estimator, ScoreEstimator)]
        self.joined = {site.name: joined_dims(graph, found, site) for site in (*enumerated, *scored)}
        self.supports = {site.name: finite_support(graph, self.dist_node(site.dist)) for site in (*enumerated, *scored)}
        self.dims = SampleDims(self._sample_dims())
        self.batcher = Batcher(self.dims)
        self.env: dict[str, Any] = {}
        self.params: dict[str, list[Batched]] = {}
        """Parameters of the distributions, by node."""
        self.before_transform: dict[str, Batched] = {}
        """Draws of transformed distributions before their transforms, by site."""
        self.extras: dict[str, tuple[Batched, ...]] = {}
        """What row-type estimators kept of their draws, by site."""
        self.bounds: dict[str, Batched] = {}
        """Negative log weights of the draws that multi-sample bounds join, by bound."""
        self.weights: dict[str, Batched] = {}
        """Probabilities of the rows of enumerated sites, ``[*dims, R | *elements]``, size 1 along joined dims."""
        self._edges_of: dict[str, list[CreditEdge]] = {}
        for (name, _), edge in graph.credit.items():
            self._edges_of.setdefault(name, []).append(edge)
        self._coefficients = coefficients
        self._shares: dict[Any, Tensor] = {}
        self._detached: dict[str, Batched] = {}
        self._reruns = 0
        self._rerunning = False
        self._kept: tuple[str, ...] = ()
        """Of a rerun: the sample dims of its rows and draws, whose derivatives stay apart."""
        self._follows = False
        """Of a rerun: whether its signal keeps the gradient of its rows."""
        self._joints: dict[Any, Batched] = {}
        """Joint probabilities of enumerated rows, by sites and by the elements they are met with."""
        self._sums: dict[tuple[int, ...], dict[frozenset[tuple[str, int]], Tensor]] = {}
        """Sums of credited costs made so far, by shape and members."""

    def _sample_dims(self) -> Iterable[SampleDim]:
        if self.graph.samples > 1:
            yield SampleDim(SAMPLES, self.graph.samples, "iid", order=-1)
        for order, site in enumerate(self.graph.of(Sample)):
            if isinstance(site.estimator, EnumeratingEstimator):
                yield SampleDim(site.name, self._support_rows(site), "enumerated", site.name, order)
            elif isinstance(site.estimator, RowEstimator):
                kind = "weighted" if site.estimator.weighted else "coupled"
                yield SampleDim(site.name, site.estimator.rows, kind, site.name, order)
            elif site.estimator is not None and (site.estimator.samples or 1) > 1:
                yield SampleDim(site.name, site.estimator.samples, "iid", site.name, order)

    # -- the run --------------------------------------------------------------------------------------------------
    def run(self, named: Callable[[str], Any]) -> Any:
        """Evaluates everything the outputs need and returns them, the objective replaced by the surrogate.

        Args:
            named: context manager that names what is recorded inside after a node.
        """
        graph = self.graph
        effects = [node.name for node in graph if _has_effect(node)]
        wanted = graph.ancestors([graph.objective, *_output_refs(graph), *effects])
        for node in graph:
            if node.name in wanted and not _is_write(node) and node.name not in graph.tail:
                with named(node.name):
                    self._evaluate(node)
        objective = self._objective(named)
        with named("loss"):
            total = self._terms(named) if self.learning else None
            if total is not None:
                objective = objective + (total - total.detach())
            objective = self._guard(objective)
        outputs = self._outputs(objective, named)
        for node in graph:  # last: everything else reads the buffers as they were
            if node.name in effects and _is_write(node):
                self._evaluate(node)
        return outputs

    def _evaluate(self, node: Node) -> None:
        match node:
            case Input() | Param():
                self.env[node.name] = Batched(self.fetch(node))
            case Op():
                args, kwargs = map_refs(self.env.__getitem__, (tuple(node.args), dict(node.kwargs)))
                if self._rerunning and is_impure(node):  # running statistics move once, in the real rows
                    args = (*args[:3], None, None, *args[5:])
                value = self.batcher.run(node, args, kwargs)
                check_shape(node, value, self.dims)
                self.env[node.name] = value
            case Dist():
                self.params[node.name] = [self.env[ref] for ref in node.params]
            case Sample():
                self.env[node.name] = self._draw(node)
            case LogProb():
                stop = self._stops_score(node)
                self.env[node.name] = self._log_prob(node.dist, self.env[node.value], node.value, stop=stop)
            case Opaque():
                self.env[node.name] = self._opaque(node)
            case Cost() | Depends():
                self.env[node.name] = self.env[node.value]
            case Bound():
                self.env[node.name] = self._bound(node)
            case _:
                raise LoweringError(f"%{node.name}: no lowering for a {node.kind} node")

    # -- distributions --------------------------------------------------------------------------------------------
    def dist_node(self, ref: str) -> Dist:
        node = self.graph[ref]
        assert isinstance(node, Dist)
        return node

    def distribution(
        self, ref: str, dims: Sequence[str], extra: Sequence[int] = (), params: list[Batched] | None = None
    ) -> Distribution:
        """The distribution with batch shape ``[*dims | *extra | *B]``; ``extra`` are dims the user put in front."""
        template = self.dist_node(ref).template
        params = self.params[ref] if params is None else params
        carried = [bool(param.dims) or bool(extra) for param in params]
        tensors = [
            param.tensor.reshape([*self._lead(param, dims), *[1] * len(extra), *param.shape])
            if carries
            else param.tensor
            for param, carries in zip(params, carried, strict=True)
        ]
        return template.rebuild(tensors, prefix=(*self.dims.sizes(dims), *extra), carries=carried)

    def _lead(self, value: Batched, dims: Sequence[str]) -> list[int]:
        return [self.dims.size(name) if name in value.dims else 1 for name in dims]

    def _param_dims(self, ref: str) -> tuple[str, ...]:
        return self.dims.union(*(param.dims for param in self.params[ref]))

    def _log_prob(self, ref: str, value: Batched, source: str, *, stop: bool = False) -> Batched:
        """``[*dims | *B]`` for the union of the parameters' and the value's dims; ``stop`` detaches the parameters."""
        template = self.dist_node(ref).template
        rank = len(template.batch_shape) + len(template.event_shape)
        dims = self.dims.union(self._param_dims(ref), value.dims)
        extra = [1] * max(value.ndim - rank, 0)
        params = [_detach(param) for param in self.params[ref]] if stop else None
        if self._param_dims(ref):
            dist = self.distribution(ref, dims, extra, params)
        else:
            dist = self.distribution(ref, (), extra if not dims else (), params)
        outcome = self.dims.align(value, dims, max(rank, value.ndim) if value.dims else None)
        plain = self.before_transform.get(source)
        if plain is not None and self._site(source).dist == ref:
            return Batched(_log_prob_before(dist, self.dims.align(plain, dims)), dims)
        if isinstance(dist, OneHotCategorical) and outcome.requires_grad:  # relaxed: not the gather of its argmax
            logits: Tensor = dist.logits
            limits = torch.finfo(logits.dtype)  # an impossible category: 0 * -inf
            return Batched((outcome * logits.clamp(limits.min)).sum(-1), dims)
        return Batched(dist.log_prob(outcome), dims)

    def _stops_score(self, node: LogProb) -> bool:
        source = self.graph[node.value]
        if not isinstance(source, Sample) or source.dist != node.dist:
            return False
        return isinstance(source.estimator, PathwiseEstimator) and source.estimator.stops_score

    # -- draws ----------------------------------------------------------------------------------------------------
    def _draw(self, site: Sample) -> Batched:
        if isinstance(site.estimator, EnumeratingEstimator):
            return self._enumerate(site)
        if site.value is not None:
            value: Batched = self.env[site.value]
            return Batched(value.tensor.detach(), value.dims)
        dims = self.dims.union(self._param_dims(site.dist), own_dims(site, self.graph.samples))
        carried = self._param_dims(site.dist)
        dist = self.distribution(site.dist, carried)
        self._check(site, dist)
        rows = isinstance(site.estimator, RowEstimator)
        new = tuple(name for name in dims if name not in carried and not (rows and name == site.name))
        shape = torch.Size([*self.dims.sizes(new), *site.sample_shape])

        def place(drawn: Tensor) -> Batched:
            """From ``[own rows, *new | *sample_shape | *carried | …]`` to ``[*dims | *sample_shape | …]``."""
            first = [site.name] if rows else []
            have = [*first, *new, *[""] * len(site.sample_shape), *carried]
            extra = len(first) + len(new)
            want = [*(have.index(name) for name in dims), *(extra + i for i in range(len(site.sample_shape)))]
            if want != sorted(want):
                drawn = drawn.permute([*want, *range(len(want), drawn.dim())])
            return Batched(drawn, dims)

        template = self.dist_node(site.dist).template
        if template.family in LOOPS:
            params = self.params[site.dist]
            carries = tuple(bool(param.dims) for param in params)
            tensors = [self.dims.align(param, carried) for param in params]
            return place(record_call(DrawCall(template, tuple(self.dims.sizes(carried)), carries, shape), *tensors))
        if isinstance(dist, TransformedDistribution) and not template.has_transform_slots:
            pathwise = isinstance(site.estimator, PathwiseEstimator)
            before = dist.base_dist.rsample(shape) if pathwise else dist.base_dist.sample(shape).detach()
            self.before_transform[site.name] = place(before)
            after = before
            for transform in dist.transforms:
                after = transform(after)
            return place(after)
        if isinstance(site.estimator, RowEstimator):
            support = self.supports[site.name]
            if support is not None:
                support = record_constant(functools.partial(support.to, site.tensor.device, site.tensor.dtype))
            drawn = site.estimator.draw_rows(dist, shape, support, self._joined_axes(site, len(new), len(carried)))
            self.extras[site.name] = tuple(place(part) for part in drawn.extra)
            if drawn.weight is not None:
                self.weights[site.name] = place(drawn.weight)
            return place(drawn.value)
        if isinstance(site.estimator, (PathwiseEstimator, ScoreEstimator)):
            return place(site.estimator.draw(dist, shape))
        return place(dist.sample(shape).detach())

    def _joined_axes(self, site: Sample, new: int, carried: int) -> tuple[int, ...]:
        """Where the joined elements stand in a draw ``[*new | *sample_shape | *carried | *B]``."""
        own = len(site.sample_shape)
        return tuple(new + dim if dim < own else new + carried + dim for dim in self.joined[site.name])

    def _support(self, site: Sample) -> Tensor:
        support = self.supports[site.name]
        assert support is not None
        return support

    def _support_rows(self, site: Sample) -> int:
        shape = site.tensor.shape
        elements = math.prod(shape[dim] for dim in self.joined[site.name])
        return int(len(self._support(site)) ** elements)

    def _enumerate(self, site: Sample) -> Batched:
        """Every outcome as a row; records the rows' probabilities."""
        support = self._support(site)
        shape, event = site.tensor.shape, site.tensor.event_ndim
        elements = shape[: len(shape) - event]
        joined = self.joined[site.name]
        placed = [elements[dim] if dim in joined else 1 for dim in range(len(elements))]

        def make() -> Tensor:
            rows = torch.tensor(outcome_rows(len(support), [elements[dim] for dim in joined]))  # [R, *joined]
            outcomes = support[rows.reshape([-1, *placed])]  # [R, *elements or 1, *E]
            return outcomes.to(device=site.tensor.device, dtype=site.tensor.dtype).contiguous()

        outcomes = record_constant(make)
        value = Batched(outcomes.expand([-1, *shape]), (site.name,))
        log_p = self._log_prob(site.dist, value, "")  # [*dims, R | *elements]
        self._check(site, self.distribution(site.dist, self._param_dims(site.dist)))
        lead = len(log_p.dims)
        full = log_p.tensor.expand([*log_p.tensor.shape[:lead], *elements]) if log_p.shape != elements else log_p.tensor
        if joined:
            full = full.sum([lead + dim for dim in joined], keepdim=True)
        self.weights[site.name] = Batched(full.exp(), log_p.dims)
        return value

    def _check(self, site: Sample, dist: Distribution) -> None:
        if not self.debug:
            return
        template = self.dist_node(site.dist).template
        for name, constraint, param in zip(template.names, template.constraints, self.params[site.dist], strict=True):
            record_call(ParameterCheck(site.name, site.loc, template.family, name, constraint), param.tensor)

    def _opaque(self, node: Opaque) -> Value:
        values = [arg for arg in map_refs(self.env.__getitem__, tuple(node.args)) if isinstance(arg, Batched)]
        dims = self.dims.union(*(value.dims for value in values))
        if dims and not node.pure:
            raise LoweringError(
                f"%{node.name} ({node.loc}): {node.fn.__qualname__} is stateful (pure=False) and would be called once "
                f"for each of the sample dims {list(dims)}; use samples=1 and estimators that do not rerun it"
            )
        plain = map_refs(self.env.__getitem__, tuple(node.args))
        args = [self.dims.align(arg, dims, full=True) if isinstance(arg, Batched) and arg.dims else
                arg.tensor if isinstance(arg, Batched) else arg for arg in plain]  # fmt: skip
        batched = tuple(isinstance(arg, Batched) and bool(arg.dims) for arg in plain)
        out = record_call(OpaqueCall(node, tuple(self.dims.sizes(dims)), batched), *args)
        if isinstance(out, Tensor):
            return Batched(out, dims)
        return tuple(Batched(item, dims) for item in out)

    # -- expectation over sample dims -----------------------------------------------------------------------------
    def expectation(self, value: Batched, of: str, keep: Sequence[str] = (), *, detach: bool = False) -> Batched:
        """Mean over i.i.d. dims and probability-weighted sum over enumerated ones.

        Args:
            value: ``[*dims | *S]`` of the node ``of``, whose influence says which weights its elements meet.
            keep: sample dims that stay: the weights of the others are conditional on them.
            detach: stop the gradient of the weights.
        """
        summed = tuple(name for name in value.dims if name in self.weights and name not in keep)
        if summed:
            weight = self._probability(of, value.ndim, summed, keep)
            if detach:
                weight = _detach(weight)
            dims = self.dims.union(value.dims, weight.dims)
            v, w = self.dims.align(value, dims), self.dims.align(weight, dims)
            if any(_may_be_impossible(self.dist_node(self._site(name).dist)) for name in summed):  # 0 * inf
                v = torch.where(w > 0, v, 0.0)
            value = _sum_out(w * v, dims, summed)
        drawn = [i for i, name in enumerate(value.dims) if name not in keep]
        if not drawn:
            return value
        return Batched(value.tensor.mean(drawn), tuple(name for name in value.dims if name in keep))

    def _probability(self, of: str, ndim: int, names: tuple[str, ...], keep: Sequence[str]) -> Batched:
        """Of the rows of ``names``, given those of ``keep``, as the elements of the node ``of`` meet them."""
        kept = tuple(name for name in self.weights if name in keep)
        if not self._closure(names, keep) & self._closure(kept, ()):
            return self._joint(of, ndim, names, frozenset(keep))
        drawn = frozenset(keep).difference(kept)  # what is summed is upstream of what is kept: Bayes' rule
        both = self._joint(of, ndim, self.dims.union(names, kept), drawn)
        given = self._joint(of, ndim, self.dims.union(kept), drawn)
        dims = self.dims.union(both.dims, given.dims)
        below = self.dims.align(given, dims, ndim).clamp(min=torch.finfo(given.tensor.dtype).tiny)
        return Batched(self.dims.align(both, dims, ndim) / below, dims)

    def _closure(self, names: Sequence[str], stop: Collection[str]) -> set[str]:
        """``names`` and the weighted sites that their weights depend on, directly or not, up to ``stop``."""
        seen: set[str] = set()
        stack = list(names)
        while stack:
            name = stack.pop()
            if name not in seen and name not in stop and name in self.weights:
                seen.add(name)
                stack.extend(self.weights[name].dims)
        return seen

    def _joint(self, of: str, ndim: int, names: tuple[str, ...], stop: frozenset[str]) -> Batched:
        """Joint probability of the rows of ``names``, the last site's weight first, sites before them summed out.

            P(z_t) = sum over z_{t-1} of P(z_{t-1}) P(z_t | z_{t-1})

        Messages are shared between all nodes that meet the same elements: T costs on a chain take T sums of k^2 terms.
        """
        wide = [name for name in self._closure(names, stop) if self._is_wide(name)]
        key = (names, stop, ndim, frozenset((name, self.found.relation(of, name)) for name in wide))
        if key not in self._joints:
            last = names[-1]
            weight = self._weight_for(of, last, ndim)
            before = self.dims.union(
                names[:-1], [name for name in weight.dims if name in self.weights and name != last and name not in stop]
            )
            if before:
                left = self._joint(of, ndim, before, stop)
                dims = self.dims.union(left.dims, weight.dims)
                product = self.dims.align(weight, dims, ndim) * self.dims.align(left, dims, ndim)
                weight = _sum_out(product, dims, [name for name in before if name not in names])
            self._joints[key] = weight
        return self._joints[key]

    def _is_wide(self, name: str) -> bool:
        """Do the weights of ``name`` differ between its elements?"""
        return any(size > 1 for size in self.weights[name].shape)

    def _site(self, name: str) -> Sample:
        node = self.graph[name]
        assert isinstance(node, Sample)
        return node

    def _weight_for(self, of: str, name: str, ndim: int) -> Batched:
        """The rows' probabilities of enumerated site ``name``, laid out along the dims of the node ``of``."""
        weight = self.weights[name]
        lead = len(weight.dims)
        shape = weight.shape
        if not self._is_wide(name):
            return Batched(weight.tensor.reshape([*weight.tensor.shape[:lead], *[1] * ndim]), weight.dims)
        relation = self.found.relation(of, name)
        if relation is None:  # the value does not depend on it: any element's weights sum to one
            first = weight.tensor.flatten(lead)[..., 0]
            return Batched(first.reshape([*first.shape, *[1] * ndim]), weight.dims)
        with compile_time():
            axes = [relation.tied(dim) if size > 1 else None for dim, size in enumerate(shape)]
        wide = [dim for dim, size in enumerate(shape) if size > 1]
        places = [axes[dim] for dim in wide]
        if None not in places and len(set(places)) == len(places):
            tensor = weight.tensor.reshape([*weight.tensor.shape[:lead], *(shape[dim] for dim in wide)])
            order = sorted(range(len(wide)), key=lambda i: places[i] or 0)
            tensor = tensor.permute([*range(lead), *(lead + i for i in order)])
            sizes = [1] * ndim
            for i in order:
                sizes[places[i] or 0] = shape[wide[i]]
            return Batched(tensor.reshape([*tensor.shape[:lead], *sizes]), weight.dims)
        with compile_time():
            points = [_point_index(relation, dim, ndim) if size > 1 else 0 for dim, size in enumerate(shape)]
        placed = [_placed(point) for point in points]
        return Batched(weight.tensor[(*[slice(None)] * lead, *placed)], weight.dims)

    def _expected_cost(self, cost: str) -> Tensor:
        return self.expectation(self.env[cost], cost).tensor

    def _objective(self, named: Callable[[str], Any]) -> Tensor:
        """The linear tail applied to the expected costs."""
        if self._coefficients.constant and len(self._coefficients.costs) >= MANY:
            with named("objective"):
                parts = self._uniform_costs()
            if parts is not None:
                return parts
        graph = self.graph
        env: dict[str, Any] = {}

        def look(ref: Ref) -> Any:
            if ref in env:
                return env[ref]
            if isinstance(graph[ref], Cost):
                env[ref] = Batched(self._expected_cost(ref))
                return env[ref]
            return self._unmoved(ref)

        for node in graph:
            if node.name in graph.tail:
                with named(node.name):
                    assert isinstance(node, Op)
                    args, kwargs = map_refs(look, (tuple(node.args), dict(node.kwargs)))
                    env[node.name] = self.batcher.run(node, args, kwargs)
        with named("objective"):
            value: Batched = look(graph.objective)
            return value.tensor

    def _unmoved(self, ref: Ref) -> Value:
        """A value that no sample moves, without the sample dims of what it was computed from."""
        value = self.env[ref]
        return self.expectation(value, ref) if isinstance(value, Batched) else value

    def _uniform_costs(self) -> Tensor | None:
        """The objective as one weighted sum of all cost elements: a long chain's tail in a few calls.

        None where a coefficient is no number, or a cost's expectation is no plain mean.
        """
        rule = self._coefficients
        parts: list[Weighted] = []
        for name, coefficient in zip(rule.costs, rule.fixed, strict=True):
            value: Batched = self.env[name]
            kinds = {self.dims[dim].kind for dim in value.dims}
            if not isinstance(coefficient, float) or not kinds <= {"iid", "coupled"}:
                return None
            parts.append(Weighted(value.tensor, coefficient / math.prod(self.dims.sizes(value.dims))))
        total = total_of(parts)
        return total if total is None or rule.offset == 0.0 else total + rule.offset

    # -- credit ---------------------------------------------------------------------------------------------------
    def _terms(self, named: Callable[[str], Any]) -> Tensor | None:
        """Sum of all surrogate terms, None where no site needs one."""
        graph = self.graph
        sites = [s for s in graph.of(Sample) if isinstance(s.estimator, ScoreEstimator) and s.name in self.env]
        if not any(self._learns(site) for site in sites):
            return None
        self._find_coefficients()
        parts: list[Weighted] = []
        for site in reversed(sites):  # last first: credit sets of earlier sites contain those of later ones
            if self._learns(site):
                with named(f"{site.name}_term"):
                    parts += self._score_term(site)
        return total_of(parts)

    def _find_coefficients(self) -> None:
        self.coefficients: Mapping[str, Coefficient] = self._coefficients(
            lambda ref: self._unmoved(ref).tensor, lambda made: record_constant(lambda: made)
        )

    def _learns(self, site: Sample) -> bool:
        return any(param.tensor.requires_grad for param in self.params[site.dist])

    def _score_term(self, site: Sample) -> list[Weighted]:
        """The site's surrogate as tensors whose sums, each times its factor, make it up."""
        value: Batched = self.env[site.name]
        dims = self.dims.union(self._param_dims(site.dist), value.dims)
        found = self.signal(site, dims)
        bounds = self._bound_terms(site, dims)
        if found is None:
            return bounds
        signal, scale = found
        assert isinstance(site.estimator, ScoreEstimator)
        context = Context(self, site, dims, signal)
        term = site.estimator.term(context)
        rows = context.row_axis
        if rows is not None and term.dim() > rows and term.dim() >= len(dims):
            assert term.shape[rows] == 1, f"{site.estimator.name}: its term must be summed over its own rows"
            term, dims = term.squeeze(rows), tuple(name for name in dims if name != site.name)
        added = [] if context.surrogate is None else [Weighted(context.surrogate, scale)]
        return [self._mean_of_term(term, site, dims, scale), *added, *bounds]

    def _mean_of_term(self, term: Tensor, site: Sample, dims: tuple[str, ...], scale: float) -> Weighted:
        """Sum over elements and a rerun's rows and draws, mean over i.i.d. dims, weighted sum over weighted ones."""
        left = [name for name in dims if name not in self._kept]
        if any(self.dims[name].kind not in ("iid", "coupled") for name in left):
            return Weighted(self.expectation(Batched(term, dims), site.name, self._kept, detach=True).tensor, scale)
        return Weighted(term, scale / math.prod(self.dims.sizes(left)))

    def _edges(self, site: Sample) -> list[CreditEdge]:
        edges = self._edges_of.get(site.name, [])
        return [edge for edge in edges if not self.coefficients[edge.cost].is_zero]

    # -- multi-sample bounds --------------------------------------------------------------------------------------
    def _bound(self, node: Bound) -> Batched:
        """The bound over the draws of the whole program; its value carries them no more."""
        value: Batched = self.env[node.value]
        if SAMPLES not in value.dims:
            return value
        axis = value.dims.index(SAMPLES)
        self.bounds[node.name] = value
        return Batched(multisample_bound(value.tensor, axis, node.alpha), tuple(d for d in value.dims if d != SAMPLES))

    def _bound_of(self, cost: str) -> Bound | None:
        node = self.graph[cost]
        assert isinstance(node, Cost)
        bound = self.graph[node.value]
        return bound if isinstance(bound, Bound) and bound.name in self.bounds else None

    def _bound_terms(self, site: Sample, dims: tuple[str, ...]) -> list[Weighted]:
        """VIMCO: each draw's score times the bound less what it would be had the draw weighed as the others do."""
        parts = []
        for edge in self._edges(site):
            bound = self._bound_of(edge.cost)
            if bound is None:
                continue
            value = self.bounds[bound.name]
            axis = value.dims.index(SAMPLES)
            gain = leave_one_out_gain(value.tensor.detach(), axis, bound.alpha) * self.dims.size(SAMPLES)
            share = self._make_credit(edge, dims, 1.0, Batched(gain, value.dims))
            parts.append(self._mean_of_term(Context(self, site, dims, share).score_times(share), site, dims, 1.0))
        return parts

    def signal(self, site: Sample, dims: tuple[str, ...]) -> tuple[Tensor, float] | None:
        """The credited cost-to-go ``[*dims | *elements]`` (size 1 where it does not vary) and a factor taken out."""
        edges = [edge for edge in self._edges(site) if self._bound_of(edge.cost) is None]
        if not edges:
            return None
        uniform = [self.coefficients[edge.cost].uniform for edge in edges]
        known = [abs(u) for u in uniform if u is not None]
        scale = max(known) if known and len(known) == len(uniform) else 1.0
        groups: dict[tuple[int, ...], list[tuple[str, Tensor]]] = {}
        for edge in edges:
            value = self._credit_value(edge, dims, scale)
            groups.setdefault(tuple(value.shape), []).append((edge.cost, value))
        total: Tensor | None = None
        for shape, members in groups.items():
            part = self._running_sum(shape, members)
            total = part if total is None else total + part
        assert total is not None
        return total, scale

    def _running_sum(self, shape: tuple[int, ...], members: list[tuple[str, Tensor]]) -> Tensor:
        """The sum of the members, built on the largest sum made before: T rewards-to-go take T additions."""
        ids = frozenset((cost, id(value)) for cost, value in members)
        known = self._sums.setdefault(shape, {})
        best: frozenset[tuple[str, int]] = max((done for done in known if done <= ids), key=len, default=frozenset())
        total: Tensor | None = known.get(best)
        for cost, value in members:
            if (cost, id(value)) not in best:
                total = value if total is None else total + value
        assert total is not None
        known[ids] = total
        return total

    def _credit_value(self, edge: CreditEdge, dims: tuple[str, ...], scale: float) -> Tensor:
        """One cost's share of a site's signal: ``[*dims | *elements]`` with size 1 along mixed dims."""
        key = (edge.cost, dims, scale, edge.axes, edge.mixed if edge.simple else id(edge))
        if key not in self._shares:
            self._shares[key] = self._make_credit(edge, dims, scale)
        return self._shares[key]

    # -- reruns ---------------------------------------------------------------------------------------------------
    def rerun(self, site: Sample, dims: tuple[str, ...], values: Tensor, differentiable: bool) -> Rerun:
        """Evaluates the slice below ``site`` at rows of other outcomes ``[R, *dims | *S]``."""
        self._reruns += 1
        row = SampleDim(f"{site.name}*{self._reruns}", values.shape[0], "counterfactual", site.name, -1 - self._reruns)
        child = copy.copy(self)
        child.dims = SampleDims([*self.dims.table.values(), row])
        child.batcher = Batcher(child.dims)
        below = self.graph.descendants([site.name])
        child.env = _Detached({name: value for name, value in self.env.items() if name not in below})
        child.params = {
            name: [child.env[ref] for ref in self.dist_node(name).params] for name in self.params if name not in below
        }
        child.weights = {name: _detach(weight) for name, weight in self.weights.items()}
        child.before_transform = {n: _detach(v) for n, v in self.before_transform.items() if n not in below}
        child.extras, child._shares, child._detached, child._sums = dict(self.extras), {}, {}, {}
        child._joints = {}
        all_dims = (row.name, *dims)
        child._rerunning, child.training, child._kept = True, False, all_dims
        child.env[site.name] = Batched(values, all_dims)
        costs = [edge.cost for edge in self._edges_of.get(site.name, [])]
        wanted = self.graph.ancestors(costs) & below
        for node in self.graph:
            if node.name in wanted and node.name != site.name:
                child._evaluate(node)
        child._follows = differentiable
        found = child.signal(site, all_dims)
        assert found is not None
        signal, scale = found
        child._follows, child._shares, child._detached, child._sums, child._joints = False, {}, {}, {}, {}
        return Rerun(signal, child._total(costs, wanted, scale) if differentiable else None)

    def _total(self, costs: list[str], wanted: set[str], scale: float) -> Tensor:
        """Costs and inner terms of a rerun, summed over draws, with the gradient that reaches its rows.  ``[R]``"""
        total: Tensor | None = None
        for cost in costs:
            value = self.expectation(self.env[cost], cost, self._kept).tensor
            coefficient = self.coefficients[cost]
            if coefficient.uniform is not None:
                part = _by_row(value) * (coefficient.uniform / scale)
            else:
                assert coefficient.tensor is not None
                part = _by_row(value * coefficient.tensor.detach()) / scale
            total = part if total is None else total + part
        assert total is not None
        for inner in reversed(self.graph.of(Sample)):
            if inner.name in wanted and isinstance(inner.estimator, ScoreEstimator) and self._learns(inner):
                for term in self._score_term(inner):
                    total = total + _by_row(term.tensor) * (term.factor / scale)
        return total

    def _make_credit(
        self, edge: CreditEdge, dims: tuple[str, ...], scale: float, cost: Batched | None = None
    ) -> Tensor:
        cost = self._detached_cost(edge.cost) if cost is None else cost
        value = self.expectation(cost, edge.cost, keep=dims, detach=True)
        tensor = self.dims.align(value, dims, full=False) if value.dims else value.tensor
        if not value.dims and dims:
            tensor = tensor.reshape([1] * len(dims) + list(value.shape))
        coefficient = self.coefficients[edge.cost]
        if coefficient.uniform is None:
            assert coefficient.tensor is not None
            tensor = tensor * coefficient.tensor.detach()
            if scale != 1.0:
                tensor = tensor / scale
        lead = len(dims)
        tensor = credit_sum(tensor, lead, edge, self._element_shape(edge.site))
        if coefficient.uniform is not None and coefficient.uniform != scale:
            tensor = tensor * (coefficient.uniform / scale)
        return tensor

    def _detached_cost(self, cost: str) -> Batched:
        if cost not in self._detached:
            value: Batched = self.env[cost]
            self._detached[cost] = value if self._follows else Batched(value.tensor.detach(), value.dims)
        return self._detached[cost]

    def _element_shape(self, site: str) -> tuple[int, ...]:
        type_ = self.graph[site].tensor
        return type_.shape[: len(type_.shape) - type_.event_ndim]

    # -- what leaves the program ----------------------------------------------------------------------------------
    def _guard(self, objective: Tensor) -> Tensor:
        """NaN where a distribution's parameter breaks its constraint: validation is off in the compiled step."""
        valid: Tensor | None = None
        for name, params in self.params.items():
            node = self.dist_node(name)
            for ref, constraint, param in zip(node.params, node.template.constraints, params, strict=True):
                if constraint is None or not self._needs_check(ref, constraint):
                    continue
                ok = constraint.check(param.tensor).all()
                valid = ok if valid is None else torch.logical_and(valid, ok)
        return objective if valid is None else torch.where(valid, objective, float("nan"))

    def _needs_check(self, ref: Ref, constraint: Constraint) -> bool:
        text = str(constraint).lower()
        if "real" in text or not self.graph[ref].tensor.dtype.is_floating_point:
            return False
        node = self.graph[ref]
        while isinstance(node, Op) and node.op_name.split(".")[0] in ("expand", "view", "unsqueeze", "broadcast_to"):
            node = self.graph[node.inputs[0]]
        if isinstance(node, Param) and node.role == "constant":
            with compile_time():
                return not bool(constraint.check(self.graph.tensors[node.path]).all())
        valid = _ALWAYS_VALID.get(node.op_name.split(".")[0], ()) if isinstance(node, Op) else ()
        return not any(word in text.replace("unitinterval", "unit_interval") for word in valid)

    def _outputs(self, objective: Tensor, named: Callable[[str], Any]) -> Any:
        graph = self.graph
        single = SingleDraw(self, named)
        return map_refs(lambda ref: objective if ref == graph.objective else single.value(ref), graph.outputs)


MANY = 4
"""From how many parts on they are joined before they are summed."""


@dataclass(frozen=True)
class Weighted:
    """A part of a scalar: the sum of ``tensor``, times ``factor``."""

    tensor: Tensor
    factor: float


def total_of(parts: Sequence[Weighted]) -> Tensor | None:
    """The sum of all parts; those with one factor are joined first, which a long chain has many of."""
    groups: dict[float, list[Tensor]] = {}
    for part in parts:
        groups.setdefault(part.factor, []).append(part.tensor)
    total: Tensor | None = None
    for factor, tensors in groups.items():
        if len(tensors) >= MANY:
            tensors = [torch.cat([tensor.reshape(-1) for tensor in tensors])]
        for tensor in tensors:
            value = tensor.sum() if tensor.dim() else tensor
            value = value if factor == 1.0 else value * factor
            total = value if total is None else total + value
    return total


class Context:
    """The backend's `SiteContext`."""

    def __init__(self, interpreter: Interpreter, site: Sample, dims: tuple[str, ...], signal: Tensor) -> None:
        self._of, self._site, self.dims = interpreter, site, dims
        template = interpreter.dist_node(site.dist).template
        support = interpreter.supports.get(site.name)
        self.joined = interpreter.joined[site.name]
        if support is not None:
            with compile_time():
                support = support.to(device=site.tensor.device, dtype=site.tensor.dtype)
        self.site = SiteInfo(
            site.name, template, site.tensor.shape, site.tensor.event_ndim, support, joined=self.joined
        )
        self.dist = interpreter.distribution(site.dist, dims, [1] * len(site.sample_shape))
        self.value = interpreter.dims.align(interpreter.env[site.name], dims)
        self.signal = signal.detach() if signal.requires_grad else signal
        self.extra = tuple(interpreter.dims.align(part, dims) for part in interpreter.extras.get(site.name, ()))
        kinds = [interpreter.dims[name].kind for name in dims]
        self.iid = tuple(i for i, kind in enumerate(kinds) if kind == "iid")
        self.row_axis = dims.index(site.name) if isinstance(site.estimator, RowEstimator) else None
        self.state = interpreter.states.get(site.name)
        self.training = interpreter.training and interpreter.learning
        self.surrogate: Tensor | None = None

    @functools.cached_property
    def log_prob(self) -> Tensor:
        found = self._of._log_prob(self._site.dist, self._of.env[self._site.name], self._site.name)
        return self._of.dims.align(found, self.dims)

    def score_times(self, multiplier: Tensor) -> Tensor:
        multiplier = multiplier.detach()
        score = self.log_prob
        lead = len(self.dims)
        flat = [axis for axis in range(lead, score.dim()) if multiplier.shape[axis] == 1 and score.shape[axis] > 1]
        return multiplier * (score.sum(flat, keepdim=True) if flat else score)

    def log_prob_of(self, values: Tensor) -> Tensor:
        return self.dist.log_prob(values)

    def rerun(self, values: Tensor, *, differentiable: bool = False) -> Rerun:
        return self._of.rerun(self._site, self.dims, values if differentiable else values.detach(), differentiable)

    def variables(self) -> tuple[Distribution, list[Tensor], list[Tensor]]:
        fixed = self.parameters()
        free = {slot: self.variable(tensor) for slot, tensor in fixed.items()}
        return self.distribution(free), list(free.values()), list(fixed.values())

    def parameters(self) -> dict[int, Tensor]:
        template, prefix = self.site.template, self._prefix
        found = {}
        for slot, (param, event) in enumerate(zip(self._params, template.event_dims, strict=True)):
            if param.tensor.requires_grad:
                shape = param.shape[param.ndim - event :]
                found[slot] = self._placed(param).expand([*prefix, *template.batch_shape, *shape])
        return found

    def distribution(self, parameters: Mapping[int, Tensor]) -> Distribution:
        tensors = [parameters.get(slot, self._placed(param)) for slot, param in enumerate(self._params)]
        carries = [bool(param.dims) or slot in parameters for slot, param in enumerate(self._params)]
        return self.site.template.rebuild(tensors, prefix=self._prefix, carries=carries)

    @property
    def _params(self) -> list[Batched]:
        return self._of.params[self._site.dist]

    @property
    def _prefix(self) -> tuple[int, ...]:
        return (*self._of.dims.sizes(self.dims), *self._site.sample_shape)

    def _placed(self, param: Batched) -> Tensor:
        if not param.dims:
            return param.tensor
        lead = self._of._lead(param, self.dims)
        return param.tensor.reshape([*lead, *[1] * len(self._site.sample_shape), *param.shape])

    def add(self, surrogate: Tensor) -> None:
        """Adds a scalar to the surrogate, in the units of the signal: the pathwise part of a control variate."""
        self.surrogate = surrogate if self.surrogate is None else self.surrogate + surrogate

    def variable(self, value: Tensor) -> Tensor:
        return record_call(Variable(), value)  # type: ignore[no-any-return]

    def read(self, names: tuple[str, ...] | None) -> list[Tensor]:
        found = []
        for node in self._of.graph:
            wanted = (
                isinstance(node, Input) if names is None else bool({node.name, getattr(node, "path", "")} & {*names})
            )
            if wanted:
                value: Batched = self._of.env[node.name]
                found.append(self._of.dims.align(value, self.dims).detach())
        return found

    def gradient(self, scalar: Tensor, wrt: Tensor, *, differentiable: bool = False) -> Tensor:
        return record_call(InputGradient(differentiable), scalar, wrt)  # type: ignore[no-any-return]


class Variable:
    """The value of a tensor as an independent variable; a leaf of the generated code."""

    __name__ = __qualname__ = "variable"
    __module__ = __name__

    def __call__(self, value: Tensor) -> Tensor:
        return runtime.variable(value)


class InputGradient:
    """The gradient of a scalar in one tensor; a leaf of the generated code."""

    __name__ = __qualname__ = "input_gradient"
    __module__ = __name__

    def __init__(self, differentiable: bool) -> None:
        self.differentiable = differentiable

    def fake(self, scalar: Tensor, wrt: Tensor) -> Tensor:
        found = wrt * 0.0 + scalar * 0.0  # of the right shape, and differentiable in both
        return found if self.differentiable else found.detach()

    def __call__(self, scalar: Tensor, wrt: Tensor) -> Tensor:
        return runtime.input_gradient(scalar, wrt, self.differentiable)


class _Detached(dict[str, Any]):
    """Values of a run seen from a rerun: each without its gradient."""

    def __getitem__(self, name: str) -> Any:
        value = super().__getitem__(name)
        if isinstance(value, Batched) and name not in self.__dict__.setdefault("own", set()):
            return _detach(value)
        return value

    def __setitem__(self, name: str, value: Any) -> None:
        self.__dict__.setdefault("own", set()).add(name)
        super().__setitem__(name, value)


def _sum_out(tensor: Tensor, dims: tuple[str, ...], names: Sequence[str]) -> Batched:
    """``[*dims | …]`` without the dims ``names``."""
    axes = [dims.index(name) for name in names]
    return Batched(tensor.sum(axes) if axes else tensor, tuple(name for name in dims if name not in names))


def _detach(value: Batched) -> Batched:
    return Batched(value.tensor.detach(), value.dims) if value.tensor.requires_grad else value


# -- pieces -----------------------------------------------------------------------------------------------------------
def outcome_rows(support: int, sizes: Sequence[int]) -> list[Any]:
    """Indices into the support for every joint outcome of ``prod(sizes)`` elements, ``[R, prod(sizes)]``.

    >>> outcome_rows(2, [2])
    [(0, 0), (0, 1), (1, 0), (1, 1)]
    """
    return list(itertools.product(range(support), repeat=math.prod(sizes)))


def _log_prob_before(dist: Distribution, before: Tensor) -> Tensor:
    """Log density of a transformed draw, from its value before the (parameter-free) transforms."""
    assert isinstance(dist, TransformedDistribution)
    event = len(dist.event_shape)
    x = before
    log_det: Tensor | float = 0.0
    for transform in dist.transforms:
        y = transform(x)
        event_dim = event + transform.domain.event_dim - transform.codomain.event_dim
        jacobian = transform.log_abs_det_jacobian(x, y)
        log_det = log_det + _sum_last(jacobian, event_dim - transform.domain.event_dim)
        x = y
    base = dist.base_dist.log_prob(before)
    return _sum_last(base, event - len(dist.base_dist.event_shape)) - log_det


def _sum_last(tensor: Tensor, count: int) -> Tensor:
    return tensor.sum(tuple(range(-count, 0))) if count > 0 else tensor


def _point_index(relation: Relation, dim: int, ndim: int) -> Tensor:
    """The one site index each element sees along ``dim``; any, where it sees none. Event dims, behind, share theirs."""
    lo, hi = relation.lo[dim], relation.hi[dim]
    point = torch.where(lo <= hi, lo, torch.zeros_like(lo))
    return (point.flatten(ndim)[..., 0] if point.dim() > ndim else point).contiguous()


def _by_row(tensor: Tensor) -> Tensor:
    """Sums ``[R, …]`` over all but its first dim."""
    return tensor.flatten(1).sum(1) if tensor.dim() > 1 else tensor


def _placed(point: Tensor | int) -> Any:
    """An index of compile time as generated code takes it: a tensor, or a number where there is one element."""
    if isinstance(point, int):
        return point
    if point.dim():
        return record_constant(lambda: point)
    with compile_time():
        return int(point)


def _may_be_impossible(node: Dist) -> bool:
    return node.template.cls.__name__ != "Bernoulli"


def _has_effect(node: Node) -> bool:
    if isinstance(node, Opaque):
        return not node.pure
    return isinstance(node, Op) and (is_impure(node) or _is_write(node))


def _is_write(node: Node) -> bool:
    """The final copy into a buffer that `functionalize` leaves."""
    return isinstance(node, Op) and node.target is torch.ops.aten.copy_.default


def _output_refs(graph: Graph) -> list[Ref]:
    found: list[Ref] = []
    map_refs(lambda ref: found.append(ref), graph.outputs)
    return found

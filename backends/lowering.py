"""Lowers a graph with estimators to one flat program: the semantics of every estimator, written once.

`Interpreter` computes on tensors with named leading sample dims, in ordinary torch code. Run on real tensors it is the
reference; run on fake ones under a `Recorder` it leaves the flat program that is trained with.

    S = objective + sum over sites of term_s - stop(term_s)
    term_s = sum (Q_s - b_s) log p(z_s) over draws and elements

so that the value is the plain Monte Carlo estimate and the gradient is the estimator's.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Categorical, Distribution, OneHotCategorical, TransformedDistribution, constraints
from torch.distributions.constraints import Constraint

from scg.analysis.factors import elimination_plan
from scg.analysis.influence import Influence, influence
from scg.analysis.support import site_support
from scg.backends.batching import Batcher, check_shape
from scg.backends.beams import Layout, Lineage, Rows
from scg.backends.closed_form import closed_form
from scg.backends.coefficients import Coefficient, CoefficientRule
from scg.backends.doubly import weigh_paths
from scg.backends.draw_call import LOOPS, DrawCall
from scg.backends.elimination import log_marginal
from scg.backends.expectation import Expectation
from scg.backends.multisample import leave_one_out_gain, multisample_bound
from scg.backends.opaque_call import OpaqueCall
from scg.backends.parameter_check import ParameterCheck
from scg.backends.recorder import InPlaceError, compile_time, record_call, record_constant
from scg.backends.sample_dims import Batched, SampleDim, SampleDims, Value, stop_gradient
from scg.backends.sequence_draw import draw_in_sequence
from scg.backends.signals import Signals
from scg.backends.single_draw import SingleDraw
from scg.backends.site_context import VARIABLE, Context
from scg.backends.terms import MANY, Weighted, total_of
from scg.errors import LoweringError
from scg.estimators.base import (
    EnumeratingEstimator,
    PathwiseEstimator,
    RerunEstimator,
    RowEstimator,
    ScoreEstimator,
)
from scg.estimators.enumerate_ import Enumerate
from scg.estimators.frames import frames
from scg.estimators.rows import SAMPLES, joined_dims, own_dims
from scg.ir import (
    Bound,
    Cost,
    Depends,
    Dist,
    Expected,
    Graph,
    Input,
    LogProb,
    Marginal,
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

    order = 1
    """Derivatives that are right."""

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
        self.frames = frames(graph, found)
        """The sequences of sites, by name."""
        self.joined = joined_dims(graph, found)
        for frame in self.frames.values():
            self.joined.update(frame.joined)
        self.supports = {site.name: site_support(graph, site) for site in (*enumerated, *scored)}
        self.dims = SampleDims(self._sample_dims())
        self.batcher = Batcher(self.dims)
        layout = Layout(found, self.frames)
        self.lineage = Lineage(self.dims, layout)
        self.sequences: dict[str, Any] = {}
        """What the sites drawn so far leave for the next one, by sequence."""
        self.rows = Rows(self.lineage)
        self.env: MutableMapping[str, Any] = self.rows
        self.params: MutableMapping[str, list[Batched]] = Rows(
            self.lineage, nodes=lambda ref: self.dist_node(ref).params
        )
        """Parameters of the distributions, by node."""
        self.before_transform: MutableMapping[str, Batched] = Rows(self.lineage, self._elements)
        """Draws of transformed distributions before their transforms, by site."""
        self.extras: MutableMapping[str, tuple[Batched, ...]] = Rows(self.lineage, self._elements)
        """What row-type estimators kept of their draws, by site."""
        self.bounds: dict[str, Batched] = {}
        """Negative log weights of the draws that multi-sample bounds join, by bound."""
        self.expectation = Expectation(graph, found, self.dims, layout, lambda: Rows(self.lineage, self._elements))
        self._outcomes: dict[Any, Tensor] = {}
        """Tables of outcomes made so far: the steps of a chain share one."""
        self.reruns = 0
        """How many reruns were made of it and of what it was made from."""
        self.contexts: dict[str, Context | None] = {}
        self.memo: dict[Any, Any] = {}
        """What estimators keep of this run, shared by its sites."""
        self.rerunning = False
        self.kept: tuple[str, ...] = ()
        """Of a rerun: the sample dims of its rows and draws, whose derivatives stay apart."""
        self._coefficients = coefficients

    def _sample_dims(self) -> Iterable[SampleDim]:
        if self.graph.samples > 1:
            yield SampleDim(SAMPLES, self.graph.samples, "iid", order=-1)
        for order, site in enumerate(self.graph.of(Sample)):
            if isinstance(site.estimator, EnumeratingEstimator):
                yield SampleDim(site.name, self._support_rows(site), "enumerated", site.name, order)
            elif isinstance(site.estimator, RowEstimator):
                if site.row_dim != site.name:
                    continue
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
                    self.evaluate(node)
        objective = self._objective(named)
        with named("loss"):
            total = self._terms(named) if self.learning else None
            if total is not None:
                total = total.to(objective.dtype)  # a baseline's running mean may be of another
                objective = objective + (total - total.detach())
            objective = self._guard(objective)
        outputs = self._outputs(objective, named)
        for node in graph:  # last: everything else reads the buffers as they were
            if node.name in effects and _is_write(node):
                self.evaluate(node)
        return outputs

    def evaluate(self, node: Node) -> None:
        match node:
            case Input() | Param():
                self.env[node.name] = Batched(self.fetch(node))
            case Op():
                args, kwargs = map_refs(self.env.__getitem__, (tuple(node.args), dict(node.kwargs)))
                if self.rerunning and is_impure(node):  # running statistics move once, in the real rows
                    args = (*args[:3], None, None, *args[5:])
                value = self.batcher.run(node, args, kwargs)
                check_shape(node, value, self.dims)
                self.env[node.name] = value
            case Dist():
                self.params[node.name] = [self.env[ref] for ref in node.params]
            case Sample():
                try:
                    self.env[node.name] = self._draw(node)
                except InPlaceError as error:
                    family = self.dist_node(node.dist).template.family
                    raise LoweringError(f"%{node.name} ({node.loc}): {family} cannot be drawn: {error}") from None
            case LogProb():
                stop = self._stops_score(node)
                self.env[node.name] = self.log_prob(node.dist, self.env[node.value], node.value, stop=stop)
            case Expected():
                self.env[node.name] = closed_form(self, node, self.params)
            case Opaque():
                self.env[node.name] = self._opaque(node)
            case Cost() | Depends():
                self.env[node.name] = self.env[node.value]
            case Bound():
                self.env[node.name] = self._bound(node)
            case Marginal():
                self.env[node.name] = self._marginal(node)
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

    def log_prob(self, ref: str, value: Batched, source: str, *, stop: bool = False) -> Batched:
        """``[*dims | *B]`` for the union of the parameters' and the value's dims; ``stop`` detaches the parameters."""
        template = self.dist_node(ref).template
        rank = len(template.batch_shape) + len(template.event_shape)
        dims = self.dims.union(self._param_dims(ref), value.dims)
        extra = [1] * max(value.ndim - rank, 0)
        params = [stop_gradient(param) for param in self.params[ref]] if stop else None
        if self._param_dims(ref):
            dist = self.distribution(ref, dims, extra, params)
        else:
            dist = self.distribution(ref, (), extra if not dims else (), params)
        outcome = self.dims.align(value, dims, max(rank, value.ndim) if value.dims else None)
        plain = self.before_transform.get(source)
        sums = type(dist).log_prob is TransformedDistribution.log_prob  # some know better: |x| has no inverse
        if plain is not None and sums and self._site(source).dist == ref:
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
        if site.sequence:
            return draw_in_sequence(self, site)
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
                self.expectation.weights[site.name] = place(drawn.weight)
            return place(drawn.value)
        if isinstance(site.estimator, (PathwiseEstimator, ScoreEstimator)):
            value = place(site.estimator.draw(dist, shape))
            return Batched(record_call(VARIABLE, value.tensor), dims) if self.is_variable(site) else value
        return place(dist.sample(shape).detach())

    def is_variable(self, site: Sample) -> bool:
        """Whether the draw is an independent variable: its estimator wants the costs differentiated where it is.

        Only where nothing but costs is below it: no draw, no output, no write into a buffer.
        """
        if not isinstance(site.estimator, RerunEstimator) or not site.estimator.at_draw:
            return False
        if self.order != 1 or self.rerunning or not self.learning or not self.learns(site):
            return False
        outputs = [ref for ref in _output_refs(self.graph) if ref != self.graph.objective]
        if site.name in self.graph.ancestors(outputs):
            return False
        below = [self.graph[name] for name in self.graph.descendants([site.name]) if name != site.name]
        return not any(isinstance(node, (Sample, Bound, Marginal)) or _has_effect(node) for node in below)

    def _joined_axes(self, site: Sample, new: int, carried: int) -> tuple[int, ...]:
        """Where the joined elements stand in a draw ``[*new | *sample_shape | *carried | *B]``."""
        own = len(site.sample_shape)
        return tuple(new + dim if dim < own else new + carried + dim for dim in self.joined[site.name])

    def _elements(self, site: str) -> int:
        """How many element dims a site has."""
        type_ = self.graph[site].tensor
        return type_.ndim - type_.event_ndim

    def _site(self, name: str) -> Sample:
        node = self.graph[name]
        assert isinstance(node, Sample)
        return node

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

        with compile_time():
            known = (support.dtype, support.shape, tuple(support.flatten().tolist()))
        key = (tuple(placed), joined, event, known, site.tensor.device, site.tensor.dtype)
        if key not in self._outcomes:
            self._outcomes[key] = record_constant(make)
        outcomes = self._outcomes[key]
        value = Batched(outcomes.expand([-1, *shape]), (site.name,))
        log_p = self._row_log_probs(site, value)  # [*dims, R | *elements]
        self._check(site, self.distribution(site.dist, self._param_dims(site.dist)))
        if isinstance(site.estimator, Enumerate) and site.estimator.bound is not None and not self._is_summed(site):
            log_p = self._renormalized(site, log_p)
        lead = len(log_p.dims)
        full = log_p.tensor.expand([*log_p.tensor.shape[:lead], *elements]) if log_p.shape != elements else log_p.tensor
        if joined:
            full = full.sum([lead + dim for dim in joined], keepdim=True)
        self.expectation.log_weights[site.name] = Batched(full, log_p.dims)
        self.expectation.weights[site.name] = Batched(full.exp(), log_p.dims)
        return value

    def _is_summed(self, site: Sample) -> bool:
        return any(site.name == inner.node for node in self.graph.of(Marginal) for inner in node.sites)

    def _renormalized(self, site: Sample, log_p: Batched) -> Batched:
        """Log probabilities given that no element is beyond its bound: ``[*dims, R | *elements]``, each on its own."""
        axis = log_p.dims.index(site.name)
        repeats = self._support_rows(site) / len(self._support(site))  # of each outcome among the rows
        total = log_p.tensor.logsumexp(axis, keepdim=True) - math.log(repeats)
        return Batched(log_p.tensor - total, log_p.dims)

    def _row_log_probs(self, site: Sample, value: Batched) -> Batched:
        """Log probabilities of the outcomes ``value``, ``[*dims, R | *B]``; all categories in order are a view."""
        template = self.dist_node(site.dist).template
        plain = template.cls in (Categorical, OneHotCategorical) and not site.sample_shape
        if not plain or self.joined[site.name]:
            return self.log_prob(site.dist, value, "")
        params = self._param_dims(site.dist)
        dist = self.distribution(site.dist, params)
        assert isinstance(dist, (Categorical, OneHotCategorical))
        logits: Tensor = dist.logits  # [*dims | *B, R]
        dims = self.dims.union(params, value.dims)
        return Batched(logits.movedim(-1, dims.index(site.name)), dims)

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

    def _bound(self, node: Bound) -> Batched:
        """The bound over the draws of the whole program; its value carries them no more."""
        value: Batched = self.env[node.value]
        if SAMPLES not in value.dims:
            return value
        axis = value.dims.index(SAMPLES)
        self.bounds[node.name] = value
        bound = multisample_bound(value.tensor, axis, node.alpha)
        if self.learning:
            bound = weigh_paths(self, node, bound, value, axis)
        return Batched(bound, tuple(name for name in value.dims if name != SAMPLES))

    def _marginal(self, node: Marginal) -> Batched:
        """The sites summed out in log space; the dims of all others stay."""
        plan = elimination_plan(self.graph, node, {site.node: self.dims.size(site.node) for site in node.sites})
        values = [self.env[factor.node] for factor in node.factors]
        weights = [self.expectation.log_weights[site.node] for site in node.sites]
        return log_marginal(self.dims, node, values, weights, plan.order, self.order)

    # -- credit ---------------------------------------------------------------------------------------------------
    def _terms(self, named: Callable[[str], Any]) -> Tensor | None:
        """Sum of all surrogate terms, None where no site needs one."""
        graph = self.graph
        sites = [s for s in graph.of(Sample) if isinstance(s.estimator, ScoreEstimator) and s.name in self.env]
        if not any(self.learns(site) for site in sites):
            return None
        self.signals = self.make_signals()
        parts: list[Weighted] = []
        for site in reversed(sites):  # last first: credit sets of earlier sites contain those of later ones
            if self.learns(site):
                with named(f"{site.name}_term"):
                    parts += self.score_term(site)
        return total_of(parts)

    def make_signals(self, *, follows: bool = False) -> Signals:
        """Learning signals of this run; ``follows`` keeps the gradient of what they are computed from."""
        return Signals(
            self.graph,
            self.dims,
            self.env,
            self.bounds,
            self.expectation,
            self.coefficients,
            fixed=self._coefficients.known,
            follows=follows,
        )

    @functools.cached_property
    def coefficients(self) -> Mapping[str, Coefficient]:
        """What each cost is multiplied by in the objective."""
        return self._coefficients(lambda ref: self._unmoved(ref).tensor, lambda made: record_constant(lambda: made))

    @functools.cached_property
    def direct(self) -> Influence:
        """How values depend on sites along paths that pass no other draw."""
        with compile_time():
            return influence(self.graph, [site.name for site in self.graph.of(Sample)], through_sites=False)

    def learns(self, site: Sample) -> bool:
        return any(param.tensor.requires_grad for param in self.params[site.dist])

    def score_term(self, site: Sample) -> list[Weighted]:
        """The site's surrogate as tensors whose sums, each times its factor, make it up."""
        value: Batched = self.env[site.name]
        dims = self.dims.union(self._param_dims(site.dist), value.dims)
        bounds = self._bound_terms(site, dims)
        context = self.context_of(site)
        if context is None:
            return bounds
        scale = context.scale
        assert isinstance(site.estimator, ScoreEstimator)
        term = site.estimator.term(context)
        rows = context.row_axis
        if rows is not None and term.dim() > rows and term.dim() >= len(dims):
            assert term.shape[rows] == 1, f"{site.estimator.name}: its term must be summed over its own rows"
            term, dims = term.squeeze(rows), tuple(name for name in dims if name != site.row_dim)
        added = [] if context.surrogate is None else [Weighted(context.surrogate, scale)]
        return [self._mean_of_term(term, site, dims, scale), *added, *bounds]

    def context_of(self, site: Sample) -> Context | None:
        """What the site's estimator sees, made once a run; None where no cost is credited to it."""
        if site.name not in self.contexts:
            dims = self.dims.union(self._param_dims(site.dist), self.env[site.name].dims)
            found = self.signals.of(site, dims)
            self.contexts[site.name] = None if found is None else Context(self, site, dims, *found)
        return self.contexts[site.name]

    def _mean_of_term(self, term: Tensor, site: Sample, dims: tuple[str, ...], scale: float) -> Weighted:
        """Sum over elements and a rerun's rows and draws, mean over i.i.d. dims, weighted sum over weighted ones."""
        left = [name for name in dims if name not in self.kept]
        if any(self.dims[name].kind not in ("iid", "coupled") for name in left):
            return Weighted(self.expectation(Batched(term, dims), site.name, self.kept, detach=True).tensor, scale)
        return Weighted(term, scale / math.prod(self.dims.sizes(left)))

    def _bound_terms(self, site: Sample, dims: tuple[str, ...]) -> list[Weighted]:
        """VIMCO: each draw's score times the bound less what it would be had the draw weighed as the others do."""
        parts = []
        for edge in self.signals.edges(site):
            bound = self.signals.bound_of(edge.cost)
            if bound is None:
                continue
            value = self.bounds[bound.name]
            axis = value.dims.index(SAMPLES)
            gain = leave_one_out_gain(value.tensor.detach(), axis, bound.alpha) * self.dims.size(SAMPLES)
            share = self.signals.share(edge, dims, 1.0, Batched(gain, value.dims))
            parts.append(self._mean_of_term(Context(self, site, dims, share).score_times(share), site, dims, 1.0))
        return parts

    # -- what leaves the program ----------------------------------------------------------------------------------
    def _guard(self, objective: Tensor) -> Tensor:
        """NaN where a distribution's parameter breaks its constraint: validation is off in the compiled step."""
        valid: Tensor | None = None
        for name, params in self.params.items():
            node = self.dist_node(name)
            for ref, constraint, param in zip(node.params, node.template.constraints, params, strict=True):
                if constraint is None or not self._needs_check(ref, constraint):
                    continue
                ok = _holds(constraint, param.tensor).all()
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


# -- pieces -----------------------------------------------------------------------------------------------------------
def outcome_rows(support: int, sizes: Sequence[int]) -> list[Any]:
    """Indices into the support for every joint outcome of ``prod(sizes)`` elements, ``[R, prod(sizes)]``.

    >>> outcome_rows(2, [2])
    [(0, 0), (0, 1), (1, 0), (1, 1)]
    """
    return list(itertools.product(range(support), repeat=math.prod(sizes)))


def _holds(constraint: Constraint, value: Tensor) -> Tensor:
    """``constraint.check(value)``, without the branch on numbers in that of a covariance."""
    if isinstance(constraint, type(constraints.positive_definite)):
        symmetric = torch.isclose(value, value.mT, atol=1e-6).all(-1).all(-1)
        return torch.logical_and(symmetric, torch.linalg.cholesky_ex(value).info == 0)
    ok: Tensor = constraint.check(value)
    return ok


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

"""Lowers a graph with estimators to one flat program: the semantics of every estimator, written once.

`Interpreter` computes on tensors with named leading sample dims, in ordinary torch code. Run on real tensors it is the
reference; run on fake ones under a `Recorder` it leaves the flat program that is trained with.

    S = objective + sum over sites of term_s - stop(term_s),   term_s = sum (Q_s - b_s) log p(z_s) over draws and elements

so that the value is the plain Monte Carlo estimate and the gradient is the estimator's.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, TransformedDistribution
from torch.distributions.constraints import Constraint

from scg.analysis.influence import Influence, Relation
from scg.analysis.support import finite_support
from scg.backends.batching import Batched, Batcher, SampleDim, SampleDims, Value, check_shape
from scg.backends.coefficients import Coefficient, CoefficientRule
from scg.backends.opaque_call import OpaqueCall
from scg.backends.recorder import compile_time, record_call, record_constant
from scg.errors import LoweringError
from scg.estimators.base import EnumeratingEstimator, PathwiseEstimator, ScoreEstimator, Signal
from scg.ir import (
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
from scg.estimators.rows import SAMPLES, joined_dims, own_dims

_ALWAYS_VALID = {
    "sigmoid": ("unit_interval",),
    "softmax": ("simplex", "unit_interval"),
    "exp": ("positive", "nonnegative", "greater_than"),
    "softplus": ("positive", "nonnegative", "greater_than"),
}
"""Operations whose results need no check against these constraints."""

_ONE_HOT_ENTRIES = 1 << 22
"""Most entries of the 0/1 matrix that sums a general credit relation; beyond, a difference array does it."""


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
        self.joined = {site.name: joined_dims(graph, found, site) for site in enumerated}
        self.supports = {site.name: finite_support(graph, self._dist_node(site.dist)) for site in enumerated}
        self.dims = SampleDims(self._sample_dims())
        self.batcher = Batcher(self.dims)
        self.env: dict[str, Any] = {}
        self.params: dict[str, list[Batched]] = {}
        """Parameters of the distributions, by node."""
        self.before_transform: dict[str, Batched] = {}
        """Draws of transformed distributions before their transforms, by site."""
        self.weights: dict[str, Batched] = {}
        """Probabilities of the rows of enumerated sites, ``[*dims, R | *elements]``, size 1 along joined dims."""
        self._coefficients = coefficients
        self._shares: dict[Any, Tensor] = {}
        self._detached: dict[str, Batched] = {}
        self._sums: dict[tuple[int, ...], dict[frozenset[tuple[str, int]], Tensor]] = {}
        """Sums of credited costs made so far, by shape and members."""

    def _sample_dims(self) -> Iterable[SampleDim]:
        if self.graph.samples > 1:
            yield SampleDim(SAMPLES, self.graph.samples, "iid", order=-1)
        for order, site in enumerate(self.graph.of(Sample)):
            if isinstance(site.estimator, EnumeratingEstimator):
                yield SampleDim(site.name, self._support_rows(site), "enumerated", site.name, order)
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
            if node.name in wanted and node.name not in graph.tail:
                with named(node.name):
                    self._evaluate(node)
        objective = self._objective(named)
        with named("loss"):
            total = self._terms(named) if self.learning else None
            if total is not None:
                objective = objective + (total - total.detach())
            objective = self._guard(objective)
        return self._outputs(objective, named)

    def _evaluate(self, node: Node) -> None:
        match node:
            case Input() | Param():
                self.env[node.name] = Batched(self.fetch(node))
            case Op():
                args, kwargs = map_refs(self.env.__getitem__, (tuple(node.args), dict(node.kwargs)))
                value = self.batcher.run(node, args, kwargs)
                check_shape(node, value, self.dims)
                self.env[node.name] = value
            case Dist():
                self.params[node.name] = [self.env[ref] for ref in node.params]
            case Sample():
                self.env[node.name] = self._draw(node)
            case LogProb():
                self.env[node.name] = self._log_prob(node.dist, self.env[node.value], node.value)
            case Opaque():
                self.env[node.name] = self._opaque(node)
            case Cost() | Depends():
                self.env[node.name] = self.env[node.value]
            case _:
                raise LoweringError(f"%{node.name}: no lowering for a {node.kind} node")

    # -- distributions --------------------------------------------------------------------------------------------
    def _dist_node(self, ref: str) -> Dist:
        node = self.graph[ref]
        assert isinstance(node, Dist)
        return node

    def distribution(
        self, ref: str, dims: Sequence[str], extra: Sequence[int] = (), params: list[Batched] | None = None
    ) -> Distribution:
        """The distribution with batch shape ``[*dims | *extra | *B]``; ``extra`` are dims the user put in front."""
        template = self._dist_node(ref).template
        params = self.params[ref] if params is None else params
        carried = [bool(param.dims) or bool(extra) for param in params]
        tensors = [
            param.tensor.reshape([*self._lead(param, dims), *[1] * len(extra), *param.shape]) if carries else param.tensor
            for param, carries in zip(params, carried, strict=True)
        ]
        return template.rebuild(tensors, prefix=(*self.dims.sizes(dims), *extra), carries=carried)

    def _lead(self, value: Batched, dims: Sequence[str]) -> list[int]:
        return [self.dims.size(name) if name in value.dims else 1 for name in dims]

    def _param_dims(self, ref: str) -> tuple[str, ...]:
        return self.dims.union(*(param.dims for param in self.params[ref]))

    def _log_prob(self, ref: str, value: Batched, source: str) -> Batched:
        """``[*dims | *B]`` for the union of the parameters' and the value's dims."""
        template = self._dist_node(ref).template
        rank = len(template.batch_shape) + len(template.event_shape)
        dims = self.dims.union(self._param_dims(ref), value.dims)
        extra = [1] * max(value.ndim - rank, 0)
        if self._param_dims(ref):
            dist = self.distribution(ref, dims, extra)
        else:
            dist = self.distribution(ref, (), extra if not dims else ())
        outcome = self.dims.align(value, dims, max(rank, value.ndim) if value.dims else None)
        plain = self.before_transform.get(source)
        if plain is not None and self._site(source).dist == ref:
            return Batched(_log_prob_before(dist, self.dims.align(plain, dims)), dims)
        return Batched(dist.log_prob(outcome), dims)

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
        new = tuple(name for name in dims if name not in carried)
        shape = torch.Size([*self.dims.sizes(new), *site.sample_shape])

        def place(drawn: Tensor) -> Batched:
            """From ``[*new | *sample_shape | *carried | …]`` to ``[*dims | *sample_shape | …]``."""
            have = [*new, *[""] * len(site.sample_shape), *carried]
            want = [*(have.index(name) for name in dims), *(len(new) + i for i in range(len(site.sample_shape)))]
            if want != sorted(want):
                drawn = drawn.permute([*want, *range(len(want), drawn.dim())])
            return Batched(drawn, dims)

        if isinstance(dist, TransformedDistribution) and not _transform_params(self._dist_node(site.dist)):
            pathwise = isinstance(site.estimator, PathwiseEstimator)
            before = dist.base_dist.rsample(shape) if pathwise else dist.base_dist.sample(shape).detach()
            self.before_transform[site.name] = place(before)
            after = before
            for transform in dist.transforms:
                after = transform(after)
            return place(after)
        if isinstance(site.estimator, (PathwiseEstimator, ScoreEstimator)):
            return place(site.estimator.draw(dist, shape))
        return place(dist.sample(shape).detach())

    def _support(self, site: Sample) -> Tensor:
        support = self.supports[site.name]
        assert support is not None
        return support

    def _support_rows(self, site: Sample) -> int:
        shape = site.tensor.shape
        return len(self._support(site)) ** math.prod(shape[dim] for dim in self.joined[site.name])

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
        template = self._dist_node(site.dist).template
        for name, constraint, param in zip(template.names, template.constraints, self.params[site.dist], strict=True):
            record_call(ParameterCheck(site.name, site.loc, template.family, name, constraint), param.tensor)

    def _opaque(self, node: Opaque) -> Value:
        values = [arg for arg in map_refs(self.env.__getitem__, tuple(node.args)) if isinstance(arg, Batched)]
        dims = self.dims.union(*(value.dims for value in values))
        if dims and not node.pure:
            raise LoweringError(
                f"%{node.name} ({node.loc}): {node.fn.__qualname__} is stateful (pure=False) and would be called once for "
                f"each of the sample dims {list(dims)}; use samples=1 and estimators that do not rerun it"
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
        """Mean over i.i.d. dims and probability-weighted sum over enumerated ones, last site first.

        Args:
            value: ``[*dims | *S]`` of the node ``of``, whose influence says which weights its elements meet.
            keep: sample dims that stay; weights given them are conditional ones.
            detach: stop the gradient of the weights.
        """
        while True:
            left = [name for name in value.dims if name not in keep]
            if not left:
                return value
            name = left[-1]
            if self.dims[name].kind == "iid":
                axis = value.dims.index(name)
                value = Batched(value.tensor.mean(axis), tuple(d for d in value.dims if d != name))
            else:
                value = self._sum_out(value, of, name, detach)

    def _sum_out(self, value: Batched, of: str, name: str, detach: bool) -> Batched:
        weight = self._weight_for(of, name, value.ndim)
        if detach:
            weight = Batched(weight.tensor.detach(), weight.dims)
        dims = self.dims.union(value.dims, weight.dims)
        v, w = self.dims.align(value, dims), self.dims.align(weight, dims)
        if _may_be_impossible(self._dist_node(self._site(name).dist)):  # 0 * inf
            v = torch.where(w > 0, v, 0.0)
        axis = dims.index(name)
        return Batched((w * v).sum(axis), tuple(d for d in dims if d != name))

    def _site(self, name: str) -> Sample:
        node = self.graph[name]
        assert isinstance(node, Sample)
        return node

    def _weight_for(self, of: str, name: str, ndim: int) -> Batched:
        """The rows' probabilities of enumerated site ``name``, laid out along the dims of the node ``of``."""
        weight = self.weights[name]
        lead = len(weight.dims)
        shape = weight.shape
        if all(size == 1 for size in shape):
            return Batched(weight.tensor.reshape([*weight.tensor.shape[:lead], *[1] * ndim]), weight.dims)
        relation = self.found.relation(of, name)
        if relation is None:  # the value does not depend on it: any element's weights sum to one
            first = weight.tensor[(..., *[slice(0, 1)] * len(shape))]
            return Batched(first.reshape([*first.shape[:lead], *[1] * ndim]), weight.dims)
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
        placed = [
            record_constant(functools.partial(_point_index, relation, dim)) if size > 1 else 0
            for dim, size in enumerate(shape)
        ]
        return Batched(weight.tensor[(*[slice(None)] * lead, *placed)], weight.dims)

    def _expected_cost(self, cost: str) -> Tensor:
        return self.expectation(self.env[cost], cost).tensor

    def _objective(self, named: Callable[[str], Any]) -> Tensor:
        """The linear tail applied to the expected costs."""
        graph = self.graph
        env: dict[str, Any] = {}

        def look(ref: Ref) -> Any:
            if ref in env:
                return env[ref]
            if isinstance(graph[ref], Cost):
                env[ref] = Batched(self._expected_cost(ref))
                return env[ref]
            return self.env[ref]

        for node in graph:
            if node.name in graph.tail:
                with named(node.name):
                    assert isinstance(node, Op)
                    args, kwargs = map_refs(look, (tuple(node.args), dict(node.kwargs)))
                    env[node.name] = self.batcher.run(node, args, kwargs)
        with named("objective"):
            value: Batched = look(graph.objective)
            return value.tensor

    # -- credit ---------------------------------------------------------------------------------------------------
    def _terms(self, named: Callable[[str], Any]) -> Tensor | None:
        """Sum of all surrogate terms, None where no site needs one."""
        graph = self.graph
        sites = [s for s in graph.of(Sample) if isinstance(s.estimator, ScoreEstimator) and s.name in self.env]
        if not any(self._learns(site) for site in sites):
            return None
        self.coefficients: Mapping[str, Coefficient] = self._coefficients(
            lambda ref: self.env[ref].tensor, lambda made: record_constant(lambda: made)
        )
        total: Tensor | None = None
        for site in reversed(sites):  # last first: credit sets of earlier sites contain those of later ones
            if not self._learns(site):
                continue
            with named(f"{site.name}_term"):
                term = self._score_term(site)
                if term is not None:
                    total = term if total is None else total + term
        return total

    def _learns(self, site: Sample) -> bool:
        return any(param.tensor.requires_grad for param in self.params[site.dist])

    def _score_term(self, site: Sample) -> Tensor | None:
        value: Batched = self.env[site.name]
        log_p = self._log_prob(site.dist, value, site.name)
        found = self.signal(site, log_p.dims)
        if found is None:
            return None
        cost, scale = found
        # a replayed outcome may carry no sample dim of its own, yet stand below sampled parameters
        own = [name for name in log_p.dims if self.dims[name].kind == "iid"]
        signal = Signal(
            cost=cost,
            iid=tuple(log_p.dims.index(name) for name in own),
            state=self._state(site),
            training=self.training and self.learning,
        )
        assert isinstance(site.estimator, ScoreEstimator)
        multiplier = site.estimator.multiplier(signal).detach()
        lead = len(log_p.dims)
        score = self.dims.align(log_p, log_p.dims)
        flat = [axis for axis in range(lead, score.dim()) if multiplier.shape[axis] == 1 and score.shape[axis] > 1]
        if flat:  # sum first: one product an element fewer
            score = score.sum(flat, keepdim=True)
        term = Batched(multiplier * score, log_p.dims)
        draws = math.prod(self.dims.size(name) for name in own)
        if len(own) < len(term.dims):
            term = self.expectation(term, site.name, detach=True)
            return term.tensor.sum() * scale
        return term.tensor.sum() * (scale / draws)

    def _state(self, site: Sample) -> nn.Module | None:
        return self.states.get(site.name)

    def signal(self, site: Sample, dims: tuple[str, ...]) -> tuple[Tensor, float] | None:
        """The credited cost-to-go ``[*dims | *elements]`` (size 1 where it does not vary) and a factor taken out of it."""
        edges = [edge for (name, _), edge in self.graph.credit.items() if name == site.name]
        edges = [edge for edge in edges if not self.coefficients[edge.cost].is_zero]
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

    def _make_credit(self, edge: CreditEdge, dims: tuple[str, ...], scale: float) -> Tensor:
        cost = self._detached_cost(edge.cost)
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
            self._detached[cost] = Batched(value.tensor.detach(), value.dims)
        return self._detached[cost]

    def _element_shape(self, site: str) -> tuple[int, ...]:
        type_ = self.graph[site].tensor
        return type_.shape[: len(type_.shape) - type_.event_ndim]

    # -- what leaves the program ----------------------------------------------------------------------------------
    def _guard(self, objective: Tensor) -> Tensor:
        """NaN where a distribution's parameter breaks its constraint: validation is off in the compiled step."""
        valid: Tensor | None = None
        for name, params in self.params.items():
            node = self._dist_node(name)
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
        single = _SingleDraw(self, named)
        return map_refs(lambda ref: objective if ref == graph.objective else single.value(ref), graph.outputs)


class _SingleDraw:
    """One joint ancestral draw: row 0 of the samples, enumerated sites drawn once more."""

    def __init__(self, interpreter: Interpreter, named: Callable[[str], Any]) -> None:
        self.of, self.named = interpreter, named
        self.env: dict[str, Any] = {}
        self.params: dict[str, list[Batched]] = {}

    def value(self, ref: str) -> Any:
        graph = self.of.graph
        wanted = graph.ancestors([ref])
        for node in graph:
            if node.name in wanted and node.name not in self.env and node.name not in self.params:
                with self.named(node.name):
                    self._evaluate(node)
        found = self.env[ref]
        return found.tensor if isinstance(found, Batched) else tuple(item.tensor for item in found)

    def _evaluate(self, node: Node) -> None:
        of = self.of
        known = of.env.get(node.name)
        if known is not None and not isinstance(node, Cost):
            row = self._row(known)
            if row is not None:
                self.env[node.name] = row
                return
        match node:
            case Op():
                args, kwargs = map_refs(self.env.__getitem__, (tuple(node.args), dict(node.kwargs)))
                self.env[node.name] = of.batcher.run(node, args, kwargs)
            case Dist():
                self.params[node.name] = [self.env[ref] for ref in node.params]
            case Sample():
                dist = of.distribution(node.dist, (), params=self.params[node.dist])
                self.env[node.name] = Batched(dist.sample(torch.Size(node.sample_shape)).detach())
            case LogProb():
                template = of._dist_node(node.dist).template
                value: Batched = self.env[node.value]
                extra = [1] * max(value.ndim - len(template.batch_shape) - len(template.event_shape), 0)
                dist = of.distribution(node.dist, (), extra, self.params[node.dist])
                self.env[node.name] = Batched(dist.log_prob(value.tensor))
            case Opaque():
                plain = map_refs(lambda ref: self.env[ref].tensor, tuple(node.args))
                out = record_call(OpaqueCall(node, (), tuple(False for _ in plain)), *plain)
                self.env[node.name] = Batched(out) if isinstance(out, Tensor) else tuple(Batched(o) for o in out)
            case Cost() | Depends():
                self.env[node.name] = self.env[node.value]

    def _row(self, value: Any) -> Any:
        """Row 0 of every i.i.d. dim; None where enumerated rows are among them."""
        if isinstance(value, tuple):
            rows = tuple(self._row(item) for item in value)
            return None if any(row is None for row in rows) else rows
        if not isinstance(value, Batched):
            return value
        if any(self.of.dims[name].kind != "iid" for name in value.dims):
            return None
        tensor = value.tensor
        for _ in value.dims:
            tensor = tensor.select(0, 0)
        return Batched(tensor)


# -- pieces -----------------------------------------------------------------------------------------------------------
def outcome_rows(support: int, sizes: Sequence[int]) -> list[Any]:
    """Indices into the support for every joint outcome of ``prod(sizes)`` elements, ``[R, prod(sizes)]``.

    >>> outcome_rows(2, [2])
    [(0, 0), (0, 1), (1, 0), (1, 1)]
    """
    return list(itertools.product(range(support), repeat=math.prod(sizes)))


def credit_sum(tensor: Tensor, lead: int, edge: CreditEdge, elements: tuple[int, ...]) -> Tensor:
    """Sums cost elements ``[*dims | *cost]`` into the site elements they teach, ``[*dims | *elements]``."""
    ndim = tensor.dim() - lead
    if edge.simple:
        kept = [axis for axis in edge.axes if axis is not None]
        over = [lead + axis for axis in range(ndim) if axis not in kept]
        if over:
            tensor = tensor.sum(over)
        rank = {axis: i for i, axis in enumerate(sorted(kept))}
        tensor = tensor.permute([*range(lead), *(lead + rank[axis] for axis in kept)]) if kept != sorted(kept) else tensor
        shape = [elements[dim] if axis is not None else 1 for dim, axis in enumerate(edge.axes)]
        return tensor.reshape([*tensor.shape[:lead], *shape])
    return _box_sum(tensor, lead, edge, elements)


def _box_sum(tensor: Tensor, lead: int, edge: CreditEdge, elements: tuple[int, ...]) -> Tensor:
    """General boxes: a 0/1 matrix over the dims that are not tied, shared by the tied ones where it may be."""
    shape = tuple(tensor.shape[lead:])
    sizes = elements or (1,)
    with compile_time():
        los = [lo.expand(shape) for lo in edge.lo]
        his = [hi.expand(shape) for hi in edge.hi]
        tied = _shared_ties(edge, los, his)
        rest_cost = [axis for axis in range(len(shape)) if axis not in tied.values()]
        rest_site = [dim for dim in range(len(sizes)) if dim not in tied]
        pick = tuple(slice(None) if axis in rest_cost else 0 for axis in range(len(shape)))
        lo = [los[dim][pick].reshape(-1) for dim in rest_site]  # each [C]
        hi = [his[dim][pick].reshape(-1) for dim in rest_site]
    site_sizes = [sizes[dim] for dim in rest_site]
    order = [*range(lead), *(lead + tied[dim] for dim in sorted(tied)), *(lead + axis for axis in rest_cost)]
    flat = tensor.permute(order)
    kept = list(flat.shape[: lead + len(tied)])
    flat = flat.reshape([*kept, -1])  # [*dims, *tied, C]
    if lo[0].numel() * math.prod(site_sizes) <= _ONE_HOT_ENTRIES:
        like = {"dtype": tensor.dtype, "device": tensor.device}
        matrix = record_constant(lambda: _box_matrix(lo, hi, site_sizes).to(**like))
        summed = flat @ matrix  # [*dims, *tied, prod(site_sizes)]
    else:
        summed = _difference_sum(flat, lo, hi, site_sizes)
    summed = summed.reshape([*kept, *site_sizes])
    place = [*sorted(tied), *rest_site]
    back = [place.index(dim) for dim in range(len(place))]
    return summed.permute([*range(lead), *(lead + i for i in back)]).reshape([*summed.shape[:lead], *elements])


def _shared_ties(edge: CreditEdge, los: list[Tensor], his: list[Tensor]) -> dict[int, int]:
    """Tied site dims whose cost dim moves no other bound: they need no part in the matrix."""
    tied: dict[int, int] = {}
    for dim, axis in enumerate(edge.axes):
        if axis is None or axis in tied.values():
            continue
        others = [b for i, pair in enumerate(zip(los, his, strict=True)) if i != dim for b in pair]
        if all(bool((b == b.narrow(axis, 0, 1)).all()) for b in others):
            tied[dim] = axis
    if len(tied) == len(los):  # nothing would be left to say which elements are empty
        tied.popitem()
    return tied


def _box_matrix(lo: list[Tensor], hi: list[Tensor], sizes: list[int]) -> Tensor:
    """1 where cost element c sees site element i.  ``[C, prod(sizes)]``"""
    matrix = torch.ones(len(lo[0]), 1, dtype=torch.bool)
    for low, high, size in zip(lo, hi, sizes, strict=True):
        index = torch.arange(size)
        inside = (low[:, None] <= index) & (index <= high[:, None])  # [C, size]
        matrix = (matrix[:, :, None] & inside[:, None, :]).reshape(len(low), -1)
    return matrix


def _difference_sum(flat: Tensor, lo: list[Tensor], hi: list[Tensor], sizes: list[int]) -> Tensor:
    """Box sums by a difference array: add at each box's corners, then running sums along every dim."""
    padded = [size + 1 for size in sizes]

    def corner_of(ends: tuple[bool, ...]) -> tuple[Tensor, Tensor]:
        empty = torch.stack([low > high for low, high in zip(lo, hi, strict=True)]).any(0)
        index = torch.zeros_like(lo[0])
        for end, low, high, size in zip(ends, lo, hi, padded, strict=True):
            index = index * size + torch.where(empty, 0, high + 1 if end else low)
        sign = torch.where(empty, 0.0, -1.0 if sum(ends) % 2 else 1.0)
        return index.to(flat.device), sign.to(device=flat.device, dtype=flat.dtype)

    total = flat.new_zeros([*flat.shape[:-1], math.prod(padded)])
    for ends in itertools.product((False, True), repeat=len(sizes)):
        with compile_time():
            corner, signs = corner_of(ends)
        index, sign = record_constant(functools.partial(_same, corner)), record_constant(functools.partial(_same, signs))
        total = total.index_add(-1, index, flat * sign)
    total = total.reshape([*flat.shape[:-1], *padded])
    for axis in range(len(sizes)):
        total = total.cumsum(axis - len(sizes))
    return total[(..., *(slice(0, size) for size in sizes))].flatten(-len(sizes))


def _same(tensor: Tensor) -> Tensor:
    return tensor


class ParameterCheck:
    """With ``debug=True``: a leaf that raises at run time and names the site."""

    effect = True

    def __init__(self, site: str, loc: str, family: str, param: str, constraint: Constraint | None) -> None:
        self.site, self.loc, self.family, self.param, self.constraint = site, loc, family, param, constraint
        self.__name__ = self.__qualname__ = f"check_{site}"
        self.__module__ = __name__

    def fake(self, value: Tensor) -> Tensor:
        return value.detach()

    def __call__(self, value: Tensor) -> Tensor:
        ok = torch.isfinite(value) if value.is_floating_point() else torch.ones_like(value, dtype=torch.bool)
        if self.constraint is not None and bool(ok.all()):
            ok = self.constraint.check(value)
        if not bool(ok.all()):
            bad = value.detach().flatten()[:4].tolist()
            raise ValueError(
                f"site {self.site!r} ({self.loc}): parameter {self.param} of {self.family}, of shape "
                f"{list(value.shape)}, is not {self.constraint or 'finite'} everywhere; it begins {bad}"
            )
        return value.detach()


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


def _transform_params(node: Dist) -> bool:
    return any("transform" in name for name in node.template.names)


def _point_index(relation: Relation, dim: int) -> Tensor:
    """The one site index each element sees along ``dim``; any, where it sees none."""
    lo, hi = relation.lo[dim], relation.hi[dim]
    return torch.where(lo <= hi, lo, torch.zeros_like(lo)).contiguous()


def _may_be_impossible(node: Dist) -> bool:
    return node.template.cls.__name__ != "Bernoulli"


def _has_effect(node: Node) -> bool:
    if isinstance(node, Opaque):
        return not node.pure
    return isinstance(node, Op) and is_impure(node)


def _output_refs(graph: Graph) -> list[Ref]:
    found: list[Ref] = []
    map_refs(lambda ref: found.append(ref), graph.outputs)
    return found

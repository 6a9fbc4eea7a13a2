"""Estimator insertion: every site gets the object that will estimate its gradient, and the reason.

    before   %z = sample f32[B, D | ]      %d credits=nll
    after    %z = sample f32[K | B, D | ]  %d estimator=score_function credits=nll

``auto`` takes reparam where the whole path to every credited cost is differentiable and continuous, else exact
enumeration where the support is small enough to pay, else the score function with the best baseline available.
"""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from scg.analysis.bounds import doubly_break
from scg.analysis.factors import elimination_plan
from scg.analysis.flops import bytes_text
from scg.analysis.influence import Influence, influence
from scg.analysis.reach import Reach
from scg.analysis.smoothness import Smoothness, smoothness
from scg.analysis.support import finite_support, moving_bound, wrong_density
from scg.errors import EstimatorError
from scg.estimators import ESTIMATORS, Estimator, get_estimator
from scg.estimators.base import EnumeratingEstimator, PathwiseEstimator, SiteInfo
from scg.estimators.enumerate_ import Enumerate
from scg.estimators.rows import SAMPLES, Meeting, enumeration_rows, joined_dims, meeting, own_dims, rerun_breaks
from scg.estimators.score_function import ScoreFunction
from scg.ir import Bound, Cost, Depends, Dist, Graph, Input, LogProb, Marginal, Node, Op, Param, Sample, TensorType
from scg.operations import is_linear, is_random, lookup
from scg.passes.sequences import check_sequences, join_sequences

ENUMERATE_LIMIT = 32
"""Most rows at which ``auto`` evaluates any node: beyond, draws are cheaper."""

ENUMERATE_BYTES = 2**30
"""Most bytes by which ``auto`` lets the values of one evaluation grow."""

TABLE_LIMIT = 2**16
"""Most entries an element of a table of joint probabilities, which meets no operation of the model."""


@dataclass(frozen=True)
class InsertEstimators:
    """The pass with its options; its fields are those of `scg.compile`."""

    default: Any = "auto"
    overrides: Mapping[str, Any] = field(default_factory=dict)
    """Glob over site names to estimator; the first match wins."""
    samples: int = 1
    order: int = 1
    allow_biased: bool | None = None
    """False makes a biased choice an error."""
    enumerate_limit: int = ENUMERATE_LIMIT
    """Most rows at which ``auto`` evaluates any node to enumerate a site."""

    def __call__(self, graph: Graph) -> Graph:
        """Fills ``estimator``, ``reason`` and the sample dims of every type.

        Raises:
            EstimatorError: for an estimator that does not fit, or a glob that matches no site.
        """
        names = [site.name for site in graph.of(Sample)]
        for glob in self.overrides:
            if not any(fnmatch.fnmatchcase(name, glob) for name in names):
                raise EstimatorError(f"estimators={{{glob!r}: …}} matches no site; sites: {', '.join(names) or 'none'}")
        if self.samples > 1:
            graph = _with_shared_noise(graph)
        choice = _Choice(self, graph)
        decided = [choice.decide(site) for site in graph.of(Sample)]
        choice.check_marginals()
        decided = join_sequences(decided)
        found = annotate_dims(graph.replace(*decided, samples=self.samples))
        check_sequences(found, choice.found)
        return found

    def sampled(self, site: Sample) -> str | None:
        """Why the site's own log density must stay sampled, as the estimator asked for has it."""
        estimator = get_estimator(self.request(site)[0])
        if isinstance(estimator, PathwiseEstimator) and estimator.stops_score:
            return f"{estimator.name} differentiates its sampled log density in a way of its own"
        return None

    def request(self, site: Sample) -> tuple[Any, str]:
        """The estimator that was asked for at a site, and where."""
        for glob, spec in self.overrides.items():
            if fnmatch.fnmatchcase(site.name, glob):
                return spec, f"estimators[{glob!r}]"
        if site.requested is not None:
            return site.requested, "scg.sample(estimator=…)"
        return self.default, "default"

    def wants_one_hot(self, site: Sample) -> bool:
        """Whether the estimator asked for needs an index to be written as its one-hot."""
        estimator = get_estimator(self.request(site)[0])
        return estimator is not None and estimator.one_hot

    def candidates(self, graph: Graph) -> dict[str, SiteInfo]:
        """What is known of each site that needs an estimator: one with something to learn and a cost to learn from."""
        choice = _Choice(self, graph)
        credited = {site for site, _ in graph.credit}
        credited -= choice.summed.keys()
        sites = [site for site in graph.of(Sample) if site.name in credited and not site.data and choice.learns(site)]
        return {site.name: choice.info(site) for site in sites}


def _with_shared_noise(graph: Graph) -> Graph:
    """Notes noise that is no draw, which has one value for all samples.

    Raises:
        EstimatorError: it is above a bound, which would join draws that are not independent.
    """
    noise = {node.name: node for node in graph if isinstance(node, Op) and is_random(node) and _reads_nothing(node)}
    for bound in graph.of(Bound):
        for name in sorted(noise.keys() & graph.ancestors([bound.value])):
            raise EstimatorError(
                f"%{name} ({noise[name].loc}): the draws that %{bound.name} ({bound.loc}) joins would share this "
                "noise.\n  Make it a draw, as in Normal(0.0, 1.0).expand(shape).rsample(), or to share it, give it to "
                "the model as an argument."
            )
    notes = [
        f"%{name} ({noise[name].loc}) is noise and no draw: it is the same for all samples"
        for name in noise.keys() & graph.ancestors([graph.objective])
    ]
    return dataclasses.replace(graph, notes=(*graph.notes, *sorted(notes)))


def _reads_nothing(node: Op) -> bool:
    operation = lookup(node.target)
    return operation is not None and operation.kind == "nothing"


class _Choice:
    """One run over the sites in program order."""

    def __init__(self, options: InsertEstimators, graph: Graph) -> None:
        self.options, self.graph = options, graph
        self.found: Influence = influence(graph)
        self.smooth: Smoothness = smoothness(graph)
        self._costs_of: dict[str, list[str]] = {}
        for name, cost in graph.credit:
            self._costs_of.setdefault(name, []).append(cost)
        self.reach = Reach(graph, [site.name for site in graph.of(Sample)])
        self.joined = joined_dims(graph, self.found)
        self.rerun_breaks = rerun_breaks(graph)
        self.log_probs: dict[tuple[str, str], list[str]] = {}
        """Log densities by distribution and value."""
        for node in graph.of(LogProb):
            self.log_probs.setdefault((node.dist, node.value), []).append(node.name)
        self._infos: dict[str, SiteInfo] = {}
        self.summed = {str(site.node): node for node in graph.of(Marginal) for site in node.sites}
        """Sites inside of a marginal likelihood, and which."""
        self._made: dict[str, Estimator | None] = {}
        """Estimators asked for by name, by glob."""
        self.rows: dict[str, int] = {}
        """Of each site enumerated so far."""

    def decide(self, site: Sample) -> Sample:
        options = self.options
        requested, source = options.request(site)
        if site.data:
            return self._set(site, None, "drawn under no_grad: data")
        if site.name in self.summed:
            return self._sum_out(site, requested, source)
        learns = self.learns(site)
        credited = self._credited(site)
        if not credited and site.value is not None:
            raise EstimatorError(
                f"%{site.name} ({site.loc}) is replayed, but no cost is credited to it: declare the influence with "
                f"scg.depends(reward, on={site.name}, dims=(…))"
            )
        explicit = self._object(requested, source)
        info = self.info(site)
        if explicit is not None and (source != "default" or learns or isinstance(explicit, EnumeratingEstimator)):
            if not credited and source == "default":
                return self._set(site, None, "influences no cost")
            fits = explicit.check(info)
            if not fits:
                raise self._misfit(site, explicit, fits.reason, info)
            self._check_bias(site, explicit, info)
            if info.multisample and not explicit.bounds:
                raise self._misfit(site, explicit, "it does not know multi-sample bounds", info)
            if explicit.orders < options.order:
                raise self._misfit(site, explicit, "its second derivative is not right, and order=2 was given", info)
            self._check_draws(site, explicit)
            self._check_reads(site, explicit, info)
            self._check_meeting(site, explicit, info)
            return self._set(site, explicit, f"asked for by {source}", info)
        if not credited:
            return self._set(site, None, "influences no cost")
        if not learns:
            return self._set(site, None, "no parameter to learn: exogenous noise")
        return self._auto(site, info)

    def _object(self, requested: Any, source: str) -> Estimator | None:
        """The estimator that was asked for: one object a glob, which sites of a sequence share."""
        if not isinstance(requested, str) or source.startswith("scg.sample"):
            return get_estimator(requested)
        if source not in self._made:
            self._made[source] = get_estimator(requested)
        return self._made[source]

    def _sum_out(self, site: Sample, requested: Any, source: str) -> Sample:
        """A site inside of a marginal likelihood: a logarithm of draws would be another objective."""
        where = f"logmarginal ({self.summed[site.name].loc})"
        explicit, info = get_estimator(requested), self.info(site)
        if explicit is not None and not isinstance(explicit, EnumeratingEstimator) and source != "default":
            raise self._misfit(site, explicit, f"{where} sums over it", info)
        estimator = explicit if isinstance(explicit, EnumeratingEstimator) else ESTIMATORS["enumerate"]()
        fits = estimator.check(info)
        if not fits:
            raise EstimatorError(
                f"%{site.name} (sample {info.family}, {site.loc}) cannot be summed over by {where}: {fits.reason}.\n"
                f"  Name the sites to sum over with over=…, or use scg.multisample with draws."
            )
        self._check_bias(site, estimator, info)
        return self._set(site, estimator, f"summed out in {where}")

    def check_marginals(self) -> None:
        """Refuses a marginal likelihood whose sites cannot be summed out within the limit on rows."""
        limit = ESTIMATORS["enumerate"]().limit  # type: ignore[attr-defined]
        for node in self.graph.of(Marginal):
            plan = elimination_plan(self.graph, node, {site.node: self.rows[site.node] for site in node.sites})
            if plan.table > limit:
                raise EstimatorError(
                    f"logmarginal ({node.loc}) would need a table of {plan.table:,} rows, over {limit:,}: "
                    f"{plan.width + 1} of its {len(plan.order)} sites meet at once, however they are ordered.\n"
                    f"  Write the likelihood as a sum of terms that see fewer of them, or use scg.multisample."
                )

    def _auto(self, site: Sample, info: SiteInfo) -> Sample:
        reparam, enumerate_, score = ESTIMATORS["reparam"](), ESTIMATORS["enumerate"](), ScoreFunction()
        smooth = reparam.check(info)
        if smooth:
            return self._set(site, reparam, "the path to every credited cost is differentiable and continuous", info)
        against = self._against_enumeration(site, info)
        if against is None:
            return self._set(site, enumerate_, f"finite support: {info.rows} rows, exact")
        fits = score.check(info)
        if not fits:
            raise self._misfit(site, score, fits.reason, info)
        why = f"not reparam: {smooth.reason}"
        if info.rows is not None and not site.value:
            why += f"; not enumerate: {against}"
        return self._set(site, score, why, info)

    def _set(self, site: Sample, estimator: Estimator | None, reason: str, info: SiteInfo | None = None) -> Sample:
        if isinstance(estimator, EnumeratingEstimator):
            self.rows[site.name] = self.info(site).rows or 1
        evaluations = estimator.evaluations(info) if estimator is not None and info is not None else 0
        return dataclasses.replace(site, estimator=estimator, reason=reason, evaluations=evaluations)

    def _against_enumeration(self, site: Sample, info: SiteInfo) -> str | None:
        """Why ``auto`` does not enumerate ``site`` beside the sites enumerated so far; None where it does."""
        fits, limit = ESTIMATORS["enumerate"]().check(info), self.options.enumerate_limit
        if not fits:
            return fits.reason
        assert info.rows is not None
        if info.rows > limit:
            return f"{info.rows:.3g} rows is over {limit}"
        if self._affordable(self._together):
            return None
        met = meeting(self.graph, {**self.rows, site.name: info.rows})
        if self._affordable(met):
            return None
        if met.rows > limit:
            return f"{met.rows:.3g} rows would meet at %{met.node}, over {limit}"
        if met.table > TABLE_LIMIT:
            return f"a table of {met.table:.3g} joint probabilities would be needed, over {TABLE_LIMIT}"
        return f"{bytes_text(met.bytes)} of values would be held, over {bytes_text(ENUMERATE_BYTES)} beyond one draw's"

    def _affordable(self, met: Meeting) -> bool:
        """Whether ``auto`` may enumerate so.

        With at most ``enumerate_limit`` rows at any value, a step has at most so many times the work of one draw.
        """
        fits = met.rows <= self.options.enumerate_limit and met.table <= TABLE_LIMIT
        return fits and met.bytes - self._one_draw.bytes <= ENUMERATE_BYTES

    @cached_property
    def _one_draw(self) -> Meeting:
        return meeting(self.graph, {})

    @cached_property
    def _together(self) -> Meeting:
        """All sites enumerated that may be, of a long chain: if that fits, none needs to be looked at by itself."""
        rows = {}
        for site in self.graph.of(Sample):
            if site.data:
                continue
            if site.name in self.summed or self._may_be_enumerated(site):
                rows[site.name] = self.info(site).rows or 1
        return meeting(self.graph, rows)

    def _may_be_enumerated(self, site: Sample) -> bool:
        requested, source = self.options.request(site)
        explicit = self._object(requested, source)
        if explicit is not None and (source != "default" or self._credited(site)):
            return isinstance(explicit, EnumeratingEstimator) and self.info(site).rows is not None
        if not self._credited(site) or not self.learns(site):
            return False
        info = self.info(site)
        few = info.rows is not None and info.rows <= self.options.enumerate_limit
        return few and bool(ESTIMATORS["enumerate"]().check(info)) and not ESTIMATORS["reparam"]().check(info)

    def _check_bias(self, site: Sample, estimator: Estimator, info: SiteInfo) -> None:
        if not estimator.unbiased and self.options.allow_biased is False:
            raise EstimatorError(
                f"%{site.name} ({site.loc}): {estimator.name!r} is biased and allow_biased=False was given; "
                f"unbiased and fitting: {', '.join(self._fitting(info, unbiased=True))}"
            )

    def _check_draws(self, site: Sample, estimator: Estimator) -> None:
        if not isinstance(estimator, ScoreFunction):
            return
        draws = (1 if site.value is not None else self.options.samples) * (estimator.samples or 1)
        if draws < estimator.resolve(draws).draws:
            raise EstimatorError(
                f"%{site.name} ({site.loc}): the {estimator.resolve(draws).name} baseline needs two or more draws; "
                f"give samples=2 to scg.compile or to the estimator, or use baseline='moving_average'"
            )

    def _check_meeting(self, site: Sample, estimator: Estimator, info: SiteInfo) -> None:
        if not isinstance(estimator, Enumerate) or info.rows is None:
            return
        if max(self._together.rows, self._together.table) <= estimator.limit:
            return
        met = meeting(self.graph, {**self.rows, site.name: info.rows})
        if max(met.rows, met.table) <= estimator.limit:
            return
        table = f"a table of {met.table:.3g} joint probabilities would be needed"
        what = f"{met.rows:.3g} rows would meet at %{met.node}" if met.rows > estimator.limit else table
        reason = f"with the sites enumerated above it, {what}, over {estimator.limit}"
        raise self._misfit(site, estimator, reason, info)

    def _check_reads(self, site: Sample, estimator: Estimator, info: SiteInfo) -> None:
        """A baseline must not see a consequence of its site."""
        names = estimator.reads()
        by_path = {node.path: node for node in self.graph.of(Input)}
        elements = info.element_shape
        for name, each in estimator.logged.items():
            node = by_path.get(name) or self.graph.nodes.get(name)
            if node is None:
                raise EstimatorError(
                    f"%{site.name} ({site.loc}): {estimator.name} reads {name!r}, which is no input that the model "
                    f"reads; inputs: {', '.join(sorted(by_path)) or 'none'}"
                )
            shape = node.tensor.shape
            if shape != (elements if each else elements[: len(shape)]):
                raise EstimatorError(
                    f"%{site.name} ({site.loc}): {estimator.name} reads {name!r} of shape {list(shape)}, but the site "
                    f"has elements {list(elements)}: give a number for each of them"
                    f"{'' if each else ', or for each index of leading dims'}"
                )
        if isinstance(names, str):
            return  # its sufficient context, found by the same rules
        inputs = {node.path: node.name for node in self.graph.of(Input)}
        wanted = list(inputs.values()) if names is None else [inputs.get(name, name) for name in names]
        above = self.graph.ancestors([site.dist])
        for name in wanted:
            if name not in self.graph.nodes:
                raise EstimatorError(
                    f"%{site.name} ({site.loc}): its baseline reads {name!r}, which is no value of the graph"
                )
            if site.value is not None and name not in above:
                raise EstimatorError(
                    f"%{site.name} ({site.loc}) is replayed: its baseline may read what its parameters are computed "
                    f"from, but %{name} is not, and may be a consequence of the outcome; name the inputs it may read "
                    f"with Learned(module, inputs=(…))"
                )
            if site.value is not None and self.graph.ancestors([name]) & self._outcome(site):
                raise EstimatorError(
                    f"%{site.name} ({site.loc}) is replayed: its baseline reads %{name}, which holds the outcome or is "
                    f"computed from what does; give what a baseline may know as an input of its own"
                )
            if self.found.sites(name) and site.name in self.found.sites(name):
                raise EstimatorError(
                    f"%{site.name} ({site.loc}): its baseline reads %{name}, which depends on the draw "
                    f"({' -> '.join(self._path(site.name, name))})"
                )

    def _outcome(self, site: Sample) -> set[str]:
        """The inputs that the outcome of a replayed site is read from."""
        assert site.value is not None
        return {name for name in self.graph.ancestors([site.value]) if isinstance(self.graph[name], Input)}

    def _path(self, source: str, target: str) -> list[str]:
        import networkx

        return [f"%{name}" for name in networkx.shortest_path(self.graph.to_networkx(), source, target)]

    def learns(self, site: Sample) -> bool:
        """Does any tensor upstream of the site's parameters ask for a gradient?"""
        return site.dist in self._learned

    @cached_property
    def _learned(self) -> set[str]:
        """Nodes computed from a tensor that asks for a gradient."""
        return self.graph.descendants(node.name for node in self.graph.of(Param, Input) if node.requires_grad)

    def _fitting(self, info: SiteInfo, *, unbiased: bool = False) -> list[str]:
        names = []
        for name, cls in ESTIMATORS.items():
            if cls.orders >= self.options.order and cls().check(info) and (cls.unbiased or not unbiased):
                names.append(name if cls.unbiased else f"{name} (biased)")
        return names

    def _misfit(self, site: Sample, estimator: Estimator, reason: str, info: SiteInfo) -> EstimatorError:
        return EstimatorError(
            f"%{site.name} (sample {info.family}, {site.loc}) cannot use {estimator.name!r}: {reason}.\n"
            f"  Use one of: {', '.join(self._fitting(info)) or 'none fits'}."
        )

    # -- facts ----------------------------------------------------------------------------------------------------
    def info(self, site: Sample) -> SiteInfo:
        """What the estimators may know of ``site``."""
        if site.name not in self._infos:
            self._infos[site.name] = self._info(site)
        return self._infos[site.name]

    def _info(self, site: Sample) -> SiteInfo:
        dist = self.graph[site.dist]
        assert isinstance(dist, Dist)
        requested = self._object(*self.options.request(site))
        support = finite_support(self.graph, dist, getattr(requested, "bound", None))
        joined = self.joined[site.name]
        return SiteInfo(
            name=site.name,
            template=dist.template,
            shape=site.tensor.shape,
            event_ndim=site.tensor.event_ndim,
            support=support,
            order=self.options.order,
            multisample=self._joins(site),
            rows=None if support is None else enumeration_rows(site, len(support), joined),
            replayed=site.value is not None or self._declared(site),
            bound=moving_bound(self.graph, dist),
            pathwise_break=self._break(site),
            score_break=self._score_break(site),
            pathwise_only=self._pathwise_only(site),
            joined=joined,
            doubly_break=doubly_break(self.graph, self.found, self.smooth, site, self._credited(site)),
            rerun_break=self.rerun_breaks.get(site.name),
            index_use=site.index_use or None,
            links=self._links(site),
            shares_costs=any(self.found.sites(cost) - {site.name} for cost in self._credited(site)),
        )

    def _links(self, site: Sample) -> tuple[frozenset[str], ...]:
        edges = [self.graph.credit[site.name, cost] for cost in self._credited(site)]
        sizes = site.tensor.shape[: site.tensor.ndim - site.tensor.event_ndim]
        return tuple(frozenset(edge.words[dim] for edge in edges if size > 1) for dim, size in enumerate(sizes))

    def _joins(self, site: Sample) -> bool:
        """Does a multi-sample bound over several draws stand between the site and a cost?"""
        bounds = {node.name for node in self.graph.of(Bound)}
        if self.options.samples < 2 or not bounds:
            return False
        bounds = {name for name in bounds if site.name in self.found.sites(name)}
        joined = False
        for cost in self._credited(site):
            node = self.graph[cost]
            assert isinstance(node, Cost)
            above = bounds & self.graph.ancestors([cost])
            if above and node.value not in above:
                raise EstimatorError(
                    f"%{node.value} ({node.loc}): a multi-sample bound must reach the objective through linear "
                    "operations"
                )
            joined |= bool(above)
        return joined

    def _credited(self, site: Sample) -> list[str]:
        return self._costs_of.get(site.name, [])

    def _declared(self, site: Sample) -> bool:
        return any(node.on == site.name for node in self.graph.of(Depends))

    def _break(self, site: Sample) -> str | None:
        costs = self._credited(site)
        above = self.reach.above(costs)
        ends = [(self.graph[cost].label, cost) for cost in costs]  # type: ignore[attr-defined]
        ends += [(f"%{inner.name}", inner.dist) for inner in self.graph.of(Sample) if inner.name in above]
        for label, end in ends:
            if found := self.smooth.break_between(site.name, end):
                return f"its path to {label} is broken at {found.loc or '%' + found.node}: {found.why}"
        return None

    def _score_break(self, site: Sample) -> str | None:
        """Where the site's own log density leaves the sums that lead to the credited costs, if anywhere."""
        found = set(self.log_probs.get((site.dist, site.name), ()))
        if not found:
            return None
        above = self.graph.ancestors(self._credited(site))
        for node in self.graph:
            if node.name not in above or not found.intersection(node.inputs) or isinstance(node, Cost):
                continue
            moving = [ref for ref in node.inputs if self.found.relation(ref, site.name) is not None]
            if not isinstance(node, Op) or not is_linear(node, moving):
                return f"{node.loc or '%' + node.name}"
            found.add(node.name)
        return None

    def _pathwise_only(self, site: Sample) -> str | None:
        if wrong := wrong_density(self.graph, site):
            return wrong
        if site.method == "sample":
            return None
        for cost in self._credited(site):
            if self.smooth.live(site.name, cost) and self.smooth.stopped(site.name, cost):
                label = self.graph[cost].label  # type: ignore[attr-defined]
                return f"it was drawn by rsample and reaches {label} both with and without a stop-gradient"
        return None


def annotate_dims(graph: Graph) -> Graph:
    """Writes the sample dims that each value will carry into its type."""
    dims: dict[str, tuple[str, ...]] = {}
    order: dict[str, int] = {SAMPLES: -1}
    changed: list[Node] = []
    for index, node in enumerate(graph):
        own: tuple[str, ...] = ()
        if isinstance(node, Sample):
            order[node.name] = index
            own = own_dims(node, graph.samples)
        inherited = {dim for ref in node.inputs for dim in dims[ref]}
        if isinstance(node, Marginal):
            inherited |= {dim for site in node.sites for dim in dims[graph[site.node].inputs[0]]}
            inherited -= {str(site.node) for site in node.sites}
        if isinstance(node, Sample) and node.sequence not in ("", node.name):
            inherited |= {*dims[node.sequence]}
        if isinstance(node, Sample) and isinstance(node.estimator, EnumeratingEstimator):
            inherited = set()  # the parameters' dims are those of its probabilities
        found = tuple(sorted(inherited | set(own), key=lambda dim: order[dim]))
        dims[node.name] = () if node.name in graph.tail else found
        if isinstance(node.type, TensorType) and node.type.sample != dims[node.name]:
            changed.append(dataclasses.replace(node, type=dataclasses.replace(node.type, sample=dims[node.name])))
    return graph.replace(*changed)

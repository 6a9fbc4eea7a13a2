"""A drawn index is written as its one-hot, for the estimators that need a draw to move continuously.

    before   %d = dist            Categorical(logits=%l)
             %z = sample i64[B]   %d
             %e = op f32[B, E]    embedding(%w, %z)
    after    %d_one_hot = dist              OneHotCategorical(logits=%l)
             %z = sample f32[B | C]         %d_one_hot  (index)
             %z_index = op i64[B]           argmax(%z, -1)        # for whatever is no cost
             %e_matmul = op f32[B, E]       matmul(%z, %w)

The same draws, the same value; `Graph.sites` goes on calling it the Categorical that the user wrote.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch.distributions import Categorical, OneHotCategorical

from scg.ir import Depends, Dist, Graph, LogProb, Node, Op, Ref, Sample, TensorType
from scg.operations import packet_name
from scg.passes.clean import eliminate_dead_code
from scg.passes.index_uses import NoOneHotForm, Use, look_up, view
from scg.passes.rewriter import Rewriter
from scg.template import Template, flatten

aten = torch.ops.aten


def index_to_one_hot(graph: Graph, wanted: Callable[[Sample], bool]) -> Graph:
    """Rewrites the wanted `Categorical` sites all of whose uses towards the objective have a form for one-hots.

    Of the others, `Sample.index_use` says which use has none; the estimator insertion refuses them with it.
    """
    sites = {site.name for site in graph.of(Sample) if _is_plain_index(graph, site) and wanted(site)}
    refused: dict[str, str] = {}
    while sites:
        try:
            rewritten = _Rewriting(graph, sites).run()
        except _Refused as stop:
            refused.update(dict.fromkeys(stop.sites, stop.why))
            sites -= stop.sites
        else:
            graph = eliminate_dead_code(rewritten)
            break
    marked = [
        dataclasses.replace(site, index_use=refused[site.name]) for site in graph.of(Sample) if site.name in refused
    ]
    return graph.replace(*marked) if marked else graph


def _is_plain_index(graph: Graph, site: Sample) -> bool:
    dist = graph[site.dist]
    assert isinstance(dist, Dist)
    replayed = site.value is not None or any(node.on == site.name for node in graph.of(Depends))
    return issubclass(dist.template.cls, Categorical) and not replayed and not site.data


class _Refused(Exception):
    def __init__(self, sites: set[str], node: Node, why: str) -> None:
        self.sites = sites
        what = node.op_name if isinstance(node, Op) else node.kind
        self.why = f"{what} of it at {node.loc or '%' + node.name} {why}"
        super().__init__(self.why)


class _Rewriting:
    """One run over the graph for a set of sites."""

    def __init__(self, graph: Graph, sites: set[str]) -> None:
        self.graph, self.sites = graph, sites
        self.new = Rewriter(graph)
        self.counts = graph.ancestors([graph.objective])
        """Names of the nodes that the objective depends on: what else reads an index reads whole numbers."""
        self.hot: dict[str, Ref] = {}
        """The one-hots of the nodes that hold indices."""
        self.floating: dict[str, Ref] = {}
        """Of the user's own ``one_hot(z)``, of whole numbers: the same in floating numbers."""
        self.origin: dict[str, set[str]] = {}
        """The sites that an index comes from."""
        self.dists: dict[str, Ref] = {}

    def run(self) -> Graph:
        for node in self.graph:
            if node.name in self.sites:
                assert isinstance(node, Sample)
                self._draw(node)
            elif node.name not in self.counts:
                self.new.keep(node)
            elif any(ref in self.hot for ref in node.inputs):
                self._use(node)
            elif any(ref in self.floating for ref in node.inputs):
                self._use_floating(node)
            else:
                self.new.keep(node)
        return self.new.finish()

    def _draw(self, site: Sample) -> None:
        new = self.new
        dist = self._one_hot_dist(site.dist)
        parameter = new.nodes[new.nodes[dist].inputs[0]].tensor
        shape = (*site.tensor.shape, parameter.shape[-1])
        type_ = TensorType(parameter.dtype, shape, event_ndim=1, device=site.tensor.device)
        drawn = new.add(dataclasses.replace(site, dist=dist, type=type_, index=True))
        index = new.op(aten.argmax.default, drawn, -1, at=site, name=new.fresh(f"{site.name}_index"), type=site.type)
        new.substitute(site.name, index)
        self.hot[site.name], self.origin[site.name] = drawn, {site.name}

    def _one_hot_dist(self, ref: Ref) -> Ref:
        if ref not in self.dists:
            node = self.graph[ref]
            assert isinstance(node, Dist)
            params = tuple(map(self.new.read, node.params))
            name = self.new.fresh(f"{node.name}_one_hot")
            made = dataclasses.replace(
                node, name=name, template=_one_hot_template(node.template, self.new.shape(params[0])), params=params
            )
            self.dists[ref] = self.new.add(made)
        return self.dists[ref]

    def _use(self, node: Node) -> None:
        read = {ref for ref in node.inputs if ref in self.hot}
        origin = set().union(*(self.origin[ref] for ref in read))
        try:
            if isinstance(node, LogProb):
                self._log_prob(node)
            elif isinstance(node, Op):
                self._operation(node, origin)
            else:
                raise NoOneHotForm("has no meaning between two categories")
        except NoOneHotForm as stop:
            raise _Refused(origin, node, str(stop)) from None

    def _operation(self, node: Op, origin: set[str]) -> None:
        if any(ref in self.floating for ref in node.inputs):
            raise NoOneHotForm("meets a one_hot of another one")
        use = Use(self.new, node, self.hot)
        if packet_name(node.target) == "one_hot":
            self.new.keep(node)
            self.floating[node.name] = self._own_one_hot(use)
            self.origin[node.name] = origin
        elif (hot := view(use)) is not None:
            self.new.keep(node)
            self.hot[node.name], self.origin[node.name] = hot, origin
        else:
            look_up(use)

    def _own_one_hot(self, use: Use) -> Ref:
        """The user's ``one_hot(z, n)``."""
        hot, classes = self.hot[use.arguments["self"]], use.arguments["num_classes"]
        more = classes - use.categories(hot)
        if more < 0:
            raise NoOneHotForm(f"makes {classes} classes of {use.categories(hot)} categories")
        return use.op(aten.constant_pad_nd.default, hot, [0, more]) if more else hot

    def _log_prob(self, node: LogProb) -> None:
        dist = self.graph[node.dist]
        assert isinstance(dist, Dist)
        if node.value not in self.hot or not issubclass(dist.template.cls, Categorical):
            raise NoOneHotForm(f"is one of {dist.template.family}, not of a Categorical")
        made = self._one_hot_dist(node.dist)
        hot = self.hot[node.value]
        have, want = self.new.shape(hot)[-1], self.new.shape(self.new.nodes[made].inputs[0])[-1]
        if have != want:
            raise NoOneHotForm(f"is one over {want} categories, not {have}")
        self.new.add(dataclasses.replace(node, dist=made, value=hot))

    def _use_floating(self, node: Node) -> None:
        """An operation on the user's own one-hot: right if its result was of floating numbers before."""
        read = {ref for ref in node.inputs if ref in self.floating}
        if not isinstance(node, Op) or not isinstance(node.type, TensorType) or not node.type.dtype.is_floating_point:
            origin = set().union(*(self.origin[ref] for ref in read))
            raise _Refused(origin, node, "takes its one_hot for whole numbers; make it floating first")
        self.new.add(node.rewire(lambda ref: self.floating.get(ref, self.new.read(ref))))


def _one_hot_template(template: Template, shape: tuple[int, ...]) -> Template:
    """Of the distribution over one-hots with the parameter of a Categorical, ``[*B, C]``."""
    (name,) = template.names
    parameter = torch.full([*template.batch_shape, shape[-1]], 1 / shape[-1])
    return flatten(OneHotCategorical(**{name: parameter}, validate_args=False))[0]

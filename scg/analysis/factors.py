"""A likelihood taken apart into terms that each see few latents, and the index space they share.

    nll = -(log p(x_0 | z_0) + log p(x_1 | z_1) + …)     [B]       one factor a step, each [B]
    nll = -log p(x | z, s).sum(-1)                        [B]       one factor [B, N]; N is a plate if z is [B, N]

The value is walked back through sums, means, views and numbers; where that separates latents it is cut. The cuts are
checked by running the linear part on random numbers: each must enter as ``scale`` times its sum over its plates.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping

import torch
from torch import Tensor

from scg.analysis.elimination import Intractable, Plan, Scope, plan_elimination
from scg.analysis.influence import Influence, influence
from scg.errors import EstimatorError
from scg.ir import Cost, Factor, Graph, Input, Marginal, Node, Op, Ref, Sample, TensorType, map_refs
from scg.operations import is_linear, lookup, packet_name

_SUMS = {"add", "sub", "rsub", "neg", "mul", "div", "sum", "mean"}
"""Operations of the linear part beside those that move data; products and quotients by numbers only."""

Dim = tuple[str, int]
"""A node's dim; the node "" is the marginal."""


def factorize(graph: Graph, found: Influence, node: Marginal) -> Marginal:
    """``node`` with its factors, sites and plates.

    Args:
        graph: normalized.
        found: of all its samples.
        node: not yet split.

    Raises:
        EstimatorError: a site outside of the logarithm depends on one inside.
    """
    assert node.value is not None
    above = [site for site in graph.of(Sample) if site.name in found.sites(node.value)]
    summed = [site for site in above if node.sums(site)]
    _check_outside(found, node, summed, [site for site in above if not node.sums(site)])
    leaves = _cut(graph, found, node.value, {site.name for site in summed}) or {str(node.value): _whole(graph, node)}
    return _Space(graph, found, node, leaves, summed).laid_out()


def _check_outside(found: Influence, node: Marginal, summed: list[Sample], outside: list[Sample]) -> None:
    inside = {site.name for site in summed}
    for site in outside:
        if both := inside & found.sites(site.name):
            raise EstimatorError(
                f"%{site.name} ({site.loc}) depends on %{min(both)}, which logmarginal ({node.loc}) sums over, but is "
                f"not summed itself.\n  Add it to over=…, or sum over neither."
            )


def _whole(graph: Graph, node: Marginal) -> Factor:
    assert node.value is not None
    return Factor(node.value, tuple(i if size > 1 else None for i, size in enumerate(graph[node.value].tensor.shape)))


# -- the cuts ---------------------------------------------------------------------------------------------------------
def _cut(graph: Graph, found: Influence, value: Ref, summed: set[str]) -> dict[str, Factor] | None:
    """The factors that ``value`` is a sum of, with -1 for the axis of a plate; None where they cannot be told apart."""
    region = _region(graph, found, value, summed)
    leaves: dict[str, None] = {}
    inside: set[str] = set()
    stack = [str(value)]
    while stack:
        name = stack.pop()
        if name in region and name not in inside:
            inside.add(name)
            stack.extend(reversed(graph[name].inputs))
        elif name not in region:
            leaves[name] = None
    if not inside:
        return None
    tail = [node for node in graph if node.name in inside]
    place = {name: i for i, name in enumerate(leaves)}
    inputs: list[Node] = [Input(name=name, type=graph[name].type, path=name, position=i) for name, i in place.items()]
    part = graph.with_nodes([*inputs, *tail], objective=value, outputs=value)
    reads = influence(part, leaves)
    factors = {}
    for name in leaves:
        relation = reads.relation(value, name)
        if relation is None:
            continue
        axes: list[int | None] = []
        for dim, size in enumerate(graph[name].tensor.shape):
            if size > 1 and relation.tied(dim) is None and not relation.mixed(dim):
                return None
            axes.append(None if size == 1 else relation.tied(dim) if relation.tied(dim) is not None else -1)
        factors[name] = Factor(Ref(name), tuple(axes))
    return _scaled(graph, tail, value, list(leaves), factors)


def _region(graph: Graph, found: Influence, value: Ref, summed: set[str]) -> set[str]:
    """The linear operations behind ``value`` that are worth stepping through."""
    linear: set[str] = set()
    stack = [str(value)]
    while stack:
        name = stack.pop()
        node = graph[name]
        if name not in linear and summed & found.sites(name) and _is_sum(graph, node):
            linear.add(name)
            stack.extend(node.inputs)
    worth: dict[str, bool] = {}
    for node in graph:  # operands come first
        if node.name in linear:
            below = any(worth.get(ref, False) for ref in node.inputs)
            worth[node.name] = below or _separates(graph, found, node, summed)
    return {name for name, yes in worth.items() if yes}


def _is_sum(graph: Graph, node: Node) -> bool:
    if isinstance(node, Cost):
        return True
    if not isinstance(node, Op):
        return False
    if node.target is operator.getitem:
        return _is_sum(graph, graph[node.inputs[0]])
    entry, name = lookup(node.target), packet_name(node.target)
    if entry is None or not (entry.kind == "movement" or name in _SUMS) or not is_linear(node, node.inputs):
        return False
    return all(_dtype(graph[ref]) in (None, _dtype(node)) for ref in node.inputs) or isinstance(node.type, tuple)


def _dtype(node: Node) -> torch.dtype | None:
    return node.type.dtype if isinstance(node.type, TensorType) else None


def _separates(graph: Graph, found: Influence, node: Node, summed: set[str]) -> bool:
    """Does some operand see fewer sites than ``node``, or one element of a site where ``node`` sees several?"""
    if isinstance(node.type, tuple):
        return False
    joined = {site: relation for site, relation in found.related(node.name).items() if site in summed}
    for ref in dict.fromkeys(node.inputs):
        if isinstance(graph[ref].type, tuple):
            continue
        own = found.related(ref)
        if any(site not in own for site in joined):
            return True
        for site, relation in joined.items():
            dims = range(len(relation.extent))
            if any(own[site].pointlike(dim) and not relation.pointlike(dim) for dim in dims):
                return True
    return False


def _scaled(
    graph: Graph, tail: list[Node], value: Ref, leaves: list[str], factors: Mapping[str, Factor]
) -> dict[str, Factor] | None:
    """``factors`` with what each is multiplied by, checked on random numbers."""
    generator = torch.Generator().manual_seed(0)
    with torch.enable_grad():
        numbers = {
            name: torch.randn(graph[name].tensor.shape, generator=generator, dtype=torch.float64, requires_grad=True)
            for name in leaves
        }
        out = _run(tail, value, numbers)
        slopes = torch.autograd.grad(out.sum(), list(numbers.values()), allow_unused=True, materialize_grads=True)
    shape, result, total = out.shape, {}, torch.zeros_like(out)
    for (name, number), slope in zip(numbers.items(), slopes, strict=True):
        if name not in factors:
            continue
        axes = factors[name].axes
        tied = [axis for axis in axes if axis is not None and axis >= 0]
        if len(set(tied)) < len(tied):
            return None
        copies = out.numel() // int(torch.Size(shape[axis] for axis in tied).numel())
        scale = float(slope.flatten()[0]) / copies
        total = total + scale * summed_along(number, axes, len(shape))
        result[name] = factors[name]._replace(scale=_rounded(scale))
    return result if torch.allclose(out, total, rtol=1e-9, atol=1e-9) else None


def _rounded(scale: float) -> float:
    """The number that the user wrote, where the slope of a sum is off by a rounding."""
    return round(scale) * 1.0 if abs(scale - round(scale)) < 1e-12 else scale


def _run(tail: list[Node], value: Ref, numbers: Mapping[str, Tensor]) -> Tensor:
    env: dict[str, object] = dict(numbers)
    for node in tail:
        if isinstance(node, Op):
            args, kwargs = map_refs(env.__getitem__, (tuple(node.args), dict(node.kwargs)))
            env[node.name] = node.target(*args, **kwargs)
        else:
            env[node.name] = env[node.inputs[0]]
    found = env[value]
    assert isinstance(found, Tensor)
    return found


def summed_along(tensor: Tensor, axes: tuple[int | None, ...], ndim: int, lead: int = 0) -> Tensor:
    """``[*lead | *S]`` as ``[*lead | *index space]``: summed over dims without an axis of it, size 1 where it has none.

    Args:
        tensor: with ``len(axes)`` dims behind ``lead`` others.
        axes: the axis of each of those dims; None, or beyond ``ndim``, or negative: summed over.
        ndim: rank of the index space.
    """
    kept = {axis: lead + dim for dim, axis in enumerate(axes) if axis is not None and 0 <= axis < ndim}
    gone = [lead + dim for dim in range(len(axes)) if lead + dim not in kept.values()]
    wide = [dim for dim in gone if tensor.shape[dim] > 1]
    if wide:
        tensor = tensor.sum(wide, keepdim=True)
    order = [*range(lead), *(kept[axis] for axis in sorted(kept)), *gone]
    if order != sorted(order):
        tensor = tensor.permute(order)
    sizes = [1] * ndim
    for place, axis in enumerate(sorted(kept)):
        sizes[axis] = tensor.shape[lead + place]
    return tensor.reshape([*tensor.shape[:lead], *sizes])


# -- the index space --------------------------------------------------------------------------------------------------
class _Space:
    """Which dims of factors and sites run side by side."""

    def __init__(
        self, graph: Graph, found: Influence, node: Marginal, leaves: Mapping[str, Factor], summed: list[Sample]
    ) -> None:
        self.graph, self.found, self.node, self.leaves = graph, found, node, leaves
        self.shape = graph[str(node.value)].tensor.shape
        self.direct = _direct_sites(graph)
        sites = {site.name: site for site in summed}
        seen = frozenset().union(*(found.sites(leaf) for leaf in leaves))
        self.sites = {name: site for name, site in sites.items() if name in seen}
        wide = {name: _wide_dims(site) for name, site in self.sites.items()}
        parents = {leaf: self.direct[leaf] for leaf in leaves} | {name: self.direct[sites[name].dist] for name in sites}
        self.links = [
            ((name, dim), other, relation.tied(dim))
            for other, above in parents.items()
            for name in sorted(above & self.sites.keys())
            if (relation := found.relation(other, name)) is not None
            for dim in wide[name]
        ]
        """Element dims of sites, the nodes just below them, and those nodes' dims that they are tied to.

        What is further below is tied through the sites between: no site outside lies below one inside.
        """
        self.joined: set[Dim] = set()
        """Element dims of sites whose elements' rows are joint."""

    def laid_out(self) -> Marginal:
        """The marginal with its factors, its sites and its plates, as many element dims apart as can be."""
        while True:
            classes = self._classes()
            clash = self._clash(classes)
            if clash:
                self.joined |= clash
                continue
            made = self._made(classes)
            try:
                elimination_plan(self.graph, made, dict.fromkeys(self.sites, 1), self.direct)
            except Intractable as error:
                plates = {dim for dim in self._apart(error.site) if classes.find(dim) not in self._of_result(classes)}
                self.joined |= plates
                continue
            return made

    def _apart(self, site: str) -> list[Dim]:
        return [(site, dim) for dim in _wide_dims(self.sites[site]) if (site, dim) not in self.joined]

    def _classes(self) -> _Classes:
        """Dims that are tied run along one axis; a site's dim that is not tied to all that see it is joined."""
        before = -1
        while before != len(self.joined):
            before = len(self.joined)
            for dim, other, tied in self.links:
                if tied is None or (other, tied) in self.joined or not self._is_element(other, tied):
                    self.joined.add(dim)
        classes = _Classes()
        for name, factor in self.leaves.items():
            for place, axis in enumerate(factor.axes):
                if axis is not None and axis >= 0:
                    classes.join((name, place), ("", axis))
        for dim, other, tied in self.links:
            if dim not in self.joined:
                classes.join(dim, (other, tied or 0))
        return classes

    def _is_element(self, name: str, dim: int) -> bool:
        site = self.sites.get(name)
        return site is None or dim < site.tensor.ndim - site.tensor.event_ndim

    def _of_result(self, classes: _Classes) -> dict[Dim, int]:
        return {classes.find(("", axis)): axis for axis, size in enumerate(self.shape) if size > 1}

    def _clash(self, classes: _Classes) -> set[Dim]:
        """Site dims to join because one axis would have to be two, or a result's axis would be summed over."""
        apart = {dim for name in self.sites for dim in self._apart(name)}
        result = self._of_result(classes)
        members: dict[Dim, set[Dim]] = {}
        for dim in apart:
            members.setdefault(classes.find(dim), set()).add(dim)
        axes = [axis for axis, size in enumerate(self.shape) if size > 1]
        twice = [root for root in members if sum(classes.find(("", axis)) == root for axis in axes) > 1]
        for name in (*self.leaves, *self.sites):
            dims = [classes.find((name, dim)) for dim in range(self.graph[name].tensor.ndim)]
            twice += [root for root in members if dims.count(root) > 1]
        for name, factor in self.leaves.items():
            loose = [classes.find((name, dim)) for dim, axis in enumerate(factor.axes) if axis == -1]
            twice += [root for root in loose if root in result]
        for root in members.keys() & result.keys():
            for site, place in members[root]:
                relation = self.found.relation(str(self.node.value), site)
                if relation is None or relation.tied(place) != result[root]:
                    twice.append(root)
        return set().union(*(members.get(root, set()) for root in twice))

    def _made(self, classes: _Classes) -> Marginal:
        result = self._of_result(classes)
        plates: dict[Dim, int] = {}
        sizes: list[int] = []
        for name in self.sites:
            for dim in self._apart(name):
                root = classes.find(dim)
                if root not in result and root not in plates:
                    plates[root] = len(self.shape) + len(plates)
                    sizes.append(self.graph[name].tensor.shape[dim[1]])
        axis_of = {**result, **plates}
        factors = [
            factor._replace(
                axes=tuple(
                    axis if axis != -1 else axis_of.get(classes.find((name, dim)))
                    for dim, axis in enumerate(factor.axes)
                )
            )
            for name, factor in self.leaves.items()
        ]
        sites = []
        for name, site in self.sites.items():
            apart = {dim[1] for dim in self._apart(name)}
            elements = range(site.tensor.ndim - site.tensor.event_ndim)
            sites.append(
                Factor(
                    Ref(name), tuple(axis_of[classes.find((name, dim))] if dim in apart else None for dim in elements)
                )
            )
        return Marginal(
            name=self.node.name, type=self.node.type, loc=self.node.loc, scope=self.node.scope,
            variable=self.node.variable, value=None, over=self.node.over, factors=tuple(factors), sites=tuple(sites),
            plates=tuple(sizes),
        )  # fmt: skip


def _wide_dims(site: Sample) -> list[int]:
    type_ = site.tensor
    return [dim for dim, size in enumerate(type_.shape[: type_.ndim - type_.event_ndim]) if size > 1]


class _Classes:
    """Union-find over dims."""

    def __init__(self) -> None:
        self._parent: dict[Dim, Dim] = {}

    def find(self, dim: Dim) -> Dim:
        while self._parent.get(dim, dim) != dim:
            dim = self._parent[dim]
        return dim

    def join(self, one: Dim, other: Dim) -> None:
        one, other = self.find(one), self.find(other)
        if one != other:
            self._parent[max(one, other)] = min(one, other)


# -- what a plan needs ------------------------------------------------------------------------------------------------
def _direct_sites(graph: Graph) -> dict[str, frozenset[str]]:
    """Of each node: the sites whose draws it is computed from with no other draw in between."""
    found: dict[str, frozenset[str]] = {}
    for node in graph:
        carried = frozenset().union(*(found[ref] for ref in node.inputs))
        if isinstance(node, Marginal):
            carried -= {site.name for site in graph.of(Sample) if node.sums(site)}
        found[node.name] = frozenset([node.name]) if isinstance(node, Sample) else carried
    return found


def plates_of(node: Marginal) -> dict[str, frozenset[int]]:
    """The plates that each site of a split marginal stands in."""
    ndim = len(node.tensor.shape)
    return {str(site.node): frozenset(a for a in site.axes if a is not None and a >= ndim) for site in node.sites}


def elimination_plan(
    graph: Graph, node: Marginal, rows: Mapping[str, int], direct: Mapping[str, frozenset[str]] | None = None
) -> Plan:
    """In which order the sites of a split marginal are summed out.

    Args:
        rows: how many rows each of them has.
        direct: of each node, the sites it is directly computed from, where they are known already.

    Raises:
        Intractable: two sites' plates cross.
    """
    direct = _direct_sites(graph) if direct is None else direct
    scopes = [
        Scope(direct[factor.node] & rows.keys(), frozenset(axis for axis in factor.axes if axis is not None))
        for factor in node.factors
    ]
    for site in node.sites:
        sample = graph[site.node]
        assert isinstance(sample, Sample)
        parents = direct[sample.dist] & rows.keys()
        scopes.append(Scope(parents | {sample.name}, frozenset(axis for axis in site.axes if axis is not None)))
    sizes = dict(enumerate((*node.tensor.shape, *node.plates)))
    return plan_elimination(scopes, plates_of(node), rows, sizes, node.tensor.dtype.itemsize)

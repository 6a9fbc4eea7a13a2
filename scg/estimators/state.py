"""Running and learned parts of estimators: made once a site, shared by all signatures."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from scg.analysis.contexts import contexts
from scg.analysis.influence import Influence, influence
from scg.analysis.support import finite_support
from scg.errors import EstimatorError
from scg.estimators.base import SiteInfo
from scg.estimators.frames import frames
from scg.estimators.rows import joined_dims
from scg.ir import Dist, Graph, Input, Param, Sample, TensorType


def make_states(graph: Graph, owner: nn.ModuleDict) -> dict[str, nn.Module]:
    """The state of every site that needs one, made where ``owner`` has none yet."""
    states: dict[str, nn.Module] = {}
    found: Influence | None = None
    joined: dict[str, tuple[int, ...]] = {}
    along_batch = _BatchDims(graph)
    for site in graph.of(Sample):
        if site.estimator is None or not site.credits or site.row_dim != site.name:
            continue
        key = site.name.replace(".", "_")
        if key not in owner:
            dist = graph[site.dist]
            assert isinstance(dist, Dist)
            if found is None:
                found = influence(graph)
                joined = joined_dims(graph, found)
            frame = frames(graph, found)[site.name] if site.sequence else None
            info = SiteInfo(
                site.name,
                dist.template,
                site.tensor.shape,
                site.tensor.event_ndim,
                support=finite_support(graph, dist),
                joined=joined[site.name] if frame is None else frame.joined[site.name],
                length=0 if frame is None else frame.length,
                context=context_values(graph, site),
            )
            made = site.estimator.make_state(info, along_batch(site), draws(graph, site))
            if made is None:
                continue
            owner[key] = made
        states[site.name] = owner[key]
    return states


def refuse_shared(graph: Graph, states: Mapping[str, nn.Module], live: Mapping[str, Tensor]) -> None:
    """A learned part must not be made of what the program learns: its fit would add to the model's gradient.

    Raises:
        EstimatorError: with the site and the path of the parameter.
    """
    read = {node.path for node in graph.of(Param)}
    tensors = {**graph.tensors, **live}
    paths = {id(tensor): path for path, tensor in tensors.items() if path in read and tensor.requires_grad}
    for name, state in states.items():
        for parameter in state.parameters():
            if id(parameter) in paths:
                site = graph[name]
                raise EstimatorError(
                    f"%{name} ({site.loc}): the module of its estimator shares the parameter {paths[id(parameter)]!r} "
                    f"with the model, which would get the gradient of the module's fit as well; give the module "
                    f"parameters of its own (copy.deepcopy), or let it read a value of the graph: inputs=(…)"
                )


def context_values(graph: Graph, site: Sample) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """Names and shapes of the sufficient context that the site's estimator asks for, in the graph's order."""
    reads = site.estimator.reads()
    if reads not in ("baseline", "critic"):
        return ()
    known = contexts(graph, site.name)
    names = known.baseline if reads == "baseline" else known.critic
    return tuple(
        (node.name, node.type.shape)
        for node in graph
        if node.name in names and node.name != site.name and isinstance(node.type, TensorType)
    )


def draws(graph: Graph, site: Sample) -> int:
    """How many i.i.d. draws the site has."""
    if site.value is not None:
        return 1
    return graph.samples * (site.estimator.samples or 1)


class _BatchDims:
    """Element dims of sites that run over the data batch: tied to the leading dim of an input.

    Where rows mix (a BatchNorm above the site), the first dim of the batch's size stands for it.
    """

    def __init__(self, graph: Graph) -> None:
        self.inputs = [node for node in graph.of(Input) if node.tensor.ndim >= 1]
        self.found = influence(graph, [node.name for node in self.inputs]) if self.inputs else None

    def __call__(self, site: Sample) -> tuple[int, ...]:
        elements = site.tensor.shape[: site.tensor.ndim - site.tensor.event_ndim]
        dims = set()
        for node in self.inputs:
            relation = None if self.found is None else self.found.relation(site.name, node.name)
            if relation is None:
                continue
            size = node.tensor.shape[0]
            found = relation.tied(0)
            if found is None and relation.mixed(0) and size in elements:
                found = elements.index(size)
            if found is not None and found < len(elements):
                dims.add(found)
        return tuple(sorted(dims))

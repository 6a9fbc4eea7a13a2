"""Smoothness: along which paths a derivative flows from a site, and which gradients no estimator would see.

    z = Normal(m, 1).rsample();  (z > 0).float().mean()      break at gt: the pathwise derivative is zero
    z = Normal(m, 1).rsample();  f(z.detach())               stopped: the user's instruction
    (theta + torch.randn(4) > 0).float().mean()              unseen: theta moves a jump that noise averages over

A path ends at the parameters of another site, whose own estimator takes it from there.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from scg.ir import Depends, Dist, Graph, Input, Node, Op, Opaque, Param, Sample, TensorType
from scg.operations import is_discontinuous, is_padded, is_random, lookup, packet_name

if TYPE_CHECKING:
    from scg.template import Template


@dataclass(frozen=True)
class Break:
    """The first operation on the way from a site that no derivative gets through rightly."""

    node: str
    why: str
    """As a clause: ``gt jumps``."""
    loc: str

    def __str__(self) -> str:
        return f"{self.why} ({self.loc})" if self.loc else self.why


@dataclass(frozen=True)
class Fault:
    """A gradient with respect to a parameter that no estimator sees."""

    node: str
    """The jump."""
    parameter: str
    """The user's name for what moves the jump."""
    loc: str
    text: str
    """What, where and the way out."""


@dataclass(frozen=True)
class _Flow:
    """Bit sets of the sites that reach a node, by the kind of path."""

    direct: int = 0
    """Without passing another site's draw, and for `rsample` sites without a stop."""
    broken: int = 0
    """Direct, but not differentiable or not continuous."""
    stoppable: int = 0
    """Pathwise only, up to here without a stop."""
    passed: int = 0
    """As a change of the expectation: a later stop does not matter."""
    stopped: int = 0
    """Some path went through a stop."""

    def __or__(self, other: _Flow) -> _Flow:
        return _Flow(
            self.direct | other.direct,
            self.broken | other.broken,
            self.stoppable | other.stoppable,
            self.passed | other.passed,
            self.stopped | other.stopped,
        )


@dataclass(frozen=True)
class Smoothness:
    """What `smoothness` found."""

    graph: Graph = field(repr=False)
    _flows: Mapping[str, _Flow] = field(repr=False)
    _bits: Mapping[str, int] = field(repr=False)

    def break_between(self, site: str, node: str) -> Break | None:
        """Where the paths from the draw of ``site`` to ``node`` stop being differentiable and continuous, if anywhere.

        Only paths that pass no other draw count: ask about the `Dist` of each downstream site too. A stop on the way
        is a break if ``site`` was drawn by ``sample`` (the derivative of the expectation was asked for).
        """
        bit = self._bits[site]
        if not self._flows[node].broken & bit:
            return None
        origins, seen, stack = set(), set(), [node]
        while stack:
            name = stack.pop()
            if name in seen:
                continue
            seen.add(name)
            before = [ref for ref in self.graph.nodes[name].inputs if self._flows[ref].broken & bit]
            stack.extend(before)
            if not before:
                origins.add(name)
        first = next(n for n in self.graph if n.name in origins)
        return Break(first.name, _why(first), first.loc)

    def live(self, site: str, node: str) -> bool:
        """Does some path carry the derivative that the draw of ``site`` asks for, passing other sites where need be?

        A stop ends the pathwise derivative of an `rsample` site. It does not end the derivative of an expectation:
        that of a ``sample`` site, or what has passed the parameters of a ``sample`` site on its way.
        """
        flow = self._flows[node]
        return bool((flow.stoppable | flow.passed) & self._bits[site])

    def stopped(self, site: str, node: str) -> bool:
        """Does some path from ``site`` to ``node`` go through a stop that the user put there for it?"""
        return bool(self._flows[node].stopped & self._bits[site])


def smoothness(graph: Graph) -> Smoothness:
    """Follows every site of ``graph`` to every node."""
    samples: list[Sample] = graph.of(Sample)
    bits = {node.name: 1 << i for i, node in enumerate(samples)}
    pathwise = sum(bits[node.name] for node in samples if node.method == "rsample")
    flows: dict[str, _Flow] = {}
    for node in graph:
        into = _Flow()
        for ref in node.inputs:
            into = into | flows[ref]
        flows[node.name] = _through(node, into, flows, bits.get(node.name, 0), pathwise)
    return Smoothness(graph, flows, bits)


def _through(node: Node, into: _Flow, flows: Mapping[str, _Flow], own: int, pathwise: int) -> _Flow:
    """What flows out of ``node``, given what flows into it."""
    match node:
        case Sample():
            # The paths into the parameters continue as the site's own, pathwise or as a change of its distribution.
            params = flows[node.dist]
            value = flows[node.value] if node.value is not None else _Flow()
            if node.method == "rsample":
                after = _Flow(stoppable=params.stoppable | own, passed=params.passed, stopped=params.stopped)
            else:
                after = _Flow(passed=params.passed | params.stoppable | own, stopped=params.stopped)
            return value | after | _Flow(direct=own)
        case Op() if (entry := lookup(node.target)) is not None and entry.kind == "nothing":
            return _Flow()  # it reads shapes only
        case Op() if _stops(node):
            kept = into.direct & ~pathwise
            return _Flow(kept, kept, 0, into.passed, into.stopped | into.stoppable)
        case Op() if is_padded(node) or packet_name(node.target) is None and node.target is not operator.getitem:
            # A custom backward is the user's instruction for a pathwise site, and unknown to all others.
            return into | _Flow(broken=into.direct & ~pathwise)
        case Op() if is_discontinuous(node):
            return into | _Flow(broken=into.direct)
        case Opaque() | Depends():
            outside = into if isinstance(node, Opaque) else flows[node.on]
            return into | _Flow(broken=outside.direct)
        case _:
            return into


def _stops(node: Op) -> bool:
    return packet_name(node.target) == "detach"


def _why(node: Node) -> str:
    match node:
        case Opaque():
            return f"the opaque call {node.fn.__qualname__} has no derivative"
        case Depends():
            return "the influence is declared, not computed"
        case Op() if _stops(node):
            return "detach stops the derivative"
        case Op() if is_padded(node):
            return f"{node.op_name} has a row for padding, whose derivative it leaves out"
        case Op() if packet_name(node.target) is None and node.target is not operator.getitem:
            return f"{node.op_name} has a backward of its own"
        case Op() if lookup(node.target) is None and node.target is not operator.getitem:
            return f"{node.op_name} is not known to be smooth"
        case Op() if is_random(node):
            return f"{node.op_name} draws noise that has no derivative"
        case Op():
            name = packet_name(node.target) or "an output"
            integer = isinstance(node.type, TensorType) and not node.type.dtype.is_floating_point
            return f"{name} jumps" + (" (its result is not a float)" if integer else "")
        case _:
            return f"%{node.name} has no derivative"


# -- gradients that no estimator sees -----------------------------------------------------------------------------
_CONTINUOUS_NOISE = frozenset(
    """rand rand_like randn randn_like uniform exponential geometric cauchy log_normal normal normal_functional rrelu
    rrelu_with_noise _standard_gamma _sample_dirichlet""".split()
)
_LANDS_ON_POINTS = frozenset(
    "bernoulli ceil fix floor floor_divide heaviside poisson binomial round sgn sign special_round trunc".split()
)


def unseen_gradients(graph: Graph) -> list[Fault]:
    """Jumps whose place a parameter moves and a continuous random number averages over.

    The expected value then has a derivative in the parameter, but automatic differentiation sees none, and as there is
    no site that the parameter belongs to, neither does any estimator.
    """
    matters = _reaching(graph)
    moved: dict[str, dict[str, None]] = {}  # node -> parameters that move it smoothly
    blurred: dict[str, bool] = {}  # node -> depends on a continuous random number
    faults = []
    for node in graph:
        movers: dict[str, None] = {}
        for ref in node.inputs:
            movers |= moved[ref]
        noise = any(blurred[ref] for ref in node.inputs)
        match node:
            case Input() | Param():
                movers = {node.path: None} if node.requires_grad else {}
            case Sample():
                dist = graph.nodes[node.dist]
                assert isinstance(dist, Dist)
                noise, movers = _is_continuous(dist.template), {}
            case Op() if _stops(node):
                movers = {}
            case Opaque():
                if movers and noise and node.name in matters:
                    faults += _faults(node, movers)
                movers = {}
            case Op() if is_discontinuous(node):
                draws = is_random(node)
                if movers and (noise or draws) and node.name in matters:
                    faults += _faults(node, movers)
                movers = {}
                noise = (noise or draws) and not _lands_on_points(node)
            case Op() if is_random(node):
                noise = noise or packet_name(node.target) in _CONTINUOUS_NOISE
        moved[node.name], blurred[node.name] = movers, noise
    return faults


def _is_continuous(template: Template) -> bool:
    """Has the distribution a density? Where the class does not say, yes: the cautious answer."""
    family = template.cls
    while template.base is not None:
        template = template.base
        family = template.cls
    support = getattr(template.component or family, "support", None)
    try:
        discrete = getattr(support, "is_discrete", None)
    except NotImplementedError:  # it depends on the instance
        discrete = None
    if isinstance(discrete, bool):
        return not discrete
    return family.__name__ not in ("Binomial", "Multinomial", "Categorical", "OneHotCategorical")


def _lands_on_points(node: Op) -> bool:
    floating = isinstance(node.type, TensorType) and node.type.dtype.is_floating_point
    return not floating or packet_name(node.target) in _LANDS_ON_POINTS or node.kwargs.get("rounding_mode") is not None


def _reaching(graph: Graph) -> set[str]:
    """The nodes that reach the objective without a stop on the way."""
    seen: set[str] = set()
    stack: list[str] = [graph.objective]
    while stack:
        name = stack.pop()
        node = graph.nodes[name]
        if name in seen:
            continue
        seen.add(name)
        if not (isinstance(node, Op) and _stops(node)):
            stack.extend(node.inputs)
    return seen


def _faults(node: Node, movers: Mapping[str, None]) -> list[Fault]:
    return [Fault(node.name, path, node.loc, _fault_text(node, path)) for path in movers]


def _fault_text(node: Node, path: str) -> str:
    what = node.op_name if isinstance(node, Op) else f"the opaque call {node.name}"
    where = f", {node.loc}" if node.loc else ""
    return (
        f"%{node.name} ({what}{where}): {path!r} moves where it jumps, and random numbers average over the jump, so "
        f"that the expected loss has a gradient in {path!r} that differentiating cannot see.\n"
        f"  Draw the outcome from a distribution with {path!r} in its parameters (scg.sample or torch.distributions), "
        f"detach {path!r} before the jump, or pass allow_biased=True to leave that gradient out."
    )

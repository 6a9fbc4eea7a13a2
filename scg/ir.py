"""The stochastic-graph IR: a few frozen node kinds that refer to each other by unique name.

One node a line, shapes as ``[sample | batch | event]``::

    graph vae(x) {
      %x    = input  f32[128, 784]           x
      %l    = op     f32[128, 10]            linear(%x, %enc.weight)                # vae.py:12
      %d    = dist                           Bernoulli(logits=%l)                   # vae.py:13
      %z    = sample f32[K | 128, 10 | ]     %d estimator=score_function credits=nll # vae.py:14
    }
"""

from __future__ import annotations

import copy
import dataclasses
import fnmatch
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    import networkx

    from scg.analysis.contexts import SiteContexts
    from scg.template import Template


class Ref(str):
    """The name of another node, as a data edge; a plain ``str`` in arguments is a constant."""

    __slots__ = ()

    def __repr__(self) -> str:
        return f"%{self}"


_DTYPES = {
    torch.float32: "f32", torch.float64: "f64", torch.float16: "f16", torch.bfloat16: "bf16",
    torch.int64: "i64", torch.int32: "i32", torch.int16: "i16", torch.int8: "i8",
    torch.uint8: "u8", torch.bool: "bool", torch.complex64: "c64", torch.complex128: "c128",
}  # fmt: skip


@dataclass(frozen=True)
class TensorType:
    """dtype and shape of one draw; ``sample`` names the sample dims that stand in front of it at run time."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    event_ndim: int = 0
    """How many trailing dims of ``shape`` are event dims (non-zero for samples only)."""
    sample: tuple[str, ...] = ()
    """Names of the leading sample dims, filled in when estimators are inserted."""
    device: torch.device = torch.device("cpu")

    def __str__(self) -> str:
        dtype = _DTYPES.get(self.dtype, str(self.dtype).removeprefix("torch."))
        split = len(self.shape) - self.event_ndim
        parts = [", ".join(map(str, self.shape[:split]))]
        if self.sample:
            parts.insert(0, ", ".join(self.sample))
        if self.event_ndim:
            parts.append(", ".join(map(str, self.shape[split:])))
        where = "" if self.device.type == "cpu" else f"@{self.device}"
        return f"{dtype}[{' | '.join(parts)}]{where}"

    @property
    def ndim(self) -> int:
        return len(self.shape)


Type = TensorType | tuple["Type", ...] | type[int] | type[float] | type[bool] | None
"""A tensor, several outputs, a number that is computed from shapes, or nothing (a distribution)."""


def map_leaves(fn: Callable[[Any], Any], tree: Any) -> Any:
    """``tree`` (nested tuples, lists, dicts, slices, dataclasses) with ``fn(leaf)`` in the place of what is in them."""
    if isinstance(tree, (tuple, list)):
        items = [map_leaves(fn, item) for item in tree]
        return type(tree)(*items) if hasattr(tree, "_fields") else type(tree)(items)  # a named tuple takes them apart
    if isinstance(tree, dict):
        new = copy.copy(tree)  # its class may be made of something else than a dict
        for key, item in tree.items():
            new[key] = map_leaves(fn, item)
        return new
    if isinstance(tree, slice):
        return slice(*(map_leaves(fn, bound) for bound in (tree.start, tree.stop, tree.step)))
    if hasattr(type(tree), "__dataclass_fields__"):
        new = copy.copy(tree)
        for name in tree.__dataclass_fields__:
            object.__setattr__(new, name, map_leaves(fn, getattr(tree, name)))  # it may be frozen
        return new
    return fn(tree)


def map_refs(fn: Callable[[Ref], Any], tree: Any) -> Any:
    """``tree`` with every `Ref` replaced by ``fn(ref)``."""
    return map_leaves(lambda leaf: fn(leaf) if isinstance(leaf, Ref) else leaf, tree)


def map_tensors(fn: Callable[[Tensor], Any], tree: Any) -> Any:
    """``tree`` with every tensor replaced by ``fn(tensor)``."""
    return map_leaves(lambda leaf: fn(leaf) if isinstance(leaf, Tensor) else leaf, tree)


def refs_in(tree: Any) -> tuple[Ref, ...]:
    """Every `Ref` in ``tree``, in order, repeats kept."""
    found: list[Ref] = []
    map_refs(lambda ref: found.append(ref), tree)
    return tuple(found)


@dataclass(frozen=True, kw_only=True)
class Node:
    """What every kind of node has. Data edges are the `Ref`s in the fields listed by ``_edges``."""

    name: str
    """Unique in its graph and never changed: passes, users and pictures refer to it."""
    type: Type = None
    loc: str = ""
    """The user's line, ``model.py:14``."""
    scope: str = ""
    """Path of the user's module that computed it, ``enc.0``."""
    variable: str = ""
    """The user's variable that its value was assigned to, where there is one: what a cost is called by default."""

    _edges: ClassVar[tuple[str, ...]] = ()
    kind: ClassVar[str] = "node"

    @cached_property
    def inputs(self) -> tuple[Ref, ...]:
        """Names of the nodes this one reads, in order."""
        return refs_in(tuple(getattr(self, name) for name in self._edges))

    def rewire(self, fn: Callable[[Ref], Ref]) -> Node:
        """The same node reading ``fn(ref)`` wherever it read ``ref``."""
        changes = {name: map_refs(fn, getattr(self, name)) for name in self._edges}
        return dataclasses.replace(self, **changes)

    @property
    def tensor(self) -> TensorType:
        """The type, for nodes known to hold one tensor."""
        assert isinstance(self.type, TensorType), f"%{self.name} holds {self.type}, not one tensor"
        return self.type

    def describe(self) -> str:
        """What stands to the right of the type in the text form."""
        return ""

    def __str__(self) -> str:
        where = f"  # {self.loc}" if self.loc else ""
        return f"%{self.name} = {self.kind} {_type_text(self.type)}{self.describe()}{where}"


@dataclass(frozen=True, kw_only=True)
class Input(Node):
    """A tensor argument of the call."""

    path: str
    """Where the argument stands: ``x``, ``batch.images``."""
    position: int
    """Its index among the tensor leaves of the flattened ``(args, kwargs)``."""
    requires_grad: bool = False

    kind = "input"

    def describe(self) -> str:
        return self.path


@dataclass(frozen=True, kw_only=True)
class Param(Node):
    """A tensor that lives outside the graph: a parameter, a buffer, or a captured constant."""

    path: str
    """Key of `Graph.tensors`, the user's own name for it: ``enc.0.weight``."""
    role: Literal["parameter", "buffer", "constant"] = "parameter"
    requires_grad: bool = False

    kind = "param"

    def describe(self) -> str:
        return f"{self.role} {self.path}"


@dataclass(frozen=True, kw_only=True)
class Op(Node):
    """A deterministic operation or exogenous noise: an ATen overload, or another callable taken whole."""

    target: Callable[..., Any]
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    picks: bool = False
    """A look-up by an integer scalar, ``x[k]``, for which PyTorch hands out a view: `functionalize` sees to that."""

    _edges = ("args", "kwargs")
    kind = "op"

    @property
    def op_name(self) -> str:
        """``add.Tensor`` of ``aten.add.Tensor``; of another callable, its qualified name."""
        name = getattr(self.target, "_name", None)
        if isinstance(name, str):
            return name.removeprefix("aten::").removesuffix(".default")
        return getattr(self.target, "__qualname__", None) or repr(self.target)

    def describe(self) -> str:
        return f"{self.op_name}({_arguments(self.args, self.kwargs)})"


@dataclass(frozen=True, kw_only=True)
class Dist(Node):
    """A distribution object: a template (class and constants) and its tensor parameters."""

    template: Template
    params: tuple[Ref, ...] = ()
    """One a slot of the template, in the template's order."""

    _edges = ("params",)
    kind = "dist"

    def describe(self) -> str:
        named = zip(self.template.names, self.params, strict=True)
        return f"{self.template.family}({', '.join(f'{n}={r!r}' for n, r in named)})"


@dataclass(frozen=True, kw_only=True)
class Sample(Node):
    """A stochastic node; its name is the site's name."""

    dist: Ref
    method: Literal["sample", "rsample"] = "sample"
    """How the user drew it: this fixes which derivative is meant (of the expectation, or pathwise)."""
    sample_shape: tuple[int, ...] = ()
    """Leading i.i.d. batch dims of the user's own ``q.sample((n,))``; part of ``type.shape``."""
    value: Ref | None = None
    """Of a replayed site: the outcome to use instead of a draw."""
    data: bool = False
    """Drawn under ``no_grad``: its draw is data, influence still passes through its parameters."""
    index: bool = False
    """Of a drawn one-hot that the user's site holds the index of: a Categorical, written for its estimator's sake."""
    index_use: str = ""
    """Of a Categorical that was to be written so: the use of its index that has no form for one-hots."""
    requested: Any = None
    """The estimator given to `scg.sample`, a name or an object."""
    estimator: Any = None
    """The estimator object in force, set by the insertion pass."""
    reason: str = ""
    """Why that estimator."""
    evaluations: int = 0
    """Rows of downstream costs that the estimator needs for one draw of the program; 0 where that is not known."""
    credits: tuple[str, ...] = ()
    """Labels of the costs credited: plain names, not data edges."""
    sequence: str = ""
    """First site of the sequence that it is drawn in, whose sample dim it shares; empty where it is drawn by itself."""

    _edges = ("dist", "value")
    kind = "sample"

    @property
    def row_dim(self) -> str:
        """Name of the sample dim of its rows: its own, or that of its sequence."""
        return self.sequence or self.name

    def describe(self) -> str:
        parts = [f"{self.dist!r}"]
        if self.value is not None:
            parts.append(f"value={self.value!r}")
        if self.method == "rsample":
            parts.append("rsample")
        if self.data:
            parts.append("data")
        if self.index:
            parts.append("index")
        if self.estimator is not None:
            parts.append(f"estimator={self.estimator.name}")
        if self.sequence:
            parts.append(f"sequence={self.sequence}")
        if self.credits:
            parts.append(f"credits={','.join(self.credits)}")
        return " ".join(parts)


@dataclass(frozen=True, kw_only=True)
class LogProb(Node):
    """Log density or mass of ``value`` under ``dist``; event dims summed."""

    dist: Ref
    value: Ref

    _edges = ("dist", "value")
    kind = "logprob"

    def describe(self) -> str:
        return f"{self.dist!r}.log_prob({self.value!r})"


@dataclass(frozen=True, kw_only=True)
class Expected(Node):
    """An expectation over a draw, known in closed form: a function of distributions alone."""

    form: Callable[..., Tensor]
    """``kl_divergence``, ``entropy``, ``mean``, …: of the distributions in order, the draw's own first."""
    dists: tuple[Ref, ...]

    _edges = ("dists",)
    kind = "expected"

    @property
    def form_name(self) -> str:
        """What the form is called: the name of the function in torch where it has one."""
        return str(getattr(self.form, "__name__", self.form))

    def describe(self) -> str:
        return f"{self.form_name}({', '.join(map(repr, self.dists))})"


@dataclass(frozen=True, kw_only=True)
class Opaque(Node):
    """A Python function the compiler must not look into; not differentiable."""

    fn: Callable[..., Any]
    """The user's plain function."""
    args: tuple[Any, ...] = ()
    batch_dims: int = 0
    """Leading dims of the arguments and results that are independent of each other."""
    pure: bool = True
    """False: a stateful environment, called in program order, once a call, never dropped or rerun."""
    shape: Callable[..., Any] | tuple[Callable[..., Any], ...] | None = None
    dtype: Any = None

    _edges = ("args",)
    kind = "opaque"

    def describe(self) -> str:
        return f"{self.fn.__qualname__}({_arguments(self.args, {})})"


@dataclass(frozen=True, kw_only=True)
class Cost(Node):
    """A term of the objective: the identity on ``value``."""

    value: Ref
    label: str
    """The user's name for it, else the node's own."""
    declared: bool = False
    """Named by the user with `scg.cost`."""

    _edges = ("value",)
    kind = "cost"

    def describe(self) -> str:
        return f"{self.value!r} {self.label}"


@dataclass(frozen=True, kw_only=True)
class Depends(Node):
    """The identity on ``value`` that declares an influence of a site the graph cannot see."""

    value: Ref
    on: Ref
    dims: tuple[str, ...] = ()
    """One word (tied, causal, mixed) a leading dim shared by ``value`` and the site; the rest are mixed."""

    _edges = ("value", "on")
    kind = "depends"

    def describe(self) -> str:
        return f"{self.value!r} on {self.on!r} dims=({','.join(self.dims)})"


@dataclass(frozen=True, kw_only=True)
class Bound(Node):
    """A multi-sample bound over the program's K draws of ``value``, a negative log weight; with one draw, ``value``."""

    value: Ref
    alpha: float = 0.0
    """0 for the importance-weighted bound, else the order of the Renyi bound."""

    _edges = ("value",)
    kind = "bound"

    def describe(self) -> str:
        return f"{self.value!r} alpha={self.alpha:g}"


class Factor(NamedTuple):
    """A value or a site as it enters a `Marginal`."""

    node: Ref
    axes: tuple[int | None, ...]
    """Per dim of the value, or element dim of the site: the axis of the marginal's index space it runs along."""
    scale: float = 1.0
    """What a value is multiplied by in the sum."""


@dataclass(frozen=True, kw_only=True)
class Marginal(Node):
    """``-log E[exp(-value)]`` over finite sites: each element of ``value`` a marginal of its own.

    Its index space has the dims of the result in front and *plates* behind: dims of sites and values that are summed
    inside of the logarithm. An axis is None where a dim has size 1, or where a site's rows are joint over it.
    """

    value: Ref | None
    """The negative log likelihood; None once it is split into ``factors``."""
    over: tuple[str, ...] = ()
    """Globs over the names of the sites that are summed; empty for all."""
    factors: tuple[Factor, ...] = ()
    """Values whose scaled sum the likelihood is (set by split_marginals)."""
    sites: tuple[Factor, ...] = ()
    """Sites that are summed, in program order (set by split_marginals)."""
    plates: tuple[int, ...] = ()
    """Sizes of the plates."""

    _edges = ("value", "factors", "sites")
    kind = "marginal"

    def sums(self, site: Sample) -> bool:
        """Is ``site``, should the value depend on it, summed over?"""
        named = not self.over or any(fnmatch.fnmatchcase(site.name, glob) for glob in self.over)
        return named and not site.data and site.value is None

    def describe(self) -> str:
        if self.value is not None:
            return f"-log E exp(-{self.value!r})"
        terms = " + ".join(f"{'' if f.scale == 1 else f'{f.scale:g} '}{f.node!r}" for f in self.factors)
        return f"-log E exp(-({terms})) over {', '.join(site.node for site in self.sites)}"


@dataclass(frozen=True)
class CreditEdge:
    """Which elements of a cost teach which elements of a site: a box of site elements for each cost element."""

    site: str
    cost: str
    """Name of the `Cost` node."""
    axes: tuple[int | None, ...]
    """Per element dim of the site: the cost's dim that is tied to it (index a sees index a), or None."""
    mixed: tuple[bool, ...]
    """Per element dim of the site: every cost element sees all of it."""
    words: tuple[str, ...]
    """Per element dim of the site, for people: ``tied``, ``banded``, ``mixed`` or ``boxes``."""
    share: float = 1.0
    """How much of the cost is credited; other than all of it only where its part of the gradient is measured."""
    lo: tuple[Tensor, ...] = field(default=(), compare=False, repr=False)
    """Where neither tied nor mixed says it all: first site index per cost element, one tensor a site dim."""
    hi: tuple[Tensor, ...] = field(default=(), compare=False, repr=False)
    """Last site index, inclusive; below ``lo`` where the cost element does not depend on the site."""

    @property
    def simple(self) -> bool:
        """Every dim is tied or mixed: sums and broadcasts are enough."""
        return not self.lo

    @property
    def label(self) -> str:
        """The tied dims for an edge of a picture: ``tied 0, 1``."""
        groups = [f"{word} {i}" for i, word in enumerate(self.words) if word != "mixed"]
        return ", ".join(groups) if groups else "all"


@dataclass(frozen=True)
class Site:
    """What a person asks of a site: see `Graph.sites`."""

    name: str
    distribution: str
    """Class name of the distribution; of ``Independent``, its base's."""
    shape: tuple[int, ...]
    """Shape of one draw, no sample dims."""
    estimator: str | None
    credits: tuple[str, ...]
    """Names of the costs credited."""
    loc: str
    reason: str = ""
    sample_dims: tuple[str, ...] = ()


@dataclass(frozen=True)
class Graph:
    """Nodes in topological (and program) order, and what the call returns."""

    name: str
    nodes: Mapping[str, Node]
    objective: Ref
    """The scalar that is minimised in expectation."""
    outputs: Any
    """The model's whole return value: nested containers with `Ref`s where tensors stand."""
    tensors: Mapping[str, Tensor] = field(default_factory=dict, compare=False, repr=False)
    """Values of the `Param` nodes by path: the user's own objects, never copies."""
    credit: Mapping[tuple[str, str], CreditEdge] = field(default_factory=dict, repr=False)
    """(site, cost node) to which elements teach which (set by assign_credit)."""
    notes: tuple[str, ...] = ()
    """What a person should know of it: biases let pass, likely mistakes."""
    samples: int = 1
    """Draws of the whole program, set with the estimators; two or more make the sample dim ``K``."""
    tail: frozenset[str] = frozenset()
    """Names of the nodes between the costs and the objective, a map linear in the costs (set by split_costs)."""

    # -- reading --------------------------------------------------------------------------------------------------
    def __getitem__(self, name: str) -> Node:
        return self.nodes[name]

    def __iter__(self) -> Iterator[Node]:
        return iter(self.nodes.values())

    def __len__(self) -> int:
        return len(self.nodes)

    def of(self, *kinds: type[Node]) -> list[Any]:
        """The nodes of the given kinds, in order."""
        if kinds not in self._of:
            self._of[kinds] = [node for node in self if isinstance(node, kinds)]
        return list(self._of[kinds])

    @cached_property
    def _of(self) -> dict[tuple[type[Node], ...], list[Node]]:
        return {}

    @cached_property
    def users(self) -> Mapping[str, tuple[str, ...]]:
        """For each node, the names of those that read it."""
        found: dict[str, dict[str, None]] = {name: {} for name in self.nodes}
        for node in self:
            for ref in node.inputs:
                found[ref][node.name] = None
        return {name: tuple(users) for name, users in found.items()}

    def ancestors(self, names: Iterable[str]) -> set[str]:
        """The named nodes and everything they read, directly or not."""
        seen: set[str] = set()
        stack = list(names)
        while stack:
            name = stack.pop()
            if name not in seen:
                seen.add(name)
                stack.extend(self.nodes[name].inputs)
        return seen

    def descendants(self, names: Iterable[str]) -> set[str]:
        """The named nodes and everything that reads them, directly or not."""
        seen: set[str] = set()
        stack = list(names)
        while stack:
            name = stack.pop()
            if name not in seen:
                seen.add(name)
                stack.extend(self.users[name])
        return seen

    @cached_property
    def sites(self) -> dict[str, Site]:
        """Every stochastic node of the user's program, by name, in program order."""
        return {node.name: self._site(node) for node in self.of(Sample)}

    def _site(self, node: Sample) -> Site:
        dist = self.nodes[node.dist]
        assert isinstance(dist, Dist)
        return Site(
            name=node.name,
            distribution="Categorical" if node.index else dist.template.family,
            shape=node.tensor.shape[:-1] if node.index else node.tensor.shape,
            estimator=node.estimator.name if node.estimator is not None else None,
            credits=node.credits,
            loc=node.loc,
            reason=node.reason,
            sample_dims=node.tensor.sample,
        )

    def context(self, site: str) -> SiteContexts:
        """What a baseline of ``site`` may read, and what its baseline and its critic need: see `SiteContexts`."""
        from scg.analysis.contexts import contexts

        return contexts(self, site)

    @cached_property
    def costs(self) -> dict[str, Cost]:
        """The terms of the objective, by node name; before costs are split, those the user named."""
        return {node.name: node for node in self.of(Cost)}

    # -- making new graphs ----------------------------------------------------------------------------------------
    def replace(self, *nodes: Node, **changes: Any) -> Graph:
        """This graph with the given nodes in the place of those of the same name."""
        table = dict(self.nodes)
        for node in nodes:
            assert node.name in table, f"no node %{node.name} to replace"
            table[node.name] = node
        return dataclasses.replace(self, nodes=table, **changes)

    def with_nodes(self, nodes: Iterable[Node], **changes: Any) -> Graph:
        """This graph with another list of nodes, in topological order."""
        return dataclasses.replace(self, nodes={node.name: node for node in nodes}, **changes)

    def fresh(self, base: str, taken: Iterable[str] = ()) -> str:
        """``base``, or ``base_1``, ``base_2``… if that name is in use."""
        names = set(self.nodes) | set(taken)
        if base not in names:
            return base
        n = 1
        while f"{base}_{n}" in names:
            n += 1
        return f"{base}_{n}"

    # -- views ----------------------------------------------------------------------------------------------------
    def __str__(self) -> str:
        arguments = ", ".join(node.path for node in self.of(Input))
        lines = [f"graph {self.name}({arguments}) {{"]
        width = max((len(name) for name in self.nodes), default=0)
        kinds = max((len(node.kind) for node in self), default=0)
        for node in self:
            where = f"  # {node.loc}" if node.loc else ""
            text = f"  %{node.name:<{width}} = {node.kind:<{kinds}} {_type_text(node.type)}{node.describe()}{where}"
            lines.append(text.rstrip())
        lines += [f"  return {self.objective!r} of {self.outputs!r}", "}"]
        return "\n".join(lines)

    def to_networkx(self) -> networkx.DiGraph:
        """Data edges as a ``networkx.DiGraph``; each node carries ``node`` (the IR node) and ``kind``."""
        import networkx

        graph = networkx.DiGraph(name=self.name)
        for node in self:
            graph.add_node(node.name, node=node, kind=node.kind)
            graph.add_edges_from((str(ref), node.name) for ref in node.inputs)
        return graph

    def render(self, path: Any, view: str = "stochastic", *, fold: bool = True) -> Any:
        """Writes a picture; the suffix of ``path`` (svg, png, pdf, html, dot) says which kind."""
        from scg.backends.pictures import render

        return render(self, path, view=view, fold=fold)

    def _repr_html_(self) -> str:
        from scg.backends.pictures import inline_svg

        return inline_svg(self)


def _type_text(type_: Type) -> str:
    if type_ is None:
        return ""
    if isinstance(type_, tuple):
        return "(" + ", ".join(_type_text(item).strip() for item in type_) + ") "
    if isinstance(type_, TensorType):
        return f"{type_} "
    return f"{type_.__name__} "


def _arguments(args: Iterable[Any], kwargs: Mapping[str, Any]) -> str:
    return ", ".join([repr(a) for a in args] + [f"{k}={v!r}" for k, v in kwargs.items()])

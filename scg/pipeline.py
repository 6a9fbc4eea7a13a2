"""`compile`: trace, passes, lowering, and the module that users call."""

from __future__ import annotations

import copy
import dataclasses
import gc
import itertools
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from scg.analysis.influence import shared_ranges
from scg.backends import torch_module
from scg.backends.any_batch import Differs, any_batch
from scg.backends.call_by_call import call_by_call
from scg.capture import Captured, captured
from scg.errors import EstimatorError, LoweringError, RetraceWarning
from scg.estimators import get_estimator
from scg.estimators.base import EnumeratingEstimator
from scg.estimators.lookup import near_miss
from scg.estimators.state import make_states, refuse_shared
from scg.holder import held
from scg.ir import Graph, Sample
from scg.passes import InsertEstimators, pipeline
from scg.passes.closed_forms import ClosedForms
from scg.passes.insert_estimators import ENUMERATE_LIMIT
from scg.tracer import trace as trace_graph
from scg.tracer_batch import SMALLEST, Batch, Scaling, batch_of, resized, scaling
from scg.verifier import verify

History = tuple[tuple[str, Graph], ...]
"""The graph as traced and after each pass, by the pass's name; they share most of their nodes."""

BACKENDS = ("eager", "inductor")
CREDITS = ("element", "node", "none")

_MOST_TRIED = 500
"""Nodes of the longest program in which `explain` looks for closed forms that were not asked for."""

_RETRACES_BEFORE_WARNING = 5

_SIZES_TRIED = 64
"""How far up from the first batch size others are looked for, where a model accepts only some (multiples of 4)."""


@dataclass(frozen=True)
class Options:
    """The arguments of `compile`, checked."""

    estimator: Any = "auto"
    estimators: Mapping[str, Any] = field(default_factory=dict)
    samples: int = 1
    backend: str = "eager"
    dynamic: bool = False
    order: int = 1
    credit: str = "element"
    allow_biased: bool | None = None
    debug: bool = False
    enumerate_limit: int = ENUMERATE_LIMIT
    closed_forms: bool | Mapping[str, bool] = False

    def __post_init__(self) -> None:
        if self.backend not in BACKENDS:
            raise LoweringError(near_miss("backend", self.backend, BACKENDS))
        if self.credit not in CREDITS:
            raise EstimatorError(near_miss("credit", self.credit, CREDITS))
        if not isinstance(self.samples, int) or self.samples < 1:
            raise EstimatorError(f"samples={self.samples!r} must be a whole number of 1 or more")
        if self.order not in (1, 2):
            raise EstimatorError(f"order={self.order!r} must be 1 or 2")
        if self.order == 2 and self.backend == "inductor":
            raise LoweringError("order=2 needs backend='eager': inductor cannot differentiate twice")


class CompiledModule(nn.Module):
    """A model whose objective has an unbiased, low-variance gradient through its samples. Made by `compile`."""

    def __init__(self, model: Callable[..., Any], options: Options) -> None:
        super().__init__()
        self.options = options
        self.function = None if isinstance(model, nn.Module) else model
        self.model: nn.Module = model if isinstance(model, nn.Module) else held(captured(model))
        self.estimators = nn.ModuleDict()
        self._pending: dict[str, Tensor] = {}
        self._frozen = False
        self._forget()

    def _forget(self) -> None:
        self._captured: Captured | None = None
        self._programs: dict[Any, _Bound] = {}
        self._any_batch: dict[Any, tuple[Scaling, _Bound | None]] = {}
        self._why_not = ""
        self._latest: _Bound | None = None
        self._retraces = 0

    # -- calling --------------------------------------------------------------------------------------------------
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's output, with the surrogate in the place of its objective."""
        return self._bound(args, kwargs)(args, kwargs)

    def _bound(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Bound:
        found = self._captured
        if found is None or not found.unchanged():
            self._recapture()
            found = self._captured
            assert found is not None
        modes = (self.training, torch.is_grad_enabled(), self._frozen, torch.is_autocast_enabled("cpu"), found.values)
        key = (*modes, *_call_signature(args, kwargs))
        bound = self._programs.get(key)
        if bound is None and self.options.dynamic:
            bound = self._of_any_batch(modes, args, kwargs)
        if bound is None:
            bound = self._compile(args, kwargs)
        self._latest = self._programs[key] = bound
        return bound

    def _of_any_batch(self, modes: tuple[Any, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Bound | None:
        """The program that serves every batch size, if there is one and this size is among them."""
        batch = batch_of(_tensors(args, kwargs))
        if batch is None:
            return None
        key = (*modes, batch.positions, *_call_signature(*resized(args, kwargs, batch, SMALLEST)))
        if key not in self._any_batch:
            self._any_batch[key] = self._compile_any_batch(args, kwargs, batch)
        scale, bound = self._any_batch[key]
        return bound if bound is not None and scale.holds(batch.size) else None

    def _compile_any_batch(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], batch: Batch
    ) -> tuple[Scaling, _Bound | None]:
        scale = scaling(self._callable, args, kwargs, batch)
        nearby = range(batch.size + 1, batch.size + _SIZES_TRIED)
        sizes = [batch.size, *itertools.islice(filter(scale.holds, nearby), 2)]
        if not scale.holds(batch.size) or len(sizes) < 3:
            self._why_not = scale.reason or f"it asks of its batch size: {', '.join(map(str, scale.conditions))}"
            return scale, None
        built = [self._build(*resized(args, kwargs, batch, size)) for size in sizes]
        try:
            program = any_batch([program for _, program, _ in built], sizes, min(batch.positions))
        except Differs as found:
            self._why_not = str(found)
            return scale, None
        return scale, self._bind(built[0][0], program, built[0][2], any_batch=True)

    def _recapture(self) -> None:
        if self._captured is not None:
            self._retraces += 1
            if self._retraces == _RETRACES_BEFORE_WARNING:
                warnings.warn(
                    "a plain Python value that the model reads keeps changing, and each change traces it again; make "
                    "it a buffer or an argument that is a tensor",
                    RetraceWarning,
                    stacklevel=4,
                )
        self._captured = captured(self._callable)

    @property
    def _callable(self) -> Callable[..., Any]:
        return self.model if self.function is None else self.function

    def _compile(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Bound:
        graph, program, history = self._build(args, kwargs)
        if self.options.dynamic and self._why_not:
            note = f"dynamic=True, but it is traced for each batch size: {self._why_not}"
            graph = dataclasses.replace(graph, notes=(*graph.notes, note))
        return self._bind(graph, program, history)

    def _build(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Graph, torch_module.Program, History]:
        """Trace, passes, lowering."""
        with _collector_paused():
            return self._built(args, kwargs)

    def _built(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Graph, torch_module.Program, History]:
        options = self.options
        graph = trace_graph(self._callable, args, kwargs)
        history = [("traced", graph)]
        with shared_ranges():
            graph = run_passes(graph, self._insert, options.credit, options.closed_forms, history)
            return graph, self._lower(graph, args, kwargs), tuple(history)

    @property
    def _insert(self) -> InsertEstimators:
        options = self.options
        return InsertEstimators(
            default=get_estimator(options.estimator) or "auto",
            overrides=options.estimators,
            samples=options.samples,
            order=options.order,
            allow_biased=options.allow_biased,
            enumerate_limit=options.enumerate_limit,
        )

    def _lower(self, graph: Graph, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch_module.Program:
        states = make_states(graph, self.estimators)
        self._load_pending()
        live = self._live(graph)
        refuse_shared(graph, states, live)
        return torch_module.build(
            graph,
            _tensors(args, kwargs),
            live,
            states,
            training=self.training and not self._frozen,
            learning=torch.is_grad_enabled(),
            debug=self.options.debug,
            order=self.options.order,
            eager=self.options.backend == "eager",
        )

    def variant(self, graph: Graph, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Bound:
        """A rewritten graph of this module as a program beside its own, to be called with ``(args, kwargs)``."""
        return self._bind(graph, self._lower(graph, args, kwargs))

    def _bind(
        self, graph: Graph, program: torch_module.Program, history: History = (), *, any_batch: bool = False
    ) -> _Bound:
        if self.options.backend == "inductor":
            run = torch_module.compile_inductor(graph, program, any_batch)
        else:
            run = call_by_call(program, any_batch=any_batch)
        tables = [self._table(path) for path in program.captured]
        assert self._captured is not None
        return _Bound(graph, program, run, tuple(tables), self._captured, history)

    def _live(self, graph: Graph) -> dict[str, Tensor]:
        """Parameters and buffers of the graph that are found anew at every call, by path."""
        found: dict[str, Tensor] = {}
        for path in graph.tensors:
            where = self._find(path)
            if where is not None:
                table, key = where
                found[path] = table[key]
        return found

    def _find(self, path: str) -> tuple[dict[str, Any], str] | None:
        owner, _, key = path.rpartition(".")
        try:
            module = self.model.get_submodule(owner)
        except AttributeError:
            return None
        for table in (module._parameters, module._buffers):
            if table.get(key) is not None:
                return table, key
        return None

    def _table(self, path: str) -> tuple[dict[str, Any], str]:
        found = self._find(path)
        assert found is not None
        return found

    # -- looking --------------------------------------------------------------------------------------------------
    @property
    def graph(self) -> Graph:
        """The IR after all passes, of the latest trace."""
        if self._latest is None:
            raise LoweringError("nothing is traced yet: call the module once, or give example_inputs to scg.compile")
        return self._latest.graph

    @property
    def code(self) -> str:
        """The latest program as the text of a Python module of its own, which needs no scg: save it, import it."""
        from scg.backends.ejected import eject

        graph = self.graph
        assert self._latest is not None and graph is not None
        return eject(self._latest.program, graph)

    def explain(self) -> Any:
        """What was decided for every site, and why: a table as text, Markdown and HTML."""
        from scg.report import explain

        return explain(self.graph, notes=(*self.graph.notes, *self._closed_forms_to_be_had()))

    def _closed_forms_to_be_had(self) -> Iterator[str]:
        """What ``closed_forms=True`` would replace, of a program short enough to try."""
        assert self._latest is not None
        before = dict(self._latest.history).get("closed_forms")
        if self.options.closed_forms is not False or before is None or len(before) > _MOST_TRIED:
            return
        sites = self.graph.of(Sample)
        drawn = {site.name: True for site in sites if not isinstance(site.estimator, EnumeratingEstimator)}
        found = ClosedForms(drawn, self._insert.sampled)(before) if drawn else before
        for note in found.notes[len(before.notes) :]:
            if note.startswith("closed form over"):
                yield f"closed_forms=True would take the {note}"

    def formula(self) -> Any:
        """LaTeX of the objective, of each site's gradient estimate and of the surrogate."""
        from scg.backends.latex import formula

        return formula(self.graph, self.options.order)

    def render(self, path: Any, view: str = "stochastic", *, fold: bool = True, shares: Any = None) -> Any:
        """Writes a picture; the suffix of ``path`` (svg, png, pdf, html, dot) says which kind.

        Args:
            path: where to.
            view: ``stochastic``, ``dataflow``, ``credit``, ``passes`` or ``variance``.
            fold: draw what is repeated once, with a count.
            shares: what `scg.variance_budget` found, or ``{(site, cost): share}``, for the view ``variance``.
        """
        from scg.backends.pictures import render
        from scg.backends.shares import VarianceShares
        from scg.backends.stages import Stage

        graph, code = self.graph, self.code if str(path).lower().endswith(".html") else ""
        assert self._latest is not None
        history = [Stage(name, at) for name, at in self._latest.history]
        shares = None if shares is None else VarianceShares.of(shares)
        return render(
            graph, path, view, self.explain(), code=code, fold=fold, history=history, shares=shares,
            order=self.options.order,
        )  # fmt: skip

    def _repr_html_(self) -> str:
        return self.graph._repr_html_() if self._latest is not None else f"<pre>{self!r}</pre>"

    # -- state ----------------------------------------------------------------------------------------------------
    def model_parameters(self) -> Iterator[nn.Parameter]:
        """The model's own parameters: the same objects."""
        return self.model.parameters()

    def estimator_parameters(self) -> Iterator[nn.Parameter]:
        """The parameters of baselines, critics and control variates."""
        self._must_be_complete()
        return self.estimators.parameters()

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """As ``nn.Module.named_parameters``: the model's under ``model.``, the estimators' under ``estimators.``.

        Raises:
            EstimatorError: before the first trace, if an estimator has learned parts: they would be missing.
        """
        self._must_be_complete()
        return super().named_parameters(*args, **kwargs)

    def _must_be_complete(self) -> None:
        specs = [self.options.estimator, *self.options.estimators.values()]
        learned = [spec for spec in map(get_estimator, specs) if spec is not None and spec.learned]
        if learned and self._latest is None and not len(self.estimators):
            raise EstimatorError(
                f"{learned[0].name} has learned parts that are made at the first trace: give example_inputs to "
                f"scg.compile, or call the module once, before asking for its parameters"
            )

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Inside, running statistics of baselines do not move."""
        before, self._frozen = self._frozen, True
        try:
            yield
        finally:
            self._frozen = before

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As ``nn.Module.load_state_dict``; state of estimators that are not traced yet is kept for them."""
        known = set(self.state_dict())
        self._pending = {
            key: value for key, value in state_dict.items() if key.startswith("estimators.") and key not in known
        }
        rest = {key: value for key, value in state_dict.items() if key not in self._pending}
        return super().load_state_dict(rest, strict=strict, assign=assign)

    def _load_pending(self) -> None:
        known = self.state_dict()
        with torch.no_grad():
            for key in [key for key in self._pending if key in known]:
                known[key].copy_(self._pending.pop(key))

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self._programs.clear()  # dtype or device may change
        self._any_batch.clear()
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        for name in ("_captured", "_latest"):
            state[name] = None
        state["_programs"], state["_any_batch"] = {}, {}
        return state

    def __deepcopy__(self, memo: dict[int, Any]) -> CompiledModule:
        new = self.__class__.__new__(self.__class__)
        memo[id(self)] = new
        new.__dict__.update({key: copy.deepcopy(value, memo) for key, value in self.__getstate__().items()})
        return new


@dataclass(frozen=True)
class _Bound:
    """A program tied to the live tensors it reads."""

    graph: Graph
    program: torch_module.Program
    run: Callable[..., Any]
    tables: tuple[tuple[dict[str, Any], str], ...]
    captured: Captured
    """Kept alive: its values hold ids, which must not be given to other objects while they are a key."""
    history: History = ()

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not kwargs and all(type(arg) is Tensor for arg in args):
            leaves: Any = args
        else:
            leaves = _tensors(args, kwargs)
        inputs = [leaves[position] for position in self.program.inputs]
        out = self.run(*inputs, *[table[key] for table, key in self.tables], *self.program.state)
        return torch_module.unflatten_outputs(self.graph.outputs, out)


@contextmanager
def _collector_paused() -> Iterator[None]:
    """A long program makes so many objects at once that looking for garbage among them takes a tenth of the time."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def _tensors(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensor leaves of a call."""
    return [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]


def _call_signature(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    return (
        tuple(_signature(arg) for arg in args),
        tuple((name, _signature(arg)) for name, arg in kwargs.items()) if kwargs else (),
    )


def _signature(arg: Any) -> Any:
    if isinstance(arg, Tensor):
        return (arg.shape, arg.dtype, arg.device, arg.requires_grad)
    if isinstance(arg, (list, tuple)):
        return (type(arg), *map(_signature, arg))
    if isinstance(arg, dict):
        return (type(arg), *((key, _signature(value)) for key, value in arg.items()))
    try:
        hash(arg)
    except TypeError:
        return (type(arg), repr(arg))
    return (type(arg), arg)


def run_passes(
    graph: Graph,
    insert: InsertEstimators,
    credit: str = "element",
    closed_forms: bool | Mapping[str, bool] = False,
    history: list[tuple[str, Graph]] | None = None,
) -> Graph:
    """All passes in order, verified in between; with ``SCG_DEBUG=1`` each one's effect is printed.

    ``history`` is filled with the graph after each pass, by the pass's name.
    """
    debug, check = os.environ.get("SCG_DEBUG", "0") != "0", os.environ.get("SCG_VERIFY", "1") != "0"
    for name, rewrite in pipeline(insert, credit, closed_forms):
        before, graph = graph, rewrite(graph)
        if history is not None:
            history.append((name, graph))
        if debug:
            from scg.debug import show_diff

            show_diff(before, graph, name)
        if check:
            verify(graph, after=name)
    return graph


def compile(
    model: Callable[..., Any],
    *,
    estimator: Any = "auto",
    estimators: Mapping[str, Any] | None = None,
    samples: int = 1,
    backend: str = "eager",
    example_inputs: tuple[Any, ...] | None = None,
    dynamic: bool = False,
    order: int = 1,
    credit: str = "element",
    allow_biased: bool | None = None,
    debug: bool = False,
    enumerate_limit: int = ENUMERATE_LIMIT,
    closed_forms: bool | Mapping[str, bool] = False,
) -> CompiledModule:
    """Compiles a stochastic model into a module with the same call and a right gradient through its samples.

    Args:
        model: an ``nn.Module`` or a function (closures over modules and parameters included) that returns a scalar
            loss, a tuple whose first item is the loss, or a dict or dataclass with a ``loss``.
        estimator: default for every site: a name of `scg.ESTIMATORS`, an estimator object, or ``"auto"``.
        estimators: ``{glob over site names: estimator}``; the first match wins.
        samples: K draws of the whole stochastic program; the value and the gradient are their means.
        backend: ``"eager"`` or ``"inductor"``.
        example_inputs: trace at once with these positional arguments; else at the first call.
        dynamic: one program for every size of the arguments' leading batch dim, of two and more. Where the model uses
            its batch size as more than a shape, each new size is traced once and kept, and `explain` says why.
        order: 2 makes second derivatives right too.
        credit: ``"element"``, or ``"node"`` (whole cost tensors), or ``"none"`` (the scalar loss), for comparison.
        allow_biased: ``False`` makes a biased estimator an error; an explicit ``True`` also lets gradients pass that no
            estimator sees, with a warning.
        debug: check every distribution's parameters at run time, and name the site.
        enumerate_limit: most rows at which ``"auto"`` evaluates any value to enumerate finite sites.
        closed_forms: ``True`` replaces every term of the objective whose expectation over a draw is known (divergences,
            entropies, moments, affine maps, squares of them) by that expectation; ``{glob: bool}`` says it site by
            site, the first match wins.

    Returns:
        A module with the model's call and output structure.

    Raises:
        TraceError: the model cannot be captured.
        EstimatorError: an estimator does not exist or does not fit its site.
    """
    get_estimator(estimator)
    for spec in (estimators or {}).values():
        get_estimator(spec)
    options = Options(
        estimator=estimator, estimators=dict(estimators or {}), samples=samples, backend=backend, dynamic=dynamic,
        order=order, credit=credit, allow_biased=allow_biased, debug=debug, enumerate_limit=enumerate_limit,
        closed_forms=dict(closed_forms) if isinstance(closed_forms, Mapping) else closed_forms,
    )  # fmt: skip
    compiled = CompiledModule(model, options)
    if isinstance(example_inputs, Tensor):
        raise TypeError("example_inputs is a tuple of the positional arguments: (x,)")
    if example_inputs is not None:
        compiled._bound(tuple(example_inputs), {})
    return compiled


def trace(model: Callable[..., Any], *args: Any, **kwargs: Any) -> Graph:
    """The captured IR of one call of ``model``, before any pass."""
    return trace_graph(model, args, kwargs)


__all__ = ["CompiledModule", "compile", "run_passes", "trace"]

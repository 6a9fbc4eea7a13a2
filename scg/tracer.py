"""Captures a PyTorch model or function, with its distributions, as a `Graph`."""

from __future__ import annotations

import inspect
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import ExitStack, contextmanager
from dataclasses import is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.distributions import Distribution
from torch.fx.experimental.proxy_tensor import disable_autocast_cache
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree

from scg import ir
from scg.capture import Captured, Change, captured, restored
from scg.errors import StateWarning, TraceError
from scg.host_random import HostRandom
from scg.interception import intercept, intercept_functions
from scg.ir import Graph, Ref
from scg.primitives import handling
from scg.tracer_frames import describe, traceback_loc
from scg.tracer_graph import Converter, without_glue
from scg.tracer_operations import InnerGradient, OperationMode, SavedTensors
from scg.tracer_recorder import Recorder

_lock = threading.RLock()  # the pre-dispatch mode stack is one for the whole process


def trace(
    model: Callable[..., Any],
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
) -> Graph:
    """Captures one call of ``model`` as a graph, without running it on real data.

    Args:
        model: A module or a function; closures over modules, parameters and tensors are captured by name.
        args: Positional arguments of the call; their shapes, dtypes and plain values are those of the graph.
        kwargs: Keyword arguments of the call.

    Returns:
        The graph before any pass.
    """
    found = captured(model)

    def run() -> Graph:
        try:
            return _trace(model, found, tuple(args), dict(kwargs or {}), in_parts=False)
        except InnerGradient:
            return _trace(model, found, tuple(args), dict(kwargs or {}), in_parts=True)

    host = HostRandom(found.alive)
    graph = run()
    if (place := host.place_of_draw(run)) is not None:
        where = f"{place}: " if place else _place(model)
        raise TraceError(
            f"{where}a random number that is not PyTorch's, which all calls would share.\n  Draw it with torch, as in "
            "torch.rand(()), or outside of the model, and give it as an argument or an attribute."
        )
    return graph


def _trace(
    model: Callable[..., Any], found: Captured, args: tuple[Any, ...], kwargs: dict[str, Any], in_parts: bool
) -> Graph:
    """One recording; ``in_parts``: of a model that takes gradients inside, see `OperationMode`."""
    for path, module in found.modules.items():
        if isinstance(module, torch.jit.ScriptModule):
            raise TraceError(f"{path or 'the model'} is a TorchScript module: use the Python module it was made from.")
    for path, tensor in found.tensors.items():
        if is_lazy(tensor):
            raise TraceError(f"{path} has no shape yet: call the model once before it is compiled.")
    recorder = Recorder(FakeTensorMode(allow_non_fake_inputs=True), found)
    with _lock, restored(found) as changes, _recording(recorder, in_parts):
        fake_args, fake_kwargs = _fake_arguments(recorder, model, args, kwargs)
        try:
            with recorder:
                result = model(*fake_args, **fake_kwargs)
                _keep_state(recorder, found, changes())
                _check_outputs(result)
                outputs = ir.map_tensors(recorder.lift, result)
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise TraceError(_data_dependent(error)) from error
        objective = _objective(outputs, _place(model))
        converter = Converter(recorder)
        nodes = converter.convert()

        def to_ref(tensor: Tensor) -> Ref:
            return converter.ref(recorder.node_of(tensor))

        target = to_ref(objective)
        refs = ir.map_tensors(to_ref, outputs)
    nodes = without_glue(nodes, ir.refs_in(refs))
    paths = {node.path for node in nodes.values() if isinstance(node, ir.Param)}
    graph = Graph(
        name=getattr(model, "__name__", None) or type(model).__name__,
        nodes=nodes,
        objective=target,
        outputs=refs,
        tensors={path: tensor for path, tensor in recorder.tensors.items() if path in paths},
    )
    _check_costs(graph)
    return graph


@contextmanager
def _recording(recorder: Recorder, in_parts: bool) -> Iterator[None]:
    """Everything that has to be in place while the user's function runs; nothing of it stays."""
    with ExitStack() as stack:
        stack.enter_context(torch.compiler.set_stance("force_eager"))  # parts under torch.compile run as they are
        stack.enter_context(recorder.fake_mode)
        stack.enter_context(torch.enable_grad())  # a first call in evaluation must not mark every node as data
        stack.enter_context(enable_python_dispatcher())
        if in_parts:
            stack.enter_context(SavedTensors(recorder.tracer))
        stack.enter_context(OperationMode(recorder.tracer, in_parts))
        stack.enter_context(disable_autocast_cache())
        stack.enter_context(intercept(recorder.on_attribute))
        stack.enter_context(intercept_functions(recorder.on_function))
        stack.enter_context(handling(recorder))
        yield


def _keep_state(recorder: Recorder, found: Captured, changes: list[Change]) -> None:
    """Makes the writes to module state during a call part of the graph, or says that they are not."""
    for change in changes:
        if change.is_buffer and isinstance(change.before, Tensor) and isinstance(change.after, Tensor):
            with torch.no_grad():
                recorder.lift(change.before).copy_(change.after)
        elif recorder.has(change.before):
            raise TraceError(
                f"the model reads {change.name} and then sets it to another tensor, which a compiled call cannot: "
                "register it as a buffer."
            )
        elif change.path not in found.caches:
            warnings.warn(
                f"the model sets {change.name} when it is called; a compiled call does not. "
                "Register state as a buffer, and return what is wanted outside.",
                StateWarning,
                stacklevel=3,
            )


def _fake_arguments(
    recorder: Recorder, model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments with fakes for tensors, each an `Input` named after where it stands."""
    leaves, spec = pytree.tree_flatten((args, kwargs))
    paths = _argument_paths(model, args, kwargs)
    position = 0
    fakes = []
    for leaf, path in zip(leaves, paths, strict=True):
        if isinstance(leaf, Tensor):
            leaf, position = recorder.add_input(leaf, path, position), position + 1
        fakes.append(leaf)
    fake_args, fake_kwargs = pytree.tree_unflatten(fakes, spec)
    return fake_args, fake_kwargs


def _argument_paths(model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[str]:
    """For each leaf of the arguments its path: ``x``, ``batch.images``, ``xs.0``."""
    function = model.forward if isinstance(model, torch.nn.Module) else model
    try:
        names = [
            f"{p.name}.{i - n}" if p.kind is inspect.Parameter.VAR_POSITIONAL else p.name
            for n, p in enumerate(inspect.signature(function).parameters.values())
            for i in (range(n, len(args)) if p.kind is inspect.Parameter.VAR_POSITIONAL else (n,))
        ]
    except (TypeError, ValueError):
        names = [f"arg_{i}" for i in range(len(args))]
    paths = []
    for keys, _ in pytree.tree_flatten_with_path((args, kwargs))[0]:
        names_of_keys = [str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key)))) for key in keys[1:]]
        if keys[0].idx == 0:  # type: ignore[attr-defined]
            index = int(names_of_keys[0])
            names_of_keys[0] = names[index] if index < len(names) else f"arg_{index}"
        paths.append(".".join(names_of_keys))
    return paths


def _check_outputs(outputs: Any) -> None:
    """Refuses objects that hold tensors where no graph output can stand."""

    def check(leaf: Any) -> None:
        if isinstance(leaf, Tensor):
            return
        inside = [*getattr(leaf, "__dict__", {}).values()]
        if isinstance(leaf, Mapping):
            inside += leaf.values()
        elif isinstance(leaf, (Set, deque)):
            inside += leaf
        tensors: list[Tensor] = []
        ir.map_tensors(tensors.append, inside)
        if isinstance(leaf, Distribution) or tensors:
            raise TraceError(
                f"the model returned a {type(leaf).__name__}, which holds tensors: return the tensors themselves, in "
                "tuples, lists, dicts or dataclasses."
            )

    ir.map_leaves(check, outputs)


def _objective(outputs: Any, place: str) -> Tensor:
    """The scalar to minimise: the return value, its first item, or its ``"loss"``."""
    found = outputs
    if isinstance(outputs, (tuple, list)):
        found = outputs[0] if outputs else None
    elif isinstance(outputs, dict):
        found = outputs.get("loss")
    elif is_dataclass(outputs):
        found = getattr(outputs, "loss", None)
    if not isinstance(found, Tensor):
        raise TraceError(
            f"{place}the model returned {_kind(outputs)}, which holds no objective: return a scalar loss, a tuple that "
            'starts with it, or a dict or dataclass with it as "loss".'
        )
    if found.ndim or not found.is_floating_point():
        raise TraceError(
            f"{place}the objective is a {found.dtype} tensor of shape {tuple(found.shape)}, not a floating-point "
            "scalar: reduce it with .mean() or .sum()."
        )
    return found


def _place(model: Callable[..., Any]) -> str:
    """``file.py:line: `` where the model's code begins, if it has any."""
    function = model.forward if isinstance(model, nn.Module) else inspect.unwrap(getattr(model, "func", model))
    code = getattr(function, "__code__", None)
    return f"{describe(code.co_filename, code.co_firstlineno)}: " if code is not None else ""


def _kind(outputs: Any) -> str:
    if isinstance(outputs, dict):
        return f"a dict with the keys {list(outputs)}"
    return f"a {type(outputs).__name__}"


def _check_costs(graph: Graph) -> None:
    used = graph.ancestors([graph.objective])
    for cost in graph.costs.values():
        if cost.name not in used:
            raise TraceError(
                f"{cost.loc}: the cost {cost.label!r} never reaches the objective. "
                "Use the value that scg.cost returns, or drop the call."
            )


def _data_dependent(error: Exception) -> str:
    loc = traceback_loc(error.__traceback__)
    if isinstance(error, DynamicOutputShapeException):
        return (
            f"{loc}: the shape of this result depends on tensor values (boolean-mask indexing, nonzero, unique, "
            "bincount). Keep the shape fixed: use torch.where, multiply by the mask, sum a one-hot, or wrap the code "
            "in @scg.opaque."
        )
    return f"{loc}: this needs the value of a tensor while the model is traced. Use tensor code, or @scg.opaque."

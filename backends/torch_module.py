"""Graph to program: the interpreter recorded as a flat ``torch.fx`` ``GraphModule``."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from scg.analysis.influence import influence
from scg.backends.coefficients import CoefficientRule
from scg.backends.doubly import WeighPath
from scg.backends.higher_order import HigherOrder
from scg.backends.lowering import Interpreter
from scg.backends.recorder import Recorder
from scg.backends.site_context import InputGradient, InputGradients
from scg.backends.stacking import stack_slices
from scg.errors import LoweringError
from scg.interception import intercept_functions
from scg.ir import Graph, Input, Marginal, Node, Opaque, Param, Ref, Sample, map_refs, map_tensors


class Traits(NamedTuple):
    """Of the tensor that a call of a program makes, under ``meta["traits"]``."""

    dtype: torch.dtype
    on_cpu: bool
    numel: int
    learns: bool
    """Whether it has a gradient."""


@dataclass(frozen=True)
class Program:
    """A flat program and where its arguments come from."""

    module: fx.GraphModule
    """Takes the input tensors, then the captured ones, then estimator state; returns a tuple of tensors."""
    inputs: tuple[int, ...]
    """Positions among the tensor leaves of the call."""
    captured: tuple[str, ...]
    """Paths of parameters and buffers."""
    state: tuple[Tensor, ...]
    """Estimator state."""


def build(
    graph: Graph,
    inputs: Sequence[Tensor],
    captured: Mapping[str, Tensor],
    states: Mapping[str, nn.Module],
    *,
    training: bool,
    learning: bool,
    debug: bool = False,
    order: int = 1,
    eager: bool = False,
) -> Program:
    """Records one program of ``graph``.

    Args:
        graph: after all passes.
        inputs: the tensor leaves of the call, by `Input.position`.
        captured: live parameters and buffers by path; other tensors of the graph are constants.
        states: estimator state by site.
        training: whether running statistics of baselines move.
        learning: whether gradients are enabled: else no terms are built.
        debug: check every distribution's parameters at run time.
        order: 2 makes every derivative right.
        eager: whether it runs call by call: inductor makes comparisons of draws and fused kernels itself.
    """
    narrows = bool(graph.of(Marginal))  # rows of latents do not vary over a batch
    fake_mode = FakeTensorMode(allow_non_fake_inputs=False)
    recorder = Recorder(fake_mode, narrows=narrows, eager=eager)
    used_inputs: list[int] = []
    used_captured: list[str] = []

    def fetch(node: Node) -> Tensor:
        with torch._C.DisableTorchFunction():
            if isinstance(node, Input):
                used_inputs.append(node.position)
                return recorder.placeholder(_identifier(node.path), inputs[node.position])
            assert isinstance(node, Param)
            if node.path in captured:
                used_captured.append(node.path)
                return recorder.placeholder(_identifier(node.path), captured[node.path])
            return recorder.constant(graph.tensors[node.path])

    ordered = [*graph.of(Input), *(p for p in graph.of(Param) if p.path in captured)]
    ready = {node.name: fetch(node) for node in ordered}  # arguments first, in the order they are passed
    for site, module in states.items():
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            recorder.externals[id(tensor)] = _identifier(f"{site}_{name}")
    interpreter = (HigherOrder if order > 1 else Interpreter)(
        graph,
        influence(graph, [node.name for node in graph.of(Sample)]),
        lambda node: ready[node.name] if node.name in ready else fetch(node),
        CoefficientRule(graph),
        states,
        training=training,
        learning=learning,
        debug=debug,
    )
    functions = intercept_functions(recorder.on_function)
    with fake_mode, torch.set_grad_enabled(learning), functions, recorder:
        outputs = interpreter.run(recorder.named)
    leaves: list[Tensor] = []
    flatten_outputs(outputs, leaves.append)
    recorder.graph.output(tuple(recorder.node(leaf) for leaf in leaves))
    recorder.graph.eliminate_dead_code(
        is_impure_node=lambda n: bool(n.meta.get("effect")) or n.op in ("placeholder", "output")
    )
    if narrows:
        stack_slices(recorder.graph)
    for node in recorder.graph.nodes:
        if isinstance(fake := node.meta.pop("fake", None), Tensor):
            node.meta["traits"] = Traits(fake.dtype, fake.device.type == "cpu", fake.numel(), fake.requires_grad)
    root = nn.Module()
    for name, tensor in recorder.constants.items():
        root.register_buffer(name, tensor, persistent=False)
    module = fx.GraphModule(root, recorder.graph, "Surrogate")
    return Program(module, tuple(used_inputs), tuple(used_captured), tuple(recorder.met))


def compile_inductor(graph: Graph, program: Program, any_batch: bool) -> Callable[..., Any]:
    """The program through ``torch.compile`` as one full graph; ``any_batch`` of one batch size or of every."""
    for node in graph.of(Opaque):
        raise LoweringError(
            f"%{node.name} ({node.loc}): inductor cannot call the opaque function {node.fn.__qualname__}; use "
            f"backend='eager'"
        )
    for call in program.module.graph.nodes:
        if isinstance(call.target, WeighPath):
            raise LoweringError(
                "'dreg' weighs gradients on their way back, which inductor cannot compile; use backend='eager' or "
                "another estimator"
            )
        if isinstance(call.target, (InputGradient, InputGradients)):
            site = call.name.split("_term")[0]
            raise LoweringError(
                f"%{site}: its estimator differentiates the costs inside the step, which inductor cannot compile; use "
                f"backend='eager' or another estimator"
            )
    return torch.compile(program.module, fullgraph=True, dynamic=None if any_batch else False)


def flatten_outputs(outputs: Any, add: Callable[[Tensor], None]) -> None:
    """Calls ``add`` on every tensor of a nested structure, in order."""
    map_tensors(add, outputs)


def unflatten_outputs(outputs: Any, leaves: Sequence[Any]) -> Any:
    """The structure ``outputs`` of the IR with ``leaves`` in the place of its references."""
    queue = iter(leaves)
    return map_refs(lambda _: next(queue), outputs)


def _identifier(path: str) -> str:
    name = re.sub(r"\W", "_", path)
    return f"_{name}" if not name or name[0].isdigit() else name


__all__ = ["Program", "Ref", "build", "compile_inductor", "unflatten_outputs"]

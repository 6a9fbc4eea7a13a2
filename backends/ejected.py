"""The generated program as the text of a Python module that needs torch and the user's own files, and no scg.

Saved to a file, imported and called with the same tensors and seed, its ``forward`` gives the same value and the same
gradients as the compiled module.
"""

from __future__ import annotations

import base64
import inspect
import operator
import re
import textwrap
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from scg.backends import runtime
from scg.backends.batching import Mapped
from scg.backends.doubly import RefuseGradient, WeighPath
from scg.backends.draw_call import DrawCall
from scg.backends.log_ratio import RuntimeCall
from scg.backends.opaque_call import OpaqueCall
from scg.backends.parameter_check import ParameterCheck
from scg.backends.recorder import CustomFunction
from scg.backends.site_context import InputGradient, InputGradients, Variable
from scg.backends.torch_module import Program, unflatten_outputs
from scg.ir import Graph, Input, Param, TensorType

_SMALL = 64
"""Elements of the largest constant that is written as a literal."""

_INFIX = {
    operator.add: "+", operator.sub: "-", operator.mul: "*", operator.truediv: "/", operator.matmul: "@",
    operator.pow: "**", operator.gt: ">", operator.lt: "<", operator.ge: ">=", operator.le: "<=",
}  # fmt: skip
_METHODS = {
    "__floordiv__": "//", "__mod__": "%", "__and__": "&", "__or__": "|", "__xor__": "^", "__eq__": "==", "__ne__": "!=",
}  # fmt: skip
_REFLECTED = {"__rsub__": "-", "__rtruediv__": "/", "__rdiv__": "/", "__rpow__": "**", "__rmatmul__": "@"}

_OWNERS: tuple[tuple[str, Any], ...] = (
    ("torch", torch), ("F", F), ("torch.special", torch.special), ("torch.linalg", torch.linalg),
    ("torch.fft", torch.fft), ("torch._C._nn", torch._C._nn), ("torch.Tensor", Tensor),
)  # fmt: skip
"""Where a function of torch is looked for, by the name it is written with."""

_STANDARD = (
    ("from __future__ import annotations\n", r"\) -> "),
    ("import base64", r"\bbase64\."),
    ("import functools", r"\bfunctools\."),
    ("import math", r"\bmath\."),
    ("import zlib", r"\bzlib\."),
    ("from collections.abc import Callable, Sequence", r"\bSequence\["),
    ("from math import inf, nan", r"\b(inf|nan)\b"),
    ("from typing import Any", r"\bAny\b"),
)
_TORCH = (
    ("import torch", ""),
    ("import torch.nn.functional as F", r"\bF\."),
    ("from torch import Tensor", r"\bTensor\b"),
)
"""Lines of import, and the sign that the text needs them."""

_RESERVED = set("torch F Tensor Any Callable Sequence annotations base64 functools math zlib inf nan".split())
_HELPERS = (
    runtime.variable, runtime.input_gradient, runtime.input_gradients, runtime.weigh_path, runtime.refuse_gradient,
    runtime.loop_rows, runtime.call_opaque, runtime.log_prob_of_bits, runtime.log_ratio_of_bits,
    runtime.log_ratio_of_class, runtime.changes_in_parts, runtime.reach_of, runtime.factors_at_once,
)  # fmt: skip


def eject(program: Program, graph: Graph) -> str:
    """The module's text."""
    return _Ejector(program, graph).text()


class _Ejector:
    def __init__(self, program: Program, graph: Graph) -> None:
        self.program, self.graph = program, graph
        self.nodes = list(program.module.graph.nodes)
        fixed = _RESERVED | {helper.__name__ for helper in _HELPERS}
        self.taken = {node.name for node in self.nodes} | fixed
        """Names that are in use anywhere in the module."""
        self.local = {node: self._fresh(node.name) if node.name in fixed else node.name for node in self.nodes}
        """The variable of each node."""
        self.helpers: dict[str, str] = {}
        """Text of every function of torch alone that the program calls, by name."""
        self.leaves: dict[int, str] = {}
        """Names of the leaves' functions, by the id of the leaf."""
        self.made: list[str] = []
        self.imports: dict[tuple[str, str], str] = {}
        self.constants: dict[str, str] = {}

    def _fresh(self, base: str) -> str:
        name, n = base, 1
        while name in self.taken:
            name, n = f"{base}_{n}", n + 1
        self.taken.add(name)
        return name

    # -- the module -------------------------------------------------------------------------------------------------
    def text(self) -> str:
        body = [line for node in self.nodes for line in self._line(node)]
        arguments = [f"    {self.local[node]},  # {what}" for node, what in self._arguments()]
        head = ["def forward(", *arguments, "):"] if arguments else ["def forward():"]
        forward = "\n".join([*head, *(f"    {line}" for line in body)])
        made = "\n\n\n".join([*self.helpers.values(), *self.made, forward])
        constants = "\n".join(f"{name} = {text}" for name, text in self.constants.items())
        whole = f"{constants}\n{made}"
        standard = [line for line, sign in _STANDARD if re.search(sign, whole)]
        needed = [line for line, sign in _TORCH if re.search(sign, whole)]
        users = sorted(
            f"from {module} import {name}" + (f" as {alias}" if alias != name else "")
            for (module, name), alias in self.imports.items()
        )
        blocks = ["\n".join(standard), "\n".join(needed), "\n".join(users), constants]
        top = "\n\n".join(block for block in [self._docstring(), *blocks] if block)
        return f"{top}\n\n\n{made}\n"

    def _docstring(self) -> str:
        sites = ", ".join(f"{site.name} by {site.estimator}" for site in self.graph.sites.values() if site.estimator)
        name = re.sub(r"\W", "_", self.graph.name)
        sites = "".join(char for char in sites if char.isprintable() and char not in '"\\')
        return (
            f'"""One step of {name}, generated by scg{": " + sites if sites else ""}.\n\n'
            "``forward`` takes the tensors that it names, and returns what the model returns, with the surrogate\n"
            'in the place of the objective: call ``backward()`` on it.\n"""'
        )

    def _arguments(self) -> list[tuple[fx.Node, str]]:
        """The placeholders, and what each stands for."""
        inputs = {node.position: node for node in self.graph.of(Input)}
        params = {node.path: node for node in self.graph.of(Param)}
        given = [f"input {inputs[at].path}: {inputs[at].type}" for at in self.program.inputs]
        given += [f"{params[path].role} {path}: {params[path].type}" for path in self.program.captured]
        found = [node for node in self.nodes if node.op == "placeholder"]
        given += ["state of an estimator"] * (len(found) - len(given))
        return list(zip(found, given, strict=True))

    # -- one line ---------------------------------------------------------------------------------------------------
    def _line(self, node: fx.Node) -> list[str]:
        if node.op == "placeholder":
            return []
        if node.op == "output":
            (leaves,) = node.args
            names = [self._value(leaf) for leaf in leaves]  # type: ignore[union-attr]
            return [f"return {self._structure(unflatten_outputs(self.graph.outputs, [_Name(n) for n in names]))}"]
        if node.op == "get_attr":
            self.local[node] = self._constant(str(node.target))
            return []
        if isinstance(node.target, ParameterCheck) and not node.users:
            return []
        text = self._call(node)
        known = self.graph.nodes.get(node.name)
        where = f"  # {known.loc}" if known is not None and known.loc else ""
        return [f"{self.local[node]} = {text}{where}" if node.users else f"{text}{where}"]

    def _structure(self, outputs: Any) -> str:
        if isinstance(outputs, dict):
            return "{" + ", ".join(f"{key!r}: {self._structure(item)}" for key, item in outputs.items()) + "}"
        if isinstance(outputs, list):
            return "[" + ", ".join(map(self._structure, outputs)) + "]"
        if isinstance(outputs, tuple):
            return "(" + "".join(f"{self._structure(item)}, " for item in outputs).strip() + ")"
        return self._value(outputs)

    def _call(self, node: fx.Node) -> str:
        target, args, kwargs = node.target, node.args, node.kwargs
        if node.op == "call_method":
            own, rest = self._operand(args[0]), args[1:]
            if target in _METHODS and not kwargs:
                return f"{own} {_METHODS[str(target)]} {self._operand(rest[0])}"
            if target in _REFLECTED and not kwargs:
                return f"{self._operand(rest[0])} {_REFLECTED[str(target)]} {own}"
            return f"{own}.{target}({self._listed(rest, kwargs)})"
        return self._function(target, args, kwargs)

    def _function(self, target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
        """A call of ``target``, in the form that reads best."""
        if target in _INFIX:
            return f"{self._operand(args[0])} {_INFIX[target]} {self._operand(args[1])}"
        if target is operator.neg:
            return f"-{self._operand(args[0])}"
        if target is operator.getitem:
            return f"{self._operand(args[0])}[{self._index(args[1])}]"
        if target is getattr:
            return f"{self._operand(args[0])}.{args[1]}"
        if isinstance(target, Variable):
            return f"{self._helper(runtime.variable)}({self._listed(args, {})})"
        if isinstance(target, RefuseGradient):
            return f"{self._helper(runtime.refuse_gradient)}({self._listed((*args, target.text), {})})"
        if isinstance(target, WeighPath):
            return f"{self._helper(runtime.weigh_path)}({self._listed(args, {})})"
        if isinstance(target, InputGradient):
            return f"{self._helper(runtime.input_gradient)}({self._listed((*args, target.differentiable), {})})"
        if isinstance(target, InputGradients):
            return f"{self._helper(runtime.input_gradients)}({self._listed((*args, target.differentiable), {})})"
        if isinstance(target, CustomFunction):
            return f"{self._users(target.function)}.apply({self._listed(args, kwargs)})"
        return f"{self._name(target)}({self._listed(args, kwargs)})"

    def _name(self, target: Any) -> str:
        """How a function is written where it is called."""
        if isinstance(target, torch._ops.OpOverload):
            return str(target) if str(target).startswith("torch.") else f"torch.ops.{target}"
        owner = getattr(target, "__self__", None)
        if isinstance(owner, type) and issubclass(owner, torch.autograd.Function):
            return f"{self._users(owner)}.apply"
        if isinstance(target, RuntimeCall):
            return self._helper(target.function)
        if target in _HELPERS:
            return self._helper(target)
        name = getattr(target, "__name__", "")
        for prefix, owner in _OWNERS:
            if getattr(owner, name, None) is target:
                return f"{prefix}.{name}"
        if not (target.__module__ or "").startswith("scg."):
            return self._users(target)
        if id(target) not in self.leaves:
            opaque = isinstance(target, OpaqueCall)
            own = self.leaves[id(target)] = self._fresh(f"call_{name.strip('_')}" if opaque else name)
            lines = self._leaf(target)
            self.made.append(f"def {own}(*args):\n" + textwrap.indent("\n".join(lines), "    "))
        return self.leaves[id(target)]

    # -- leaves -----------------------------------------------------------------------------------------------------
    def _helper(self, function: Callable[..., Any]) -> str:
        text = self.helpers[function.__name__] = inspect.getsource(function).rstrip()
        for other in _HELPERS:
            if other.__name__ not in self.helpers and f"{other.__name__}(" in text:
                self._helper(other)
        return function.__name__

    def _leaf(self, leaf: Any) -> list[str]:
        """The body of a leaf's function."""
        if isinstance(leaf, Mapped):
            return self._mapped(leaf)
        if isinstance(leaf, OpaqueCall):
            return self._opaque(leaf)
        if isinstance(leaf, DrawCall):
            return self._draw(leaf)
        return [f"raise NotImplementedError({f'{leaf.__name__} cannot be written out: give it here'!r})"]

    def _mapped(self, leaf: Mapped) -> list[str]:
        flat: list[Any] = list(leaf.constants)
        for i, at in enumerate(leaf.where):
            flat[at] = _Name(f"t{i}")
        args, kwargs = torch.utils._pytree.tree_unflatten(flat, leaf.spec)
        names = ", ".join(f"t{i}" for i in range(len(leaf.where)))
        single = [f"def single({names}):", f"    return {self._function(leaf.target, args, kwargs)}", ""]
        if leaf.looped:
            loop = self._helper(runtime.loop_rows)
            return [*single, f"return {loop}(single, args, {leaf.axes!r}, {leaf.rows})"]
        return [*single, f'return torch.vmap(single, in_dims={leaf.axes!r}, randomness="different")(*args)']

    def _opaque(self, leaf: OpaqueCall) -> list[str]:
        helper, fn = self._helper(runtime.call_opaque), self._users(leaf.node.fn)
        call = f"{helper}({fn}, args, {leaf.batched!r}, {leaf.sizes!r}, {leaf.folded})"
        types = [type_ for type_ in leaf.types if isinstance(type_, TensorType)]
        kinds = ", ".join(f"({type_.dtype}, {str(type_.device)!r})" for type_ in types)
        lines = [
            f"outs = {call}",
            f"kinds = [{kinds}]",
            "outs = [torch.as_tensor(o).to(dtype=d, device=at) for o, (d, at) in zip(outs, kinds, strict=True)]",
        ]
        return [*lines, f"return {'tuple(outs)' if isinstance(leaf.node.type, tuple) else 'outs[0]'}"]

    def _draw(self, leaf: DrawCall) -> list[str]:
        template = leaf.template if leaf.template.base is None else leaf.template.base
        batch = len(leaf.template.batch_shape)
        given = []
        for i, name in enumerate(template.names):
            rank, lead = batch + leaf.template.event_dims[i], len(leaf.prefix)
            padded = f"args[{i}].detach()"
            if leaf.carries[i]:
                padded += f".reshape([*args[{i}].shape[:{lead}], *[1] * ({rank + lead} - args[{i}].dim()), "
                padded += f"*args[{i}].shape[{lead}:]])"
            given.append(f"{name.rpartition('.')[2]}={padded}")
        shape = [*leaf.prefix, *template.batch_shape]
        dist = f"{self._users(template.cls)}({', '.join(given)}, validate_args=False)"
        return [f"dist = {dist}", f"return dist.expand({shape!r}).sample({list(leaf.shape)!r})"]

    def _users(self, thing: Any) -> str:
        """The name under which something of another module is imported; a stand-in that raises if it cannot be."""
        module, path = thing.__module__, thing.__qualname__
        if "<" in path or module is None:
            if id(thing) not in self.leaves:
                own = self.leaves[id(thing)] = self._fresh(re.sub(r"\W", "_", thing.__name__))
                text = f"{path} of {module} is a local name: put the function here"
                self.made.append(f"def {own}(*args):\n    raise NotImplementedError({text!r})")
            return self.leaves[id(thing)]
        if module == "__main__":
            module = Path(inspect.getsourcefile(thing) or "main.py").stem
        root, _, rest = path.partition(".")
        if (module, root) not in self.imports:
            self.imports[module, root] = self._fresh(root)
        alias = self.imports[module, root]
        return f"{alias}.{rest}" if rest else alias

    # -- values -----------------------------------------------------------------------------------------------------
    def _constant(self, key: str) -> str:
        name = key.upper()
        if name not in self.constants:
            if name in self.taken:
                name = self._fresh(name)
            tensor = getattr(self.program.module, key).detach()
            device = "" if tensor.device.type == "cpu" else f", device={str(tensor.device)!r}"
            if tensor.numel() <= _SMALL:
                text = f"torch.tensor({tensor.tolist()!r}, dtype={tensor.dtype}{device})"
                if not tensor.numel():
                    text = f"torch.empty({list(tensor.shape)!r}, dtype={tensor.dtype}{device})"
            else:
                raw = tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes()
                packed = base64.b85encode(zlib.compress(raw, 9)).decode()
                text = f"torch.frombuffer(bytearray(zlib.decompress(base64.b85decode({packed!r}))), "
                text += f"dtype={tensor.dtype}).reshape({list(tensor.shape)!r})"
                text += f".to({str(tensor.device)!r})" if device else ""
            self.constants[name] = text
        return name

    def _listed(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
        return ", ".join([*map(self._value, args), *(f"{k}={self._value(v)}" for k, v in kwargs.items())])

    def _operand(self, value: Any) -> str:
        text = self._value(value)
        return f"({text})" if text.startswith("-") else text

    def _index(self, index: Any) -> str:
        if isinstance(index, tuple) and index:
            return ", ".join(map(self._index, index)) + ("," if len(index) == 1 else "")
        if isinstance(index, slice):
            ends = ["" if end is None else self._value(end) for end in (index.start, index.stop, index.step)]
            return ":".join(ends[:2] if not ends[2] else ends)
        return self._value(index)

    def _value(self, value: Any) -> str:
        """A constant argument as Python text, or the name of a node."""
        if isinstance(value, fx.Node):
            return self.local[value]
        if isinstance(value, (tuple, list)):
            items = ", ".join(map(self._value, value))
            if isinstance(value, list):
                return f"[{items}]"
            return f"({items},)" if len(value) == 1 else f"({items})"
        if isinstance(value, dict):
            return "{" + ", ".join(f"{key!r}: {self._value(item)}" for key, item in value.items()) + "}"
        if isinstance(value, slice):
            return f"slice({self._value(value.start)}, {self._value(value.stop)}, {self._value(value.step)})"
        if value is Ellipsis:
            return "..."
        if isinstance(value, torch.device):
            return f"torch.device({str(value)!r})"
        return repr(value)


class _Name:
    """Stands for a variable of the generated text."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __repr__(self) -> str:
        return self.text

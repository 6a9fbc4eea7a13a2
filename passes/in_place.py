"""What an in-place operation computes: the operation of the same result that writes nothing (``add`` for ``add_``)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from scg.errors import TraceError
from scg.ir import Node, Op, Ref
from scg.operations import bind
from scg.passes.rewriter import is_op

aten = torch.ops.aten

_FILLS = (aten.copy_, aten.fill_, aten.zero_)
"""Writes whose result does not depend on what was there."""


def is_write(node: Node) -> bool:
    """Does it write into an argument?"""
    schema: Any = getattr(node.target, "_schema", None) if isinstance(node, Op) else None
    return schema is not None and bool(schema.is_mutable)


def functional_form(node: Op) -> tuple[Callable[..., Any] | None, list[Ref]]:
    """The overload that computes what ``node`` writes (None: it copies its source), and the arguments written.

    Raises:
        TraceError: where there is none.
    """
    named = bind(node)
    schema: Any = node.target._schema  # type: ignore[attr-defined]
    outputs = [spec for spec in schema.arguments if spec.alias_info is not None and spec.alias_info.is_write]
    refs = [named[spec.name] for spec in outputs]
    if torch.Tag.inplace_view not in node.target.tags and all(isinstance(ref, Ref) for ref in refs):  # type: ignore[attr-defined]
        if is_op(node, *_FILLS):
            return None, refs
        wanted = [_parameter(spec) for spec in schema.arguments if not (spec.kwarg_only and spec in outputs)]
        for target in _overloads(schema.name.removeprefix("aten::")):
            given: Any = target._schema  # type: ignore[attr-defined]
            if not given.is_mutable and [_parameter(spec) for spec in given.arguments] == wanted:
                return target, refs
    raise TraceError(
        f"{node.loc}: {node.op_name} changes its argument in a way that cannot be written as a new value. "
        f"Use the operation that returns a new tensor."
    )


def _parameter(spec: Any) -> tuple[str, str]:
    return "self" if spec.name == "input" else spec.name, str(spec.type)  # `dropout_` names it so, `dropout` does not


def _overloads(name: str) -> Iterator[Callable[..., Any]]:
    """The overloads of the operation that an in-place or ``out=`` operation is named after."""
    if name.startswith("__i"):
        name = f"__{name.removeprefix('__i')}"
    elif not name.endswith("__"):
        name = {"normal_": "normal_functional"}.get(name, name.removesuffix("_"))
    packet = getattr(aten, name, None)
    for overload in packet.overloads() if packet is not None else ():
        yield getattr(packet, overload)


def functional_arguments(node: Op, target: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """``args`` and ``kwargs`` for ``target``: without ``out=``, and with defaults that the in-place form alone has."""
    specs = target._schema.arguments
    required = [spec.name for spec in specs if not (spec.kwarg_only or spec.has_default_value())]
    named = bind(node)
    args = (*node.args, *(named[name] for name in required[len(node.args) :] if name not in node.kwargs))
    return args, {name: value for name, value in node.kwargs.items() if name in {spec.name for spec in specs}}

"""Binds an operator of the IR to the public function of torch of the same meaning.

Calling an ATen overload object costs about a microsecond more, and in generated code ``torch.add`` is easier to read.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

import torch

from scg.backends.recorder import CustomFunction, record_call
from scg.operations import packet_name

_NOT_PUBLIC = {"to", "where", "index", "slice", "lift_fresh_copy", "_to_copy", "copy"}
"""Operators whose name means something else, or nothing, in public."""


def is_aten(target: Callable[..., Any]) -> bool:
    return isinstance(target, torch._ops.OpOverload) and target.namespace == "aten"


def public(target: Callable[..., Any]) -> Callable[..., Any]:
    """What to call for ``target``; what is no ATen operator is called as one leaf."""
    if not is_aten(target):
        leaf, owner = target, getattr(target, "__self__", None)
        if isinstance(owner, type) and issubclass(owner, torch.autograd.Function):
            leaf = CustomFunction(owner)
        return functools.partial(record_call, leaf)
    name = packet_name(target)
    if name is None or name in _NOT_PUBLIC:
        return target
    for owner in (torch, torch._C._nn, torch.Tensor):
        found = getattr(owner, name, None)
        if found is not None and not isinstance(found, types.FunctionType):
            return _checked(found, target)
    return target


def _checked(found: Callable[..., Any], target: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return found(*args, **kwargs)
        except TypeError:  # the public signature differs from the schema's
            return target(*args, **kwargs)

    return call

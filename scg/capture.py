"""What a model or function reaches beside its arguments: tensors, modules and plain Python values, by the user's names."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True)
class Captured:
    """Everything found, by path."""

    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    modules: Mapping[str, nn.Module] = field(default_factory=dict)


def captured(model: Callable[..., Any]) -> Captured:
    tensors: dict[str, Tensor] = {}
    modules: dict[str, nn.Module] = {}
    seen: set[int] = set()

    def walk(value: Any, path: str) -> None:
        if id(value) in seen:
            return
        seen.add(id(value))
        if isinstance(value, Tensor):
            tensors[path] = value
        elif isinstance(value, nn.Module):
            modules[path] = value
            for table in (value._parameters, value._buffers, value._modules, vars(value)):
                for key, item in list(table.items()):
                    if not key.startswith("_"):
                        walk(item, f"{path}.{key}" if path else key)
        elif isinstance(value, (list, tuple)):
            for i, item in enumerate(value):
                walk(item, f"{path}.{i}")
        elif isinstance(value, dict):
            for key, item in value.items():
                walk(item, f"{path}.{key}")
        elif isinstance(value, functools.partial):
            walk(value.func, path)
        elif isinstance(value, types.MethodType):
            walk(value.__self__, path)
        elif isinstance(value, types.FunctionType):
            for name, cell in zip(value.__code__.co_freevars, value.__closure__ or (), strict=True):
                walk(cell.cell_contents, name)
            for name in value.__code__.co_names:
                if name in value.__globals__:
                    walk(value.__globals__[name], name)

    walk(model, "")
    return Captured(tensors, modules)

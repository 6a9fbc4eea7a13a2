"""What a model or function reaches beside its arguments: tensors, modules and plain Python values, by the user's names.

A graph is right only as long as everything the trace could read is what it was: `Captured.unchanged` says so, at the
cost of a few tuple comparisons a module.
"""

from __future__ import annotations

import dataclasses
import dis
import functools
import sys
import types
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Transform

from scg import primitives
from scg.tracer_frames import is_local_file

_PLAIN = frozenset({
    int, float, bool, complex, str, bytes, type(None), type(Ellipsis), range,
    torch.dtype, torch.device, torch.Size, torch.layout, torch.memory_format,
})  # fmt: skip
"""Types whose values are compared; everything else is compared by identity."""

_LONGEST = 4096
"""Longer containers are data, not settings: they are compared by identity and length, and not searched."""

_MODULE_TABLES = ("_parameters", "_buffers", "_modules")
_HOOKS = ("_forward_pre_hooks", "_forward_hooks")
_SKIPPED = frozenset(vars(nn.Module())) - {"training"} | {"_cached_x_y"}
"""Attributes of torch's own bookkeeping; `_MODULE_TABLES` and `_HOOKS` are read by themselves."""

Reader = Callable[[], Hashable]
Container = dict[Any, Any] | list[Any]


@dataclass(frozen=True)
class Captured:
    """Everything found in one walk, by path: ``enc.0.weight``, ``theta``, ``config.lr``."""

    tensors: Mapping[str, Tensor]
    modules: Mapping[str, nn.Module]
    containers: Mapping[str, Container]
    """Attribute tables, lists and dicts that a call of the model may change."""
    caches: frozenset[str]
    """Paths of the containers that torch fills by itself: of its own modules, of distributions and transforms."""
    readers: tuple[Reader, ...]
    """Each gives the present values of one container, function or module."""
    alive: tuple[Any, ...]
    """What the readers compare by identity; kept alive, so that no other object takes its id."""
    values: tuple[Hashable, ...] = ()
    """`plain_values` at the time of the walk."""

    def plain_values(self) -> tuple[Hashable, ...]:
        """A fingerprint of every plain Python value, and of which tensors and modules there are, at present."""
        return tuple([read() for read in self.readers])

    def unchanged(self) -> bool:
        """Whether everything is still what it was at the time of the walk."""
        return self.plain_values() == self.values


def captured(model: Callable[..., Any]) -> Captured:
    """Walks everything ``model`` can reach without being given it.

    Modules and their attributes, closure cells, globals named in the code (nested functions and the methods of the
    user's own classes included), defaults, ``functools.partial``, bound ``self``, lists, dicts and plain objects.
    """
    walk = _Walk()
    walk.visit(model, "")
    buffers = {id(buffer) for module in walk.modules.values() for buffer in module._buffers.values()}
    fixed = [t for t in walk.tensors.values() if not isinstance(t, nn.Parameter) and id(t) not in buffers]
    if fixed := [tensor for tensor in fixed if not tensor.is_inference()]:
        # what is computed from them alone is computed once: a write in place must be noticed
        walk.readers.append(lambda: tuple([tensor._version for tensor in fixed]))
    return Captured(
        tensors=walk.tensors,
        modules=walk.modules,
        containers=walk.containers,
        caches=frozenset(walk.caches),
        readers=tuple(walk.readers),
        alive=(*walk.seen.values(), *walk.compared),
        values=tuple([read() for read in walk.readers]),
    )


@dataclass(frozen=True)
class Change:
    """One entry of a container that a call changed; `_MISSING` stands for no entry."""

    path: str
    key: Any
    before: Any
    after: Any

    @property
    def is_buffer(self) -> bool:
        """Whether it is a registered buffer of a module."""
        return self.path.rpartition(".")[2] == "_buffers"

    @property
    def name(self) -> str:
        """The user's name for the entry."""
        owner, _, last = self.path.rpartition(".")
        return _join(owner if last in _MODULE_TABLES else self.path, self.key)


_MISSING = object()


@contextmanager
def restored(found: Captured) -> Iterator[Callable[[], list[Change]]]:
    """Puts every captured container back on leaving; meanwhile the function given says what has changed."""
    before = {path: container.copy() for path, container in found.containers.items()}

    def changes() -> list[Change]:
        return [
            Change(path, key, then.get(key, _MISSING), now.get(key, _MISSING))
            for path, container in found.containers.items()
            for then, now in [(_items(before[path]), _items(container))]
            for key in {**then, **now}
            if then.get(key, _MISSING) is not now.get(key, _MISSING)
        ]

    try:
        yield changes
    finally:
        for change in changes():  # entry by entry: another thread may be running the same model
            container = found.containers[change.path]
            if isinstance(container, list):
                container[:] = before[change.path]
            elif change.before is _MISSING:
                del container[change.key]
            else:
                container[change.key] = change.before


def _items(container: Container) -> dict[Any, Any]:
    return dict(enumerate(container)) if isinstance(container, list) else container


class _Walk:
    """One walk; each object is visited once, under the first path that leads to it."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.modules: dict[str, nn.Module] = {}
        self.containers: dict[str, Container] = {}
        self.caches: set[str] = set()
        self.readers: list[Reader] = []
        self.seen: dict[int, Any] = {}
        self.compared: list[Any] = []

    def visit(self, value: Any, path: str) -> None:
        if type(value) in _PLAIN or id(value) in self.seen:
            return
        self.seen[id(value)] = value
        match value:
            case Tensor():
                self.tensors[self._free(path, self.tensors)] = value
            case nn.Module():
                self._module(value, path)
            case Distribution() | Transform():
                self.caches.add(self._table(vars(value), path))
            case list() | dict() | tuple() | set() | frozenset():
                self._container(value, path)
            case functools.partial():
                self.visit(value.func, path)
                self._container(value.args, _join(path, "args"))
                self._table(value.keywords, path)
            case types.MethodType():
                self.visit(value.__self__, path)
                self.visit(value.__func__, path)
            case types.FunctionType():
                self._function(value, path)
            case type():
                if _is_local_class(value):
                    self._class(value, path)
            case staticmethod() | classmethod() | property() | functools.cached_property():
                self.visit(getattr(value, "__func__", getattr(value, "fget", getattr(value, "func", None))), path)
            case types.ModuleType() | types.BuiltinFunctionType():
                pass
            case _:
                self._object(value, path)

    # -- kinds of holders ------------------------------------------------------------------------------------------
    def _module(self, module: nn.Module, path: str) -> None:
        self.modules[self._free(path, self.modules)] = module
        if isinstance(module, torch.jit.ScriptModule):
            return  # its attributes are not Python's
        attributes = vars(module)
        for name in _MODULE_TABLES:
            table = attributes[name]
            self.containers[_join(path, name)] = table
            self._compare(table, list(table))
            for key, item in table.items():
                self.visit(item, _join(path, key))
        parameters = [item for item in module._parameters.values() if item is not None]
        if parameters:
            self.readers.append(lambda: tuple([parameter.requires_grad for parameter in parameters]))
        hooks = [attributes[name] for name in _HOOKS]
        self.readers.append(lambda: tuple(map(len, hooks)))
        for table in hooks:
            for hook in table.values():
                self.visit(hook, path)
        table_path = self._table(attributes, path)
        if type(module).__module__.startswith("torch."):
            self.caches.add(table_path)
        self._methods(type(module), path)

    def _object(self, value: Any, path: str) -> None:
        """An object of the user's: settings, a trainer, a buffer of transitions."""
        settings = isinstance(value, types.SimpleNamespace) or dataclasses.is_dataclass(value)
        if hasattr(value, "__dict__") and (settings or _is_local_class(type(value))):
            self._table(vars(value), path)
            self._methods(type(value), path)

    def _class(self, cls: type, path: str) -> None:
        names = [name for name in vars(cls) if not name.startswith("__")]
        self._compare(vars(cls), names)
        for name in names:
            self.visit(vars(cls)[name], _join(path, name))
        for name in ("__call__", "__init__"):
            self.visit(vars(cls).get(name), path)

    def _methods(self, cls: type, path: str) -> None:
        for base in cls.__mro__:
            if _is_local_class(base) and id(base) not in self.seen:
                self.seen[id(base)] = base
                self._class(base, path)

    def _function(self, function: types.FunctionType, path: str) -> None:
        if function.__code__.co_filename == primitives.__file__:
            return  # an opaque function: what it reads, it reads at run time
        if not is_local_file(function.__code__.co_filename):
            self.visit(getattr(function, "__wrapped__", None), path)
            self._cells(function, path)
            return
        self._cells(function, path)
        self._container(function.__defaults__ or (), _join(path, "defaults"))
        self._table(function.__kwdefaults__ or {}, path)
        table = function.__globals__
        names = [name for name in _global_names(function.__code__) if name in table]
        self._compare(table, names)
        for name in names:
            item = table[name]
            if isinstance(item, types.ModuleType):
                self._python_module(item, function.__code__)
            else:
                self.visit(item, name)

    def _cells(self, function: types.FunctionType, path: str) -> None:
        cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
        filled = {name: cell for name, cell in cells.items() if _is_filled(cell)}
        if filled:
            contents = list(filled.values())
            self.readers.append(lambda: tuple([_key(cell.cell_contents) for cell in contents]))
        for name, cell in filled.items():
            self.visit(cell.cell_contents, _join(path, name))

    def _python_module(self, module: types.ModuleType, code: types.CodeType) -> None:
        """Of an imported module of the user's: the attributes that the code may name."""
        if is_local_file(getattr(module, "__file__", None) or "<frozen>"):
            names = [name for name in _all_names(code) if name in vars(module)]
            self._compare(vars(module), names)
            for name in names:
                self.visit(vars(module)[name], f"{module.__name__}.{name}")

    def _container(self, value: Any, path: str) -> None:
        short = len(value) <= _LONGEST
        if isinstance(value, dict) and short:
            self._table(value, path)
        else:
            if isinstance(value, (list, dict)):
                self.containers[self._free(path, self.containers)] = value
            self.readers.append(lambda: tuple(map(_key, value)) if short else len(value))
            for i, item in enumerate(value if short else ()):
                self.visit(item, _join(path, i))

    def _table(self, table: dict[Any, Any], path: str) -> str:
        """A dict whose values the model may read by key; returns the path it is registered by."""
        registered = self._free(path, self.containers)
        self.containers[registered] = table
        keys = [key for key in table if key not in _SKIPPED]
        self.readers.append(lambda: len(table))
        self._compare(table, keys)
        for key in keys:
            self.visit(table[key], _join(path, key))
        return registered

    def _compare(self, table: Mapping[Any, Any], keys: Sequence[Any]) -> None:
        """Adds a reader of these entries: type and value of plain ones, identity of others."""
        plain = [key for key in keys if type(table[key]) in _PLAIN]
        others = [key for key in keys if type(table[key]) not in _PLAIN]
        if plain:
            get = itemgetter(*plain, plain[0])  # the first one twice: always a tuple

            def read_plain() -> Hashable:
                try:
                    values = get(table)
                except KeyError:
                    return None
                return tuple(map(type, values)), values  # types first: a tensor there is never compared by value

            self.readers.append(read_plain)
        if others:
            get_others = itemgetter(*others, others[0])
            self.compared.extend(table[key] for key in others)

            def read_others() -> Hashable:
                try:
                    return tuple(map(id, get_others(table)))
                except KeyError:
                    return None

            self.readers.append(read_others)

    def _free(self, path: str, taken: Mapping[str, Any]) -> str:
        """``path``, numbered if another object has it."""
        n, free = 0, path
        while free in taken:
            n += 1
            free = f"{path}_{n}"
        return free


def _key(value: Any) -> Hashable:
    return (type(value), value) if type(value) in _PLAIN else id(value)


def _join(path: str, key: Any) -> str:
    return f"{path}.{key}" if path else str(key)


def _is_filled(cell: types.CellType) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:
        return False


@functools.cache
def _module_file(name: str) -> str:
    return getattr(sys.modules.get(name), "__file__", None) or ("<frozen>" if name in sys.builtin_module_names else "")


def _is_local_class(cls: type) -> bool:
    return is_local_file(_module_file(cls.__module__))


@functools.lru_cache(maxsize=1024)
def _global_names(code: types.CodeType) -> tuple[str, ...]:
    """Globals that the code reads, nested functions included."""
    names = {i.argval: None for i in dis.get_instructions(code) if i.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names.update(dict.fromkeys(_global_names(constant)))
    return tuple(names)


def _all_names(code: types.CodeType) -> tuple[str, ...]:
    names = dict.fromkeys(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names.update(dict.fromkeys(_all_names(constant)))
    return tuple(names)

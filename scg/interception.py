"""Sees what is asked of `torch.distributions` objects and of custom autograd functions, and leaves no trace afterwards.

One attribute on `Distribution` covers every subclass, a user's own too. It is there only while some thread is inside
`intercept`, and only that thread's look-ups reach its hook. `intercept_functions` does the same for
`torch.autograd.Function.apply`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch.autograd.function import Function, _SingleLevelFunction
from torch.distributions import Distribution

Hook = Callable[[Distribution, str], Any]
"""Given a distribution and the name of an attribute, the attribute to hand out."""

_lock = threading.Lock()
_threads_inside = 0
_local = threading.local()


def _getattribute(self: Distribution, name: str) -> Any:
    hook: Hook | None = getattr(_local, "hook", None)
    return object.__getattribute__(self, name) if hook is None else hook(self, name)


@contextmanager
def intercept(hook: Hook) -> Iterator[None]:
    """Sends every attribute look-up on a distribution made by this thread through ``hook``.

    The hook reads the ordinary attribute with ``object.__getattribute__``. The innermost ``intercept`` is in force.
    """
    global _threads_inside
    outer = getattr(_local, "hook", None)
    with _lock:
        _threads_inside += 1
        Distribution.__getattribute__ = _getattribute  # type: ignore[method-assign,assignment]
    _local.hook = hook
    try:
        yield
    finally:
        _local.hook = outer
        with _lock:
            _threads_inside -= 1
            if not _threads_inside:
                del Distribution.__getattribute__  # the slot wrapper of `object` is in force again, at its speed


FunctionHook = Callable[[type[Function], tuple[Any, ...]], Any]
"""Given a custom function and its arguments, the result of applying it; inside, ``apply`` is the ordinary one."""

_threads_with_functions = 0


def _apply(function: type[Function], *args: Any) -> Any:
    hook: FunctionHook | None = getattr(_local, "function_hook", None)
    if hook is None:
        return super(_SingleLevelFunction, function).apply(*args)  # type: ignore[misc]
    _local.function_hook = None
    try:
        return hook(function, args)
    finally:
        _local.function_hook = hook


@contextmanager
def intercept_functions(hook: FunctionHook) -> Iterator[None]:
    """Sends this thread's calls of custom `torch.autograd.Function`s through ``hook``.

    Patched below `Function.apply`, so that an alias taken earlier (``ste = STE.apply``) is seen too.
    """
    global _threads_with_functions
    outer = getattr(_local, "function_hook", None)
    with _lock:
        _threads_with_functions += 1
        _SingleLevelFunction.apply = classmethod(_apply)  # type: ignore[attr-defined]
    _local.function_hook = hook
    try:
        yield
    finally:
        _local.function_hook = outer
        with _lock:
            _threads_with_functions -= 1
            if not _threads_with_functions:
                del _SingleLevelFunction.apply  # type: ignore[attr-defined]

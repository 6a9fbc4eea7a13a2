"""Sees what is asked of `torch.distributions` objects while a thread wants to, and leaves no trace afterwards.

One attribute on `Distribution` covers every subclass, a user's own too. It is there only while some thread is inside
`intercept`, and only that thread's look-ups reach its hook.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

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

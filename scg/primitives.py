"""What a model may say beyond plain PyTorch: `sample`, `cost`, `depends`, `logmarginal`, `multisample`, `opaque`.

Outside a trace each of them does the plain thing. Inside, the handler of the current thread decides (the tracer, or
whatever replays the model).
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ParamSpec, Protocol, TypeVar

import torch
from torch import Tensor
from torch.distributions import Distribution

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True)
class OpaqueSpec:
    """What `opaque` was told about a function."""

    fn: Callable[..., Any]
    shape: Callable[..., Any] | tuple[Callable[..., Any], ...] | None = None
    dtype: torch.dtype | tuple[torch.dtype, ...] | None = None
    batch_dims: int = 0
    pure: bool = True


class Handler(Protocol):
    """Gives the primitives their meaning while it is active in a thread."""

    def sample(self, dist: Distribution, name: str | None, estimator: Any, value: Tensor | None) -> Tensor: ...

    def cost(self, value: Tensor, name: str) -> Tensor: ...

    def depends(self, value: Tensor, on: Tensor, dims: tuple[str, ...]) -> Tensor: ...

    def multisample(self, value: Tensor, alpha: float) -> Tensor: ...

    def logmarginal(self, value: Tensor, over: tuple[str, ...]) -> Tensor: ...

    def opaque(self, spec: OpaqueSpec, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any: ...


_local = threading.local()


def active_handler() -> Handler | None:
    """The handler of the current thread, if any."""
    return getattr(_local, "handler", None)


@contextmanager
def handling(handler: Handler | None) -> Iterator[None]:
    """Makes ``handler`` give the primitives their meaning, in this thread only."""
    previous = active_handler()
    _local.handler = handler
    try:
        yield
    finally:
        _local.handler = previous


def sample(
    dist: Distribution, name: str | None = None, *, estimator: Any = None, value: Tensor | None = None
) -> Tensor:
    """Draws from ``dist``: a named stochastic node of a compiled model.

    Args:
        dist: Any ``torch.distributions`` object.
        name: The site's name; by default that of the variable the draw is assigned to.
        estimator: Name or object of the gradient estimator for this site.
        value: An outcome to replay as if it had been drawn from ``dist`` (a logged action).

    Returns:
        A draw (or ``value``), of shape ``[*B, *E]``.
    """
    handler = active_handler()
    if handler is not None:
        return handler.sample(dist, name, estimator, value)
    if value is not None:
        return value
    return dist.sample()


def cost(value: Tensor, name: str) -> Tensor:
    """Names a term of the objective; the identity on ``value``."""
    handler = active_handler()
    return value if handler is None else handler.cost(value, name)


def multisample(value: Tensor, objective: str = "iwae", *, alpha: float = 0.0) -> Tensor:
    r"""Turns negative log weights into a bound over the K draws of ``scg.compile(…, samples=K)``.

    .. math:: -\frac{1}{1 - \alpha} \log \frac1K \sum_k w_k^{1 - \alpha}, \qquad \log w_k = -\mathtt{value}_k

    Burda, Grosse and Salakhutdinov 2016 (``"iwae"``, :math:`\alpha = 0`); Li and Turner 2016, eq. 7 (``"renyi"``). The
    bound is taken for each element of ``value``: keep independent examples apart, and sum or average them afterwards.
    Score-type sites below it get the baselines of VIMCO (Mnih and Rezende 2016). With one draw, and outside `compile`,
    it is ``value``.

    Args:
        value: Negative log weight of each example, ``[*B]``, such as ``-(log p(x, z) - log q(z))``.
        objective: ``"iwae"`` or ``"renyi"``.
        alpha: Order of the Renyi bound, below 1.
    """
    if objective not in ("iwae", "renyi"):
        raise ValueError(f"multisample(objective={objective!r}): use 'iwae' or 'renyi'")
    if alpha >= 1 or (objective == "iwae" and alpha != 0):
        raise ValueError(f"multisample(alpha={alpha}): below 1 for 'renyi', and 0 for 'iwae'")
    handler = active_handler()
    return value if handler is None else handler.multisample(value, alpha)


def logmarginal(value: Tensor, over: str | Sequence[str] | None = None) -> Tensor:
    r"""Sums finite latents out of a likelihood: ``-log p(x)`` from ``value``, which is ``-log p(x | z)``.

    .. math:: -\log E_z[\exp(-\mathtt{value})]

    The draws that ``value`` is computed from are summed over, exactly, by variable elimination: ``z`` comes from its
    prior, so that its probability needs no term of its own. Each element of ``value`` is a marginal of its own: keep
    independent examples apart, and sum or average them afterwards. Differentiable, to any order. Outside `compile` it
    is ``value``, of which ``-log p(x)`` is a lower bound in expectation.

    Args:
        value: Negative log likelihood of each example given its latents, ``[*B]``; write it as a sum of terms that
            each see few latents.
        over: Globs over the names of the sites to sum over; all that ``value`` depends on by default. Others stay
            outside of the logarithm, and may not depend on those inside.
    """
    globs = (over,) if isinstance(over, str) else tuple(over or ())
    handler = active_handler()
    return value if handler is None else handler.logmarginal(value, globs)


def depends(value: Tensor, on: Tensor, dims: Sequence[str] = ()) -> Tensor:
    """Declares that the draw ``on`` influences ``value`` in a way the program does not show; the identity on ``value``.

    Args:
        value: What is influenced, such as a logged reward.
        on: The value of the site.
        dims: For each leading dim shared by both, ``tied`` (index by index), ``causal`` (at or after) or ``mixed``;
            dims not named are mixed.
    """
    words = ("tied", "causal", "mixed")
    wrong = [word for word in dims if word not in words]
    if wrong:
        raise ValueError(f"depends(dims={tuple(dims)!r}): {wrong[0]!r} is none of {', '.join(words)}")
    handler = active_handler()
    return value if handler is None else handler.depends(value, on, tuple(dims))


def opaque(
    shape: Callable[..., Any] | tuple[Callable[..., Any], ...] | None = None,
    dtype: torch.dtype | tuple[torch.dtype, ...] | None = None,
    batch_dims: int = 0,
    pure: bool = True,
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorator for a Python function the compiler must not look into: a simulator step, a metric, a reward.

    Args:
        shape: Output shape as a function of the arguments (default: that of the first tensor); a tuple for several
            outputs.
        dtype: Output dtype (default: that of the first tensor); a tuple for several outputs.
        batch_dims: Leading dims that are independent of each other.
        pure: False for a stateful environment: called in program order, once a call, never dropped or rerun.
    """

    def wrap(fn: Callable[P, R]) -> Callable[P, R]:
        spec = OpaqueSpec(fn, shape, dtype, batch_dims, pure)

        @functools.wraps(fn)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            handler = active_handler()
            if handler is None:
                return fn(*args, **kwargs)
            result: R = handler.opaque(spec, args, kwargs)
            return result

        return call

    return wrap

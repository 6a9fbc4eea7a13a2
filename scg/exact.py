r"""Exact expectation and gradient of a finite program, by replaying the original model over every outcome.

.. math::
    L(\theta) = \sum_z P_\theta(z)\, \ell_\theta(z), \qquad
    \nabla L(\theta) = \sum_z \nabla \left( P_\theta(z)\, \ell_\theta(z) \right)

No graph is captured: the user's own Python runs once an outcome, so that tests of the compiler against these numbers
are not circular. Draws made under ``no_grad`` are data: averaged over, their probabilities not differentiated.
``rsample`` asks for the pathwise derivative: its noise is averaged over, with a probability free of parameters.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import (
    Bernoulli,
    Binomial,
    Categorical,
    Distribution,
    Independent,
    MixtureSameFamily,
    TransformedDistribution,
)
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from scg.capture import captured
from scg.errors import EstimatorError, TraceError
from scg.exact_marginals import Marginals, Seen
from scg.interception import intercept
from scg.primitives import OpaqueSpec, handling
from scg.tracer_frames import user_loc

MAX_OUTCOMES = 200_000
"""More joint outcomes than this are refused: at about a millisecond a run it would take minutes."""


def exact(model: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """The exact expected loss and its gradient, where every site has finite support.

    Args:
        model: a module or a function, as for `scg.compile`.
        *args, **kwargs: what the model is called with.

    Returns:
        The expected loss, and for each parameter that requires grad, by its dotted name, the gradient (zero where the
        loss does not depend on it).

    Example:
        >>> theta = nn.Parameter(torch.tensor(0.0))
        >>> def loss():
        ...     return (Bernoulli(logits=theta).sample() - 0.499) ** 2
        >>> value, grads = exact(loss)
        >>> print(f"{value:.6f} {grads['theta']:.6f}")
        0.250001 0.000500
    """
    return exact_within(MAX_OUTCOMES, model, args, kwargs)


def exact_within(
    most: int, model: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[Tensor, dict[str, Tensor]]:
    """`exact`, refused where there are more than ``most`` joint outcomes."""
    found = captured(model)
    params = {path: tensor for path, tensor in found.tensors.items() if tensor.requires_grad}
    expectation = 0.0
    gradient = {path: torch.zeros_like(tensor, dtype=torch.float64) for path, tensor in params.items()}
    dtype = torch.get_default_dtype()
    generator = torch.get_rng_state()
    watch: AbstractContextManager[Any] = _NamesOtherNoise()  # type: ignore[no-untyped-call]
    marginals = Marginals()
    together: Tensor | None = None

    def add(term: Tensor) -> None:
        if term.requires_grad and params:
            grads = torch.autograd.grad(term, list(params.values()), allow_unused=True)
            for path, grad in zip(params, grads, strict=True):
                if grad is not None:
                    gradient[path] += grad

    while marginals.incomplete:
        walk = Walk(most)
        while walk.more():
            with kept_state(found.modules.values()), torch.enable_grad():
                draws = Draws(walk, marginals)
                try:
                    with draws, watch:
                        loss = objective_of(model(*args, **kwargs))
                except Seen:
                    continue
                finally:
                    watch = nullcontext()  # it is costly: the first run is enough to name the operation
                dtype = loss.dtype
                term = draws.probability() * loss
                expectation += float(term.detach())
                if marginals.known:  # the terms share them
                    together = term if together is None else together + term
                else:
                    add(term)
        marginals.take()
    if together is not None:
        add(together)
    if not torch.equal(generator, torch.get_rng_state()):
        raise EstimatorError("on some outcomes the model draws noise that cannot be summed over.")
    return torch.tensor(expectation, dtype=dtype), {path: gradient[path].to(params[path].dtype) for path in params}


def objective_of(output: Any) -> Tensor:
    """The scalar that is minimised: the return value, of a tuple its first item, of a dict its ``"loss"``.

    A dataclass is as a dict.
    """
    if isinstance(output, Mapping):
        output = output.get("loss")
    elif is_dataclass(output):
        output = getattr(output, "loss", output)
    elif isinstance(output, (tuple, list)) and output:
        output = output[0]
    if not isinstance(output, Tensor) or output.ndim:
        what = f"a tensor of shape {tuple(output.shape)}" if isinstance(output, Tensor) else repr(output)
        raise TraceError(
            f"the objective is {what}, not a scalar tensor.\n"
            "  Return a scalar loss, a tuple with it first, or a dict or dataclass with it as 'loss'; reduce it first."
        )
    return output


class Walk:
    """Every sequence of choices of a program, depth first: each run repeats a prefix and goes one step further.

    >>> walk, seen = Walk(), []
    >>> while walk.more():
    ...     first = walk.choose(2)
    ...     seen.append((first, walk.choose(2)) if first else (first,))
    >>> seen
    [(0,), (1, 0), (1, 1)]
    """

    def __init__(self, most: int = MAX_OUTCOMES) -> None:
        self._most = most
        self._path: list[list[int]] = []  # [choice taken, number of choices] of each step
        self._step = 0
        self._runs = 0

    def more(self) -> bool:
        """Whether a run is left; if so, gets ready for it."""
        if self._runs:
            while self._path and self._path[-1][0] + 1 == self._path[-1][1]:
                self._path.pop()
            if not self._path:
                return False
            self._path[-1][0] += 1
        self._step = 0
        self._runs += 1
        if self._runs > self._most:
            raise EstimatorError(f"more than {self._most:,} joint outcomes: too many to sum one by one.")
        return True

    @property
    def outcomes(self) -> int:
        """How many runs there are if every run has as many choices as the present one."""
        return math.prod(choices for _, choices in self._path)

    def choose(self, count: int) -> int:
        """The choice, below ``count``, that this run takes at its next step."""
        if self._step == len(self._path):
            self._path.append([0, count])
            outcomes = math.prod(choices for _, choices in self._path)
            if self._runs == 1 and outcomes > self._most:
                raise EstimatorError(
                    f"{outcomes:,} joint outcomes and more are too many to sum one by one (at most {self._most:,}).\n"
                    "  Use fewer elements: a smaller batch, or fewer latents."
                )
        choice, choices = self._path[self._step]
        assert choices == count, "the program took another turn with the same draws: it has randomness of its own"
        self._step += 1
        return choice

    def choose_each(self, possible: Tensor) -> Tensor:
        """For each of the N columns of ``possible`` ([n, N], bool), the row taken.  # [N]"""
        options = [[row for row, yes in enumerate(column) if yes] for column in possible.T.tolist()]
        rest = self.choose(math.prod(map(len, options)))
        rows = []
        for option in options:
            rest, digit = divmod(rest, len(option))
            rows.append(option[digit])
        return torch.tensor(rows, dtype=torch.long)


class Draws:
    """While active, the draws of this thread follow a `Walk`, and their probabilities are multiplied up."""

    def __init__(self, walk: Walk, marginals: Marginals | None = None) -> None:
        self._walk = walk
        self._marginals = marginals
        self._calls = 0
        self._name: str | None = None
        self._names: list[str | None] = []  # of each draw, where the program gives one
        self._outcomes: list[Any] = []
        self._log_probs: list[Tensor] = []
        self._differentiate: bool | None = None  # inside a distribution's own code: what its caller asked for

    def probability(self) -> Tensor:
        """Of the draws made so far, differentiable where the program's draws are."""
        return torch.stack(self._log_probs).sum().exp() if self._log_probs else torch.ones(())

    def __enter__(self) -> None:
        self._contexts = (handling(self), intercept(self._attribute), _RandomFunctions(self))
        for context in self._contexts:
            context.__enter__()

    def __exit__(self, *error: Any) -> None:
        for context in reversed(self._contexts):
            context.__exit__(*error)

    # -- the primitives ------------------------------------------------------------------------------------------
    def sample(self, dist: Distribution, name: str | None, estimator: Any, value: Tensor | None) -> Tensor:
        if value is not None:
            raise self._replayed(f"site '{name}' replays a value" if name else "a site replays a value")
        self._name = name
        return dist.sample()

    def cost(self, value: Tensor, name: str) -> Tensor:
        return value

    def depends(self, value: Tensor, on: Tensor, dims: tuple[str, ...]) -> Tensor:
        raise self._replayed("scg.depends declares an influence outside the program")

    def multisample(self, value: Tensor, alpha: float) -> Tensor:
        return value

    def logmarginal(self, value: Tensor, over: tuple[str, ...]) -> Tensor:
        assert self._marginals is not None, "only `exact` sums over likelihoods"
        if over and None in self._names:
            raise EstimatorError(
                f"logmarginal(over={over!r}), at {user_loc()}: the draws before it need names.\n"
                "  Write scg.sample(dist, 'name')."
            )
        inside = [not over or any(fnmatch.fnmatchcase(str(n), glob) for glob in over) for n in self._names]
        draws = list(zip(inside, self._outcomes, self._log_probs, strict=True))
        given = tuple(outcome for within, outcome, _ in draws if not within)
        summed = tuple(outcome for within, outcome, _ in draws if within)
        log_p = sum((p for within, _, p in draws if within), start=torch.zeros(()))
        self._calls += 1
        return self._marginals.value(self._calls - 1, given, summed, log_p - value, value)

    def opaque(self, spec: OpaqueSpec, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not spec.pure:
            raise EstimatorError(
                f"{spec.fn.__qualname__}, called at {user_loc()}, has a state that replaying it would move.\n"
                "  Use pure=True for a function without memory."
            )
        args, kwargs = tree_map_only(Tensor, Tensor.detach, (args, kwargs))
        return tree_map_only(Tensor, Tensor.detach, spec.fn(*args, **kwargs))

    def _replayed(self, what: str) -> EstimatorError:
        return EstimatorError(
            f"{what}, at {user_loc()}: its other outcomes are unknown, so there is nothing exact to sum.\n"
            "  Take the expectation of a program that draws by itself."
        )

    # -- distributions ------------------------------------------------------------------------------
    def _attribute(self, dist: Distribution, name: str) -> Any:
        ordinary = object.__getattribute__(dist, name)
        if name == "sample":
            return lambda sample_shape=(): self._sample(dist, ordinary, sample_shape)
        if name == "rsample":
            return lambda sample_shape=(): self._rsample(dist, ordinary, sample_shape)
        return ordinary

    def _sample(self, dist: Distribution, ordinary: Callable[..., Tensor], sample_shape: Sequence[int]) -> Tensor:
        base = dist
        while isinstance(base, Independent):
            base = base.base_dist
        if base.has_enumerate_support:
            return self.draw(base, sample_shape)
        if isinstance(base, TransformedDistribution) and any(map(_has_gradient, base.transforms)):
            raise EstimatorError(
                f"the outcomes of {_name(dist)} move with a transform's parameters, at {user_loc()}.\n"
                "  Draw from its base distribution and apply the transform in the model."
            )
        if isinstance(base, (TransformedDistribution, MixtureSameFamily)):  # a fixed function of finite draws inside
            with self._inside(torch.is_grad_enabled()):
                return ordinary(torch.Size(sample_shape))
        raise EstimatorError(
            f"{_name(dist)}, drawn at {user_loc()}, has no finite support to sum over.\n"
            "  Compare with a finite distribution in its place, or with many `scg.gradient_samples`."
        )

    def _rsample(self, dist: Distribution, ordinary: Callable[..., Tensor], sample_shape: Sequence[int]) -> Tensor:
        with self._inside(False):
            return ordinary(torch.Size(sample_shape))

    @contextmanager
    def _inside(self, differentiate: bool) -> Iterator[None]:
        outer = self._differentiate
        self._differentiate = differentiate if outer is None else outer and differentiate
        try:
            yield
        finally:
            self._differentiate = outer

    def draw(self, dist: Distribution, sample_shape: Sequence[int] = ()) -> Tensor:
        """The next outcome of ``dist``, all its elements at once.  # [*S, *B, *E]"""
        differentiate = torch.is_grad_enabled() if self._differentiate is None else self._differentiate
        with torch.no_grad(), torch._C.DisableTorchFunction():
            try:
                support = dist.enumerate_support()  # [n, *B, *E]
            except NotImplementedError as error:  # such as total counts that differ
                raise EstimatorError(f"the outcomes of {type(dist).__name__} cannot be listed: {error}") from None
            n, batch = support.shape[0], dist.batch_shape
            possible = dist.log_prob(support).exp().reshape(n, -1)  # [n, B]
            # torch clamps probabilities to [eps, 1 - eps], so that an impossible outcome has this much
            possible = possible > 2 * torch.finfo(possible.dtype).eps
            copies = math.prod(sample_shape)
            rows = self._walk.choose_each(possible.repeat(1, copies)).reshape(copies, -1)  # [S, B]
            elements = support.reshape(n, batch.numel(), *dist.event_shape)
            value = elements[rows, torch.arange(batch.numel())]  # [S, B, *E]
            value = value.reshape((*sample_shape, *batch, *dist.event_shape))
        with torch.set_grad_enabled(differentiate), torch._C.DisableTorchFunction():
            self._log_probs.append(dist.log_prob(value).sum())
            self._outcomes.append(tuple(rows.flatten().tolist()))
            self._names.append(self._name)
            self._name = None
        return value


class _RandomFunctions(TorchFunctionMode):
    """Sends ``torch.bernoulli`` and its like to the distributions they draw from."""

    def __init__(self, draws: Draws) -> None:
        super().__init__()
        self._draws = draws

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        draw = _RANDOM_FUNCTIONS.get(func)
        return func(*args, **kwargs) if draw is None else draw(self._draws, *args, **kwargs)


def _bernoulli(draws: Draws, input: Tensor, *, generator: Any = None) -> Tensor:
    return draws.draw(Bernoulli(probs=input))


def _binomial(draws: Draws, count: Tensor, prob: Tensor, generator: Any = None) -> Tensor:
    most = int(count.max())
    if not bool((count == most).all()):
        raise EstimatorError(f"torch.binomial at {user_loc()} has several total counts: draw each on its own.")
    return draws.draw(Binomial(most, probs=prob))


def _multinomial(
    draws: Draws, input: Tensor, num_samples: int, replacement: bool = False, *, generator: Any = None
) -> Tensor:
    if num_samples > 1 and not replacement:
        raise EstimatorError(f"torch.multinomial without replacement, at {user_loc()}, is not a product of sites.")
    return draws.draw(Categorical(probs=input), (num_samples,)).movedim(0, -1)  # [*B, num_samples]


_RANDOM_FUNCTIONS: dict[Any, Callable[..., Tensor]] = {
    torch.bernoulli: _bernoulli,
    Tensor.bernoulli: _bernoulli,
    torch.binomial: _binomial,
    torch.multinomial: _multinomial,
    Tensor.multinomial: _multinomial,
}


class _NamesOtherNoise(TorchDispatchMode):
    """Refuses every operation that moves the random number generator."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **(kwargs or {}))
        before = torch.get_rng_state()  # attention carries the tag also where its dropout is off
        out = func(*args, **(kwargs or {}))
        if not torch.equal(before, torch.get_rng_state()):
            raise EstimatorError(
                f"{func} at {user_loc()} draws noise that cannot be summed over.\n"
                "  Call .eval() to switch dropout off, or pass the noise in as an argument."
            )
        return out


@contextmanager
def kept_state(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Restores buffers and attributes of ``modules`` at the end: a run must not see what the one before it left."""
    kept = [(module, dict(vars(module)), dict(module._buffers)) for module in modules]
    with kept_buffers(module for module, *_ in kept):
        try:
            yield
        finally:
            for module, attributes, buffers in kept:
                for table, content in ((module._buffers, buffers), (vars(module), attributes)):
                    table.clear()
                    table.update(content)


@contextmanager
def kept_buffers(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Restores the values of the buffers that ``modules`` have now: running statistics, moving averages."""
    kept = {buffer: buffer.detach().clone() for module in modules for buffer in module.buffers()}
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in kept.items():
                if not torch.equal(buffer, value):  # a write that changes nothing would look like a change
                    buffer.copy_(value)


def _has_gradient(thing: object) -> bool:
    return any(isinstance(value, Tensor) and value.requires_grad for value in vars(thing).values())


def _name(dist: Distribution) -> str:
    return f"{type(dist).__name__}{tuple(dist.batch_shape)}"

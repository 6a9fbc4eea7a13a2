"""Gradient estimates of one compiled call, one after the other, with their moments and their times."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from scg.exact import kept_buffers, objective_of
from scg.pipeline import CompiledModule


class Moments:
    """Mean and variance of a stream of gradients, by parameter and element, in float64 (Welford 1962)."""

    def __init__(self, like: Mapping[str, Tensor]) -> None:
        self.n = 0
        self.mean = {name: torch.zeros_like(t, dtype=torch.float64) for name, t in like.items()}
        self._squares = {name: torch.zeros_like(mean) for name, mean in self.mean.items()}

    def add(self, gradient: Mapping[str, Tensor]) -> None:
        """Takes in one more gradient."""
        self.n += 1
        for name, value in gradient.items():
            step = value - self.mean[name]
            self.mean[name] += step / self.n
            self._squares[name] += step * (value - self.mean[name])

    def variance(self) -> dict[str, Tensor]:
        """Of one gradient, the unbiased sample variance."""
        return {name: squares / max(self.n - 1, 1) for name, squares in self._squares.items()}

    def error(self) -> dict[str, Tensor]:
        """Standard error of the mean."""
        return {name: (variance / max(self.n, 1)).sqrt() for name, variance in self.variance().items()}


class Estimates:
    """Independent gradient estimates of one call, all from the same state of buffers and moving averages.

    Args:
        compiled: traced here if it is not.
        args, kwargs: what it is called with.
        warm_up: calls that are allowed to move that state before the first estimate: a moving average without a
            history is zero.
    """

    def __init__(
        self, compiled: CompiledModule, args: tuple[Any, ...], kwargs: Mapping[str, Any], warm_up: int = 0
    ) -> None:
        self.compiled, self._args, self._kwargs = compiled, args, kwargs
        self.params = model_parameters(compiled)
        self.moments = Moments(self.params)
        self.seconds: list[float] = []
        """Of each forward and backward pass."""
        for _ in range(warm_up):
            self.step()

    def step(self) -> dict[str, Tensor]:
        """One gradient estimate, which moves the state as a step of training does; it is not recorded."""
        objective = objective_of(self.compiled(*self._args, **self._kwargs))
        if not objective.requires_grad:
            return {name: torch.zeros_like(param) for name, param in self.params.items()}
        grads = torch.autograd.grad(objective, list(self.params.values()), allow_unused=True, materialize_grads=True)
        return dict(zip(self.params, grads, strict=True))

    def take(self, n: int) -> None:
        """Records ``n`` more estimates."""
        on_gpu = any(param.is_cuda for param in self.params.values())
        for _ in range(n):
            with kept_buffers([self.compiled]):
                start = time.perf_counter()
                gradient = self.step()
                if on_gpu:
                    torch.cuda.synchronize()
                self.seconds.append(time.perf_counter() - start)
            self.moments.add(gradient)


def original(compiled: CompiledModule) -> Callable[..., Any]:
    """The user's module or function."""
    return compiled._callable


def model_parameters(compiled: CompiledModule) -> dict[str, nn.Parameter]:
    """The model's parameters that require grad, by the model's own names."""
    return {name: param for name, param in compiled.model.named_parameters() if param.requires_grad}


@contextmanager
def untouched(*modules: nn.Module, seed: int) -> Iterator[None]:
    """Inside, draws follow ``seed``; afterwards the random number generator and all buffers are as before."""
    with torch.random.fork_rng(), kept_buffers(modules), torch.enable_grad():
        torch.manual_seed(seed)
        yield


def traced(compiled: CompiledModule, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> CompiledModule:
    """The module with its program for this call made, so that its state exists, and nothing run."""
    with torch.enable_grad():
        compiled._bound(args, dict(kwargs))
    return compiled

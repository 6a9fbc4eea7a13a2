"""A light watch on the gradient while a compiled module is trained."""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

import torch
from torch import Tensor

from scg.estimators.score_function import ScoreFunction
from scg.exact import kept_buffers, objective_of
from scg.ir import Graph, Sample
from scg.measure.draws import Moments, model_parameters, traced, untouched
from scg.pipeline import CompiledModule


class ScalarWriter(Protocol):
    """What TensorBoard's ``SummaryWriter`` has."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> Any: ...


class Monitor:
    """Running variance and signal-to-noise ratio of the gradient, and how much of its variance the baselines take.

    Call `step` after each ``backward()``: it reads the gradients, moves two running means, and every ``every`` steps
    takes ``draws`` more gradients at the same parameters, which nothing of the training sees.

    Args:
        compiled: the module that is trained.
        decay: of the running means.
        every: steps between two measurements; 0 for none.
        draws: gradient estimates of a measurement.

    Example:
        >>> import scg, torch
        >>> theta = torch.nn.Parameter(torch.tensor(0.3))
        >>> def loss(): return (torch.distributions.Bernoulli(logits=theta).sample() - 0.2) ** 2
        >>> loss_fn = scg.compile(loss, estimator="score_function", samples=2)
        >>> watch = scg.Monitor(loss_fn, every=1)
        >>> for _ in range(3):
        ...     loss_fn().backward()
        ...     watch.step()
        >>> sorted(watch.scalars())
        ['scg/baseline_fit', 'scg/gradient_norm', 'scg/running_snr', 'scg/running_variance', 'scg/snr', 'scg/variance']
    """

    def __init__(self, compiled: CompiledModule, *, decay: float = 0.95, every: int = 100, draws: int = 8) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"Monitor(decay={decay}) must be in [0, 1)")
        if every < 0 or draws < 2:
            raise ValueError(f"Monitor(every={every}, draws={draws}): every must be 0 or more, and draws 2 or more")
        self.compiled, self.decay, self.every, self.draws = compiled, decay, every, draws
        self.steps = 0
        self._mean: dict[str, Tensor] = {}
        self._square = 0.0
        self._found: dict[str, float] = {}

    def step(self, *args: Any, **kwargs: Any) -> None:
        """Takes in the gradients of the step just made; ``args`` are those of the call, for a measurement."""
        squared, mean_squared = 0.0, 0.0
        for name, param in model_parameters(self.compiled).items():
            if param.grad is None:
                continue
            gradient = param.grad.detach()
            mean = self._mean.setdefault(name, torch.zeros_like(gradient))
            mean.mul_(self.decay).add_(gradient, alpha=1 - self.decay)
            squared += float(gradient.square().sum())
            mean_squared += float(mean.square().sum())
        self.steps += 1
        self._square = self.decay * self._square + (1 - self.decay) * squared
        weight = 1 - self.decay**self.steps  # what the running means have gathered
        signal = mean_squared / weight**2
        noise = max(self._square / weight - signal, 0.0)
        self._found.update(gradient_norm=squared**0.5, running_variance=noise, running_snr=_ratio(signal, noise))
        if self.every and self.steps % self.every == 0:
            self._found.update(self._measure(args, kwargs))

    def scalars(self) -> dict[str, float]:
        """The latest figures.

        ``running_variance`` and ``running_snr`` come from the gradients of training, whose mean drifts; ``variance``,
        ``snr`` and ``baseline_fit`` (the share of the variance that the baselines take away, negative where they add
        some) from the last measurement.
        """
        return {f"scg/{name}": value for name, value in self._found.items()}

    def write(self, writer: ScalarWriter, step: int) -> None:
        """Hands `scalars` to a TensorBoard ``SummaryWriter``, or whatever has its ``add_scalar``."""
        for tag, value in self.scalars().items():
            writer.add_scalar(tag, value, step)

    def _measure(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, float]:
        compiled = self.compiled
        with compiled.frozen():
            graph = traced(compiled, args, kwargs).graph
            plain = without_baselines(graph)
            seed = int(torch.randint(2**62, (), generator=torch.Generator().manual_seed(self.steps)))
            with untouched(compiled, seed=seed):
                moments = self._moments(graph, args, kwargs)
                variance = _total(moments.variance())
                found = {
                    "variance": variance,
                    "snr": _ratio(sum(float(mean.square().sum()) for mean in moments.mean.values()), variance),
                }
                if plain is not None:
                    bare = _total(self._moments(plain, args, kwargs).variance())
                    found["baseline_fit"] = 1 - _ratio(variance, bare)
        return found

    def _moments(self, graph: Graph, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Moments:
        params = model_parameters(self.compiled)
        run, moments = self.compiled.variant(graph, args, kwargs), Moments(params)
        for _ in range(self.draws):
            with kept_buffers([self.compiled]):
                objective = objective_of(run(args, kwargs))
                grads = torch.autograd.grad(objective, [*params.values()], allow_unused=True, materialize_grads=True)
            moments.add(dict(zip(params, grads, strict=True)))
        return moments


def without_baselines(graph: Graph) -> Graph | None:
    """The graph with every score function bare; None where no site has a baseline."""
    bare = [
        dataclasses.replace(site, estimator=dataclasses.replace(site.estimator, baseline=None))
        for site in graph.of(Sample)
        if isinstance(site.estimator, ScoreFunction) and site.estimator.baseline is not None
    ]
    return graph.replace(*bare) if bare else None


def _total(by_parameter: dict[str, Tensor]) -> float:
    return sum(float(part.sum()) for part in by_parameter.values())


def _ratio(a: float, b: float) -> float:
    return a / b if b > 0 else float("inf")

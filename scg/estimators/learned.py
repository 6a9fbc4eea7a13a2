"""Learned baselines: value functions fitted in the same ``backward()``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from scg.estimators.base import Reads, SiteContext, SiteInfo
from scg.estimators.baselines import Baseline, RunningMean
from scg.estimators.targets import MonteCarlo, Target, in_units, misfit, target_of
from scg.estimators.value_nets import ValueNet, WithTarget, check_decay


@dataclass(frozen=True)
class Learned(Baseline):
    r"""A module's prediction of the cost-to-go, fitted by least squares in the same ``backward()``.

    Its parameters get the gradient of :math:`(G - b)^2` and nothing else; the model's parameters get none through it.
    Mnih and Gregor 2014; Weber et al. 2019.

    Args:
        module: maps the values it reads to ``[*elements]``, or to ``[*elements, 1]``; None for a small network.
        inputs: names of graph values it reads, which must not depend on the site; None for all tensor inputs. The small
            network reads the site's sufficient context (`Graph.context`) instead.
        target: what it is fitted to: `MonteCarlo`, `TD` or `TDLambda`. The baseline is unbiased with any of them.
        hidden: width of the small network.
        slow: decay of a slowly following copy that targets are made of; None for no copy.
    """

    module: nn.Module | None = None
    inputs: tuple[str, ...] | None = None
    target: Target = MonteCarlo()
    hidden: int = 32
    slow: float | None = None

    name: ClassVar[str] = "learned"
    learned: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_decay(self.name, self.slow)

    @property
    def reads(self) -> Reads:
        return "baseline" if self.module is None else self.inputs

    def make_state(self, site: SiteInfo, batch_dims: tuple[int, ...]) -> nn.Module:
        module = self.module or ValueNet(site, batch_dims, self.hidden, sees_outcome=False)
        return module if self.slow is None else WithTarget(module)

    def value(self, context: SiteContext) -> Tensor:
        predicted = self._predict(context)
        context.add(misfit(context, target_of(context, self, self.target), predicted))
        self.prediction(context)  # of the copy as it was, for the sites above
        if self.slow is not None and context.training:
            self._module(context).follow(self.slow)
        return predicted.detach()

    def prediction(self, context: SiteContext) -> Tensor:
        key = (context.site.name, "prediction")
        if key not in context.memo:
            context.memo[key] = self._predict(context, slow=True).detach()
        return context.memo[key]  # type: ignore[no-any-return]

    def _predict(self, context: SiteContext, *, slow: bool = False) -> Tensor:
        module = self._module(context)
        if isinstance(module, WithTarget):
            module = module.slow if slow else module.online
        if self.module is None:
            return in_units(context, module(context.read_nodes(module.names), context.value))
        predicted: Tensor = module(*context.read(self.inputs))
        if predicted.shape[-1:] == (1,) and predicted.dim() > len(context.site.element_shape):
            predicted = predicted.squeeze(-1)
        return in_units(context, predicted)

    def _module(self, context: SiteContext) -> Any:
        return context.state


@dataclass(frozen=True)
class InputDependent(Learned):
    r"""A learned baseline and a running mean of what it leaves over: NVIL's centring.

    Mnih and Gregor 2014, section 2.3. Its variance normalisation, which rescales the gradient, is the estimator `nvil`.

    Args:
        decay: of the running mean.
    """

    decay: float = 0.8

    name: ClassVar[str] = "input_dependent"

    def make_state(self, site: SiteInfo, batch_dims: tuple[int, ...]) -> nn.Module:
        return Centred(super().make_state(site, batch_dims), self.decay)

    def value(self, context: SiteContext) -> Tensor:
        found = super().value(context)
        rest: Tensor = context.state.residue(context.signal - found, moves=context.training)
        return found + rest

    def prediction(self, context: SiteContext) -> Tensor:
        key = (context.site.name, "centred")
        if key not in context.memo:
            context.memo[key] = super().prediction(context) + context.state.mean.read()
        return context.memo[key]  # type: ignore[no-any-return]

    def _module(self, context: SiteContext) -> Any:
        return context.state.inner


class Centred(nn.Module):
    """A value function, and running moments of what it leaves over."""

    def __init__(self, inner: nn.Module, decay: float) -> None:
        super().__init__()
        self.inner = inner
        self.mean, self.square = RunningMean((), decay), RunningMean((), decay)

    def residue(self, rest: Tensor, *, moves: bool) -> Tensor:
        """The running mean of earlier steps; takes in this one."""
        old = self.mean.read()
        if moves:
            self.mean.update(rest)
            self.square.update(rest**2)
        return old

    def scale(self) -> Tensor:
        """``max(1, standard deviation)`` of earlier steps."""
        variance = self.square.read() - self.mean.read() ** 2
        return torch.sqrt(variance.clamp(min=1.0))

r"""Gradients with a learned control variate: what `lax`, `relax`, `rebar`, `double_cv` and `rodeo` share.

The gradient in a distribution's own parameters is an explicit value :math:`\hat g_\phi` of the program. Its mean does
not depend on :math:`\phi`, so the gradient of its variance is that of its square, and one draw estimates it:

.. math:: \nabla_\phi \mathrm{Var}(\hat g_\phi) = E[\nabla_\phi \hat g_\phi^2]

(Grathwohl et al. 2018, section 3). It is added to the surrogate, where it reaches the control variate alone.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from scg.estimators.base import SiteContext, SiteInfo
from scg.estimators.extremes import finite


class ControlVariate(nn.Module):
    """Learned parts: temperature and scale of the relaxed cost, and a small network."""

    def __init__(self, temperature: float | None, scaled: bool, network: nn.Module | None) -> None:
        super().__init__()
        if temperature is not None:
            self.log_temperature = nn.Parameter(torch.tensor(math.log(temperature)))
        if scaled:
            self.scale = nn.Parameter(torch.ones(()))
        self.network = network

    @property
    def temperature(self) -> Tensor:
        return self.log_temperature.exp()

    def free(self, context: SiteContext, values: Tensor) -> Tensor:
        """The network at ``[R, *dims | *elements | *event]``: one number for all elements that one cost may see.

        Returns:
            ``[R, *dims | *elements]`` of size 1 along joined dims.
        """
        assert self.network is not None
        elements = len(context.site.element_shape)
        first = values.dim() - elements - context.site.event_ndim
        joined = [first + dim for dim in context.joined]
        alone = [axis for axis in range(first + elements) if axis not in joined]
        features = values.permute([*alone, *joined, *range(first + elements, values.dim())])
        features = features.reshape([*(values.shape[axis] for axis in alone), -1])
        weight = next(self.network.parameters())
        out: Tensor = self.network(features.to(weight.dtype)).to(values.dtype)
        return out.reshape([1 if axis in joined else values.shape[axis] for axis in range(first + elements)])


def small_network(site: SiteInfo, hidden: int) -> nn.Module:
    """A network of one hidden layer over all elements that one cost may see."""
    width = site.flips * math.prod(site.shape[len(site.element_shape) :])
    return nn.Sequential(nn.Linear(width, hidden), nn.Tanh(), nn.Linear(hidden, 1))


def surrogate_of(
    context: SiteContext, estimates: list[Tensor], parameters: list[Tensor], over: tuple[int, ...] = ()
) -> Tensor:
    """The estimates carried to the parameters, and in training their squares.  ``[*dims | *elements]``

    Args:
        context: of the site.
        estimates: gradients in each parameter, ``[*dims | *elements | event dims of the slot]``.
        parameters: the parameters they stand for.
        over: dims whose estimates depend on each other: the square of their mean counts.
    """
    rank = context.value.dim() - context.site.event_ndim
    total: Tensor | None = None
    for g, parameter in zip(estimates, parameters, strict=True):
        part = g.detach() * (finite(parameter) if parameter.dim() > rank else parameter)
        if context.training:
            part = part + (g.mean(over, keepdim=True) if over else g) ** 2
        part = part.flatten(rank).sum(-1) if part.dim() > rank else part
        total = part if total is None else total + part
    assert total is not None
    return total


def times(weight: Tensor, score: Tensor) -> Tensor:
    """``weight [*dims | *elements]`` times ``score [*dims | *elements | *slot]``."""
    return weight.reshape([*weight.shape, *[1] * (score.dim() - weight.dim())]) * score

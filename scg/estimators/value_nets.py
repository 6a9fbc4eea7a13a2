"""Networks for predictions of the cost-to-go, and how their input is laid out."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scg.estimators.base import SiteInfo


class ValueNet(nn.Module):
    """One hidden layer from the values of a site's sufficient context to a prediction for each of its elements.

    Along the data batch (element dim 0, where it is one) predictions are made row by row; all other dims of a value are
    features. A critic also sees the outcome of the element that it speaks of.
    """

    def __init__(self, site: SiteInfo, batch_dims: tuple[int, ...], hidden: int, *, sees_outcome: bool) -> None:
        super().__init__()
        elements = site.element_shape
        self.shapes = dict(site.context)
        self.names = tuple(self.shapes)
        self.rank, self.event = len(elements), site.event_ndim
        self.rows = 1 if 0 in batch_dims else 0
        self.batch = elements[0] if self.rows else None
        self.places = elements[self.rows :]
        width = sum(math.prod(self._features(shape)) for shape in self.shapes.values())
        count = math.prod(self.places)
        outcome = math.prod(site.shape[len(elements) :]) + (count if count > 1 else 0) if sees_outcome else 0
        self.net = nn.Sequential(
            nn.Linear(max(width + outcome, 1), hidden), nn.Tanh(), nn.Linear(hidden, 1 if sees_outcome else count)
        )
        self.sees_outcome = sees_outcome

    def forward(self, values: Sequence[Tensor], outcome: Tensor) -> Tensor:
        """Predictions, ``[*lead | *elements]``.

        Args:
            values: of the context, ``[*dims | *S]`` or ``[*S]``.
            outcome: ``[*lead | *elements | *event]``, of which a baseline takes the layout alone.
        """
        lead = outcome.shape[: outcome.dim() - self.rank - self.event]
        elements = outcome.shape[len(lead) : outcome.dim() - self.event]
        weight: Tensor = next(self.net.parameters(), next(self.net.buffers(), outcome))  # of a slow copy, buffers
        parts = []
        for value, shape in zip(values, self.shapes.values(), strict=True):
            by_row = self.rows and self._features(shape) != shape
            kept = value.shape[: value.dim() - len(shape)]
            rows = ([value.shape[len(kept)]] if by_row else [1]) if self.rows else []
            flat = value.to(weight.dtype).reshape([*[1] * (len(lead) - len(kept)), *kept, *rows, -1])
            parts.append(flat.expand([*lead, *elements[: self.rows], flat.shape[-1]]))
        nothing = 0 if self.sees_outcome else 1  # a layer wants a feature
        seen = torch.cat(parts, -1) if parts else weight.new_zeros([*lead, *elements[: self.rows], nothing])
        if not self.sees_outcome:
            predicted: Tensor = self.net(seen)  # [*lead | rows | places]
            return predicted.reshape([*lead, *elements]).to(_float(outcome, weight))
        hidden = self._hidden(seen, outcome.to(weight.dtype).reshape([*lead, *elements, -1]))
        return self.net[1:](hidden).squeeze(-1).to(_float(outcome, weight))  # type: ignore[no-any-return]

    def _hidden(self, seen: Tensor, outcome: Tensor) -> Tensor:
        """The first layer of a critic at the values seen, the outcome and a one-hot of its place, side by side.

        Term by term, since the values seen do not vary over the places.  ``[*lead | *elements, H]``

        Args:
            seen: ``[*lead | rows, S]``.
            outcome: ``[*lead | *elements, E]``.
        """
        first: Any = self.net[0]
        sizes = [seen.shape[-1], outcome.shape[-1]]
        weight: Tensor = first.weight
        bias: Tensor = first.bias
        of_seen, of_outcome, of_place = weight.split([*sizes, weight.shape[-1] - sum(sizes)], 1)
        shared: Tensor = F.linear(seen, of_seen, bias) if seen.shape[-1] else bias.expand([*seen.shape[:-1], -1])
        shared = shared.reshape([*shared.shape[:-1], *[1] * len(self.places), shared.shape[-1]])
        if of_place.shape[-1]:
            shared = shared + of_place.t().reshape([*self.places, -1])
        own: Tensor = outcome * of_outcome.squeeze(-1) if outcome.shape[-1] == 1 else F.linear(outcome, of_outcome)
        return own + shared

    def _features(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Dims of a value that are features of a row."""
        return shape[1:] if self.rows and shape[:1] == (self.batch,) else shape


def _float(outcome: Tensor, weight: Tensor) -> torch.dtype:
    return outcome.dtype if outcome.is_floating_point() else weight.dtype


def check_decay(name: str, slow: float | None) -> None:
    if slow is not None and not 0 <= slow < 1:
        raise ValueError(f"{name}: slow={slow} must lie in [0, 1)")


class WithTarget(nn.Module):
    """A network and a slow copy of it, whose predictions targets are made of: it has buffers, no parameters."""

    def __init__(self, online: nn.Module) -> None:
        super().__init__()
        self.online, self.slow = online, copy.deepcopy(online)
        for module in self.slow.modules():
            for name, parameter in list(module._parameters.items()):
                if parameter is not None:
                    del module._parameters[name]
                    module.register_buffer(name, parameter.detach().clone())

    def follow(self, decay: float) -> None:
        """Moves the copy: ``slow <- decay * slow + (1 - decay) * online``."""
        slow = dict(self.slow.named_buffers())
        for name, parameter in self.online.named_parameters():
            slow[name].mul_(decay).add_(parameter.detach(), alpha=1 - decay)

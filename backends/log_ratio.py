"""Changes of log probabilities where logits are moved along one direction, as leaves of the generated code."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from scg.backends import runtime


@dataclass(frozen=True)
class LogRatio:
    """A function of `runtime` that looks at the values it meets."""

    function: Callable[..., Tensor]
    __module__ = __name__

    @property
    def __name__(self) -> str:
        return self.function.__name__

    def fake(self, logits: Tensor, change: Tensor, weight: Tensor, outcome: Tensor, size: float | None) -> Tensor:
        return logits[..., :1] + change

    def __call__(self, logits: Tensor, change: Tensor, weight: Tensor, outcome: Tensor, size: float | None) -> Tensor:
        return self.function(logits, change, weight, outcome, size)


LOG_RATIO_OF_BITS = LogRatio(runtime.log_ratio_of_bits)
LOG_RATIO_OF_CLASS = LogRatio(runtime.log_ratio_of_class)

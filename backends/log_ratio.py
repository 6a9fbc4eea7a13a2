"""Changes of log probabilities where logits are moved along one direction, as leaves of the generated code."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from scg.backends import runtime


@dataclass(frozen=True)
class RuntimeCall:
    """A function of `runtime` that looks at the values it meets, and what it returns for fakes."""

    function: Callable[..., Tensor]
    fake: Callable[..., Tensor]
    __module__ = __name__

    @property
    def __name__(self) -> str:
        return self.function.__name__

    def __call__(self, *args: Any) -> Tensor:
        return self.function(*args)


def _ratio(logits: Tensor, change: Tensor, *rest: Any) -> Tensor:
    return logits[..., :1] + change


LOG_RATIO_OF_BITS = RuntimeCall(runtime.log_ratio_of_bits, _ratio)
LOG_RATIO_OF_CLASS = RuntimeCall(runtime.log_ratio_of_class, _ratio)

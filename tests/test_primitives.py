"""The words of the language outside of a trace, and the handler inside."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Bernoulli, Distribution, Normal

from scg.primitives import OpaqueSpec, active_handler, cost, depends, handling, logmarginal, multisample, opaque, sample


def test_outside_a_trace_they_do_the_plain_thing() -> None:
    torch.manual_seed(0)
    expected = Normal(torch.zeros(3), 1.0).sample()
    torch.manual_seed(0)
    assert torch.equal(sample(Normal(torch.zeros(3), 1.0), "z", estimator="reparam"), expected)
    value = torch.ones(3)
    assert sample(Bernoulli(torch.rand(3)), value=value) is value
    assert cost(value, "c") is value and depends(value, on=value, dims=("tied",)) is value

    @opaque(batch_dims=1)
    def score(x: Tensor, k: int = 2) -> Tensor:
        """Doc."""
        return x * k

    assert torch.equal(score(value, k=3), value * 3) and score.__doc__ == "Doc."


def test_depends_knows_its_words() -> None:
    with pytest.raises(ValueError, match="'tide' is none of tied, causal, mixed"):
        depends(torch.ones(2), on=torch.ones(2), dims=("tide",))


class Recording:
    def __init__(self) -> None:
        self.seen: list[str] = []

    def sample(self, dist: Distribution, name: str | None, estimator: Any, value: Tensor | None) -> Tensor:
        self.seen.append(f"sample {name}")
        return torch.zeros(())

    def cost(self, value: Tensor, name: str) -> Tensor:
        self.seen.append(f"cost {name}")
        return value

    def depends(self, value: Tensor, on: Tensor, dims: tuple[str, ...]) -> Tensor:
        self.seen.append(f"depends {dims}")
        return value

    def multisample(self, value: Tensor, alpha: float) -> Tensor:
        self.seen.append(f"multisample {alpha}")
        return value

    def logmarginal(self, value: Tensor, over: tuple[str, ...]) -> Tensor:
        self.seen.append(f"logmarginal {over}")
        return value

    def opaque(self, spec: OpaqueSpec, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.seen.append(f"opaque {spec.fn.__name__} {spec.batch_dims}")
        return spec.fn(*args, **kwargs)


def test_a_handler_is_for_its_thread_and_its_block() -> None:
    @opaque(batch_dims=1)
    def step(x: Tensor) -> Tensor:
        return x

    handler, elsewhere = Recording(), []
    with handling(handler):
        z = sample(Bernoulli(0.5), "z")
        cost(logmarginal(multisample(depends(step(z), on=z, dims=("mixed",))), "z*"), "c")
        thread = threading.Thread(target=lambda: elsewhere.append(active_handler()))
        thread.start()
        thread.join()
        with handling(None):
            sample(Bernoulli(0.5), "unseen")
    assert handler.seen == [
        "sample z", "opaque step 1", "depends ('mixed',)", "multisample 0.0", "logmarginal ('z*',)", "cost c"
    ]  # fmt: skip
    assert elsewhere == [None] and active_handler() is None

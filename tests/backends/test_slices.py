"""What estimators that rerun the program evaluate again: the slice below their site, counted in the generated code."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli, Normal

import scg

ABOVE = ("conv2d", "sin", "softmax")
BESIDE = ("cosh", "erf")
JOINED = ("linear", "relu")
"""Operations of one kind each: above the site, on a branch that it does not influence, and below it."""


class _Model(nn.Module):
    """A network above the draw, one below it, and one beside them whose cost the draw has no part in."""

    def __init__(self, family: str) -> None:
        super().__init__()
        self.family = family
        self.above, self.below, self.beside = nn.Conv2d(1, 2, 3), nn.Linear(8, 5), nn.Parameter(torch.ones(5))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.sin(self.above(x)).flatten(1)  # [B, 8]
        h = h.softmax(-1)
        q: Any = Bernoulli(logits=h) if self.family == "Bernoulli" else Normal(h, 1.0)
        z = q.sample()
        loss = torch.exp2(torch.relu(self.below(z))).sum(-1)
        return (loss + torch.erf(torch.cosh(self.beside)).sum()).mean()


def calls(estimator: str, family: str = "Bernoulli") -> Counter[str]:
    """How often each function is called by the generated code of one step."""
    x = torch.ones(3, 1, 4, 4)
    compiled = scg.compile(_Model(family), estimator=estimator, example_inputs=(x,))
    assert compiled._latest is not None
    found: Counter[str] = Counter()
    for node in compiled._latest.program.module.graph.nodes:
        if node.op in ("call_function", "call_method"):
            found[getattr(node.target, "__name__", str(node.target))] += 1
    return found


CASES = [
    ("local_expectation", "Bernoulli", 1, 2),
    ("hnca", "Bernoulli", 1, 2),
    ("indecater", "Bernoulli", 2, 2),
    ("bitflip", "Bernoulli", 2, 2),
    ("measure_valued", "Bernoulli", 1, 2),
    ("measure_valued", "Normal", 1, 2),
    ("stochastic_ad", "Bernoulli", 2, 2),
    ("disarm", "Bernoulli", 1, 1),
    ("rebar", "Bernoulli", 2, 2),
    ("relax", "Bernoulli", 4, 2),  # two more are its critic
    ("score_function", "Bernoulli", 1, 1),
]
"""Estimator, family, calls of the linear layer below the site and of what follows it."""


@pytest.mark.parametrize(("estimator", "family", "linear", "after"), CASES)
def test_only_the_slice_below_is_evaluated_again(estimator: str, family: str, linear: int, after: int) -> None:
    found = calls(estimator, family)
    assert [found[name] for name in (*ABOVE, *BESIDE)] == [1] * 5
    assert found["linear"] == linear, found
    assert found["relu"] == found["exp2"] == after, found

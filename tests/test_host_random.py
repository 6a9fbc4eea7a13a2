"""Random numbers of Python and of NumPy: a program would hold the ones that its trace met."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable

import numpy
import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli

import scg

LOGITS = nn.Parameter(torch.zeros(3))
GENERATOR, NUMPYS, OLD = random.Random(0), numpy.random.default_rng(0), numpy.random.RandomState(0)
draw_one = NUMPYS.random


class Teacher(nn.Module):
    """Teacher forcing, as sequence models do it."""

    def __init__(self) -> None:
        super().__init__()
        self.logits, self.random = nn.Parameter(torch.zeros(3)), random.Random(1)

    def forward(self) -> Tensor:
        z = Bernoulli(logits=self.logits).sample()
        return (z if self.random.random() < 0.5 else z.square()).sum()


def _times(number: Callable[[], float]) -> Callable[[], Tensor]:
    return lambda: Bernoulli(logits=LOGITS).sample().sum() * float(number())


@pytest.mark.parametrize(
    ("model", "line"),
    [
        (_times(lambda: random.random()), r":\d+"),
        (_times(lambda: random.choice([1, 2, 3])), r":\d+"),
        (_times(lambda: GENERATOR.gauss(0, 1)), r":\d+"),
        (_times(lambda: numpy.random.rand()), ""),
        (_times(lambda: NUMPYS.normal()), ""),
        (_times(lambda: OLD.uniform()), ""),
        (_times(lambda: draw_one()), ""),
        (Teacher(), r":\d+"),
    ],
    ids="module choice generator numpy numpys_generator old_one bound_method attribute".split(),
)
def test_it_is_refused_with_its_place(model: Callable[[], Tensor], line: str) -> None:
    with pytest.raises(scg.TraceError, match=rf"test_host_random.py{line}.*not PyTorch's"):
        scg.compile(model)()


def test_what_is_drawn_elsewhere_is_not_the_model_s() -> None:
    entered, done = threading.Event(), threading.Event()

    def others() -> None:
        entered.wait()
        random.random()
        done.set()

    def model() -> Tensor:
        entered.set()
        done.wait()
        return Bernoulli(logits=LOGITS).sample().sum()

    thread = threading.Thread(target=others)
    thread.start()
    scg.compile(model)().backward()
    thread.join()


def test_a_number_set_before_the_call_is_read_at_every_call() -> None:
    model = Teacher()
    model.random = None  # type: ignore[assignment]
    model.scale = 1.0  # type: ignore[assignment]
    model.forward = lambda: Bernoulli(logits=model.logits).sample().square().sum() * model.scale  # type: ignore
    compiled = scg.compile(model)
    for scale in (0.5, 2.0):
        model.scale = scale  # type: ignore[assignment]
        torch.testing.assert_close(compiled().item(), 1.5 * scale)

"""Log probabilities along one direction: against plain cross entropies, at every size of logits and of steps."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Bernoulli

import scg
from scg.backends import runtime, single_changes
from scg.estimators.hnca import HNCA

N, D, J = 5, 4, 131


def _parts(logits: float, weight: float, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, bits that follow them, and weights, up to these sizes."""
    x = torch.linspace(-1, 1, N * J, dtype=torch.float64).sin().reshape(N, J).flip(1) * logits / 0.8415
    w = torch.sin(torch.arange(1, 1 + D * J, dtype=torch.float64) ** 2).reshape(D, J) * weight
    return x.to(dtype), (x > x.roll(1, 0) * 0.1).to(dtype), w.to(dtype)


def _plain(logits: Tensor, bits: Tensor) -> Tensor:
    logits, bits = logits.double(), bits.double().expand_as(logits)
    return -F.binary_cross_entropy_with_logits(logits, bits, reduction="none").sum(-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [0.5, 30.0, 1e3])
def test_log_prob_of_bits(size: float, dtype: torch.dtype) -> None:
    logits, bits, _ = _parts(size, 1.0, dtype)
    found = runtime.log_prob_of_bits(logits, bits)
    tolerance = size * J * torch.finfo(dtype).eps  # rounding errors are of what is summed
    torch.testing.assert_close(found.double(), _plain(logits, bits), rtol=0, atol=tolerance)
    between = torch.full_like(bits, 0.3)  # no bits: any target
    found = runtime.log_prob_of_bits(logits, between)
    torch.testing.assert_close(found.double(), _plain(logits, between), rtol=0, atol=tolerance)


@pytest.mark.parametrize("count", [1, 112, 224])
def test_log_prob_of_as_many_bits(count: int) -> None:
    logits = torch.linspace(-5, 5, 3 * count, dtype=torch.float64).reshape(3, count)
    bits = (logits.cos() > 0).double()
    torch.testing.assert_close(runtime.log_prob_of_bits(logits, bits), _plain(logits, bits))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("logits", "weight"), [(1.0, 0.1), (30.0, 1.0), (30.0, 15.0), (200.0, 30.0), (1.0, 400.0)])
@pytest.mark.parametrize("known", [True, False])
def test_log_ratio_of_bits(logits: float, weight: float, known: bool, dtype: torch.dtype) -> None:
    x, bits, w = _parts(logits, weight, dtype)
    change = (1 - 2 * (torch.arange(N * D).reshape(N, D) % 3 == 0).to(dtype)) * 0.5
    for amount in (change,) if known else (change, change * torch.linspace(0.5, 1.5, D, dtype=dtype)):
        found = runtime.log_ratio_of_bits(x, amount, w, bits, 0.5 if known else None)
        moved = torch.addcmul(x.unsqueeze(-2).double(), amount.unsqueeze(-1).double(), w.double())
        expected = _plain(moved, bits.unsqueeze(-2)) - _plain(x, bits).unsqueeze(-1)
        scale = J * max(logits, weight)  # of what is summed: rounding errors are of that
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=scale * torch.finfo(dtype).eps)


@pytest.mark.parametrize("weight", [0.3, 15.0, 100.0])
@pytest.mark.parametrize("scale", [0.5, 30.0])
def test_log_ratio_of_class(scale: float, weight: float) -> None:
    x, _, w = _parts(scale, weight, torch.float64)
    index, change = torch.arange(N) * 20, 1 - 2 * (torch.arange(N * D).reshape(N, D) % 3 == 0).double()
    for amount in (change, change * torch.linspace(0.5, 1.5, D, dtype=torch.float64)):
        found = runtime.log_ratio_of_class(x, amount, w, index)
        moved = x.unsqueeze(-2) + amount.unsqueeze(-1) * w
        expected = (moved.log_softmax(-1) - x.log_softmax(-1).unsqueeze(-2))[torch.arange(N), :, index]
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_half_precision_is_computed_in_single() -> None:
    x, bits, w = _parts(3.0, 0.2, torch.float32)
    change = torch.ones(N, D)
    exact = runtime.log_ratio_of_bits(x, change, w, bits)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(runtime.log_ratio_of_bits(x, change, w, bits), exact)
    halves = [part.bfloat16() for part in (x, bits, change, w)]
    x, bits, change, w = (half.float() for half in halves)
    found = runtime.log_ratio_of_bits(halves[0], halves[2], halves[3], halves[1])
    torch.testing.assert_close(found, runtime.log_ratio_of_bits(x, change, w, bits))


@pytest.mark.parametrize("samples", [1, 2])
def test_many_rows_of_logits_are_never_written_out(samples: int) -> None:
    """Below bits: children that are bits, a class of a cross entropy of which one is ignored, pixels of a decoder."""
    first, second, last = nn.Linear(3, 4).double(), nn.Linear(4, 5).double(), nn.Linear(5, 3).double()
    x, y = torch.randn(6, 3, dtype=torch.float64), torch.tensor([0, 1, 2, -100, 1, 0])

    def model(x: Tensor, y: Tensor) -> Tensor:
        z = scg.sample(Bernoulli(logits=first(x)), "z")
        nll = -Bernoulli(logits=second(z)).log_prob((x[:, :1] > 0).double().expand(-1, 5)).sum(-1)
        z = scg.sample(Bernoulli(logits=second(z)), "y")
        return (nll + F.cross_entropy(last(z), y, reduction="none")).mean()

    for estimator in (HNCA(baseline=None), "local_expectation"):
        compiled = scg.compile(model, estimator=estimator, samples=samples, example_inputs=(x, y))
        code = str(compiled.code).split("def forward")[1]
        assert ("log_ratio_of_bits(" in code) and ("log_ratio_of_class(" in code), estimator
        torch.manual_seed(0)
        fast = torch.autograd.grad(compiled(x, y), [first.weight, second.weight])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(runtime, "reach_of", lambda change, weight, size: (0.0, math.inf))
            torch.manual_seed(0)
            torch.testing.assert_close(torch.autograd.grad(compiled(x, y), [first.weight, second.weight]), fast)


@pytest.mark.parametrize("span", [0.02, 0.2, 4.0])
def test_a_few_large_weights_do_not_part_the_products(span: float) -> None:
    torch.manual_seed(0)
    weight = span * torch.rand(3, 500)
    weight[:, 0] = 15.0
    logits, bits = torch.randn(4, 500), (torch.rand(4, 500) < 0.5).float()
    change = torch.where(torch.rand(4, 3) < 0.5, 1.0, -1.0)
    found = runtime.log_ratio_of_bits(logits, change, weight, bits, 1.0)
    wide, a = logits.double().unsqueeze(-2), change.double().unsqueeze(-1)
    moved = runtime.log_prob_of_bits(wide + a * weight.double(), bits.double().unsqueeze(-2))
    exact = moved - runtime.log_prob_of_bits(logits.double(), bits.double()).unsqueeze(-1)
    torch.testing.assert_close(found.double(), exact, rtol=2e-5, atol=2e-3)
    _, reach = runtime.reach_of(change, weight, 1.0)
    assert runtime.factors_at_once(weight.dtype, reach)[1] > 32  # for each logarithm, of twice the precision


@pytest.mark.parametrize(("rows", "count"), [(0, 5), (1, 3), (7, 9), (1500, 46)])
def test_factors_in_parts(rows: int, count: int) -> None:
    """No rows, and so many that not all factors are multiplied at once."""
    logits, bits = torch.randn(rows, count), (torch.rand(rows, count) < 0.5).float()
    weight, change = torch.randn(64, count), torch.where(torch.rand(rows, 64) < 0.5, 1.0, -1.0)
    found = runtime.log_ratio_of_bits(logits, change, weight, bits, 1.0)
    moved = torch.addcmul(logits.double().unsqueeze(-2), change.double().unsqueeze(-1), weight.double())
    expected = _plain(moved, bits.double().unsqueeze(-2)) - _plain(logits.double(), bits.double()).unsqueeze(-1)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-4)


def test_weights_that_are_not_numbers_give_what_is_not_a_number() -> None:
    weight = torch.tensor([[1.0, math.nan], [1.0, 2.0]])
    for function, outcome in (
        (runtime.log_ratio_of_bits, torch.ones(3, 2)),
        (runtime.log_ratio_of_class, torch.ones(3).long()),
    ):
        found = function(torch.zeros(3, 2), torch.ones(3, 2), weight, outcome, 1.0)
        assert found[:, 0].isnan().all() and found[:, 1].isfinite().all()


def test_all_flips_are_one_call_where_what_is_recorded_stays_small(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = nn.Linear(3, 4).double(), nn.Linear(4, 5).double()
    x = torch.randn(6, 3, dtype=torch.float64)

    def model(x: Tensor) -> Tensor:
        z = scg.sample(Bernoulli(logits=first(x)), "z")
        return -Bernoulli(logits=second(z)).log_prob((x[:, :1] > 0).double().expand(-1, 5)).sum(-1).mean()

    found = []
    for most, calls in ((500, 1), (100, 4)):  # bytes; the logits of all flips would take 960
        monkeypatch.setitem(single_changes.CHUNK_BYTES, "cpu", most)
        compiled = scg.compile(model, estimator="local_expectation", example_inputs=(x,))
        assert str(compiled.code).split("def forward")[1].count("log_ratio_of_bits(") == calls
        torch.manual_seed(0)
        found.append(torch.autograd.grad(compiled(x), [first.weight, second.weight]))
    torch.testing.assert_close(*found)

"""What eager execution calls instead of a program's own calls: the same bits, for values and for gradients."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli

import scg
from scg.backends.call_by_call import rewritten
from scg.pipeline import CompiledModule
from tests.problems import PROBLEMS


def _same_bits(compiled: CompiledModule, args: tuple[Any, ...]) -> str:
    """Asserts that a step does to the bit what the program does, and returns the text of its calls."""
    bound = compiled._bound(args, {})
    inputs = [args[at] for at in bound.program.inputs] + [table[key] for table, key in bound.tables]
    learn = [tensor for tensor in inputs if tensor.requires_grad]
    state = [tensor.clone() for tensor in bound.program.state]
    found = []
    for run in (bound.run, bound.program.module.forward):
        for tensor, before in zip(bound.program.state, state, strict=True):
            tensor.data.copy_(before)
        torch.manual_seed(1)
        out = run(*inputs, *bound.program.state)
        grads = torch.autograd.grad([o.sum() for o in out if o.requires_grad], learn, allow_unused=True)
        found.append([*out, *grads, *map(torch.clone, bound.program.state)])
    for ours, theirs in zip(*found, strict=True):
        assert (ours is None) == (theirs is None)
        assert ours is None or (torch.equal(ours, theirs) and ours.dtype == theirs.dtype)
    return str(rewritten(bound.program, any_batch=False)[0].code)


@pytest.mark.parametrize("estimator", ["score_function", "disarm", "local_expectation", "enumerate"])
@pytest.mark.parametrize("name", ["tied_batch", "chain", "mixed_batch", "unrolled_loop"])
def test_problems(name: str, estimator: str) -> None:
    problem = PROBLEMS[name]()
    samples = 2 if name == "mixed_batch" else 1
    compiled = scg.compile(problem.model, estimator=estimator, samples=samples, example_inputs=problem.calls[0])
    _same_bits(compiled, problem.calls[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_numbers_are_tensors_made_once(dtype: torch.dtype) -> None:
    weight = nn.Parameter(torch.linspace(-2, 2, 12, dtype=dtype).reshape(3, 4))

    def model(x: Tensor) -> Tensor:
        z = Bernoulli(logits=weight).sample()
        y = (x * 0.3 + z - 1 / 3) / 7 - (2 - x)
        y = torch.where(x > 0.5, y, -3) + torch.where(z > 0, float("inf"), y).clamp_max(1e30)
        return (y.clamp_min(0.25) + 0.1 * torch.add(z, 2, alpha=3)).sum()

    x = torch.randn(3, 4, dtype=dtype)
    code = _same_bits(scg.compile(model, estimator="score_function", samples=2, example_inputs=(x,)), (x,))
    numbers = [line for line in code.splitlines() if any(f" {op} " in line for op in "+-*/") and "." in line]
    assert not [line for line in numbers if not re.search(r"\bc(_\d+)?\b", line)], numbers


def test_numbers_beside_other_types_stay() -> None:
    weight = nn.Parameter(torch.randn(5))

    def model(counts: Tensor, half: Tensor) -> Tensor:
        z = Bernoulli(logits=weight).sample()
        return (z * (counts + 1) * 0.5).sum() + (half * 0.1).sum() + (z.mean(dtype=torch.float64) * 0.1).float()

    args = (torch.arange(5), torch.randn(5).bfloat16())
    code = _same_bits(scg.compile(model, estimator="score_function", samples=2, example_inputs=args), args)
    assert "torch.add(counts, 1)" in code and "torch.mul(half, 0.1)" in code and "mean(" in code


@pytest.mark.parametrize("over", [(), (0,), ((0, 2), True), (-1,)])
def test_means_are_sums_over_a_count(over: tuple[Any, ...]) -> None:
    weight = nn.Parameter(torch.randn(3, 4, 5))

    def model() -> Tensor:
        z = Bernoulli(logits=weight).sample()
        return (z.mean(*over) ** 2).sum() + torch.mean(weight * z, *over).exp().sum()

    code = _same_bits(scg.compile(model, estimator="score_function", samples=2, example_inputs=()), ())
    assert "mean(" not in code


def test_what_only_a_detached_value_is_read_of_has_no_gradient() -> None:
    weight = nn.Parameter(torch.randn(4))

    def model() -> Tensor:
        q = Bernoulli(probs=(weight * 2).sigmoid())
        z = q.sample()
        kept = (weight.exp() + 1).log()
        return (z * kept.detach()).sum() + (weight * weight).tanh().detach().sum() + (weight.exp() * z).sum()

    compiled = scg.compile(model, estimator="score_function", samples=2, example_inputs=())
    code = _same_bits(compiled, ())
    stopped = re.findall(r"(\w+) = weight.detach", code)
    assert stopped and f"torch.mul({stopped[0]}, {stopped[0]})" in code and f"torch.exp({stopped[0]})" not in code


def test_two_arguments_with_a_gradient_are_left_as_they_are() -> None:
    a, b = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(4))

    def model() -> Tensor:
        z = Bernoulli(logits=a).sample()
        return (z * (a * b).detach() + z * (a.exp() * 2).detach() * b).sum()

    code = _same_bits(scg.compile(model, estimator="score_function", samples=2, example_inputs=()), ())
    assert "torch.mul(a, b)" in code and "b.detach()" not in code


class Names(nn.Module):
    """Parameters called as the constants, and as calls that are made in another way."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("c", "c_1", "mean", "detach", "where"):
            self.register_parameter(name, nn.Parameter(torch.randn(3)))

    def forward(self) -> Tensor:
        own = dict(self.named_parameters())
        z = Bernoulli(logits=own["c"]).sample()
        table = torch.tensor([1.0, 2.0, 3.0])
        return (z * own["c_1"] * 0.5 + table * z * 0.25 + own["mean"] * own["detach"] * own["where"]).sum()


def test_parameters_called_as_something_else() -> None:
    _same_bits(scg.compile(Names(), estimator="score_function", samples=2, example_inputs=()), ())


def test_any_batch_size() -> None:
    weight = nn.Parameter(torch.randn(3))

    def model(x: Tensor) -> Tensor:
        z = Bernoulli(logits=x * weight).sample()
        return (((z - 0.5) * weight + 0.3) ** 2).mean(0).sum()

    compiled = scg.compile(model, estimator="score_function", samples=2, dynamic=True)
    plain = scg.compile(model, estimator="score_function", samples=2)
    for size in (4, 9, 17):
        x = torch.randn(size, 3)
        torch.manual_seed(0)
        loss = compiled(x)
        torch.manual_seed(0)
        expected = plain(x)
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(torch.autograd.grad(loss, [weight]), torch.autograd.grad(expected, [weight]))
    assert len({id(bound) for bound in compiled._programs.values()}) == 1

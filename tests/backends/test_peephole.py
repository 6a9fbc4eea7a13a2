"""Recorded calls are the simpler ones of equal value: what a step does not have to do."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributions import Bernoulli, Categorical, Geometric, Normal, kl_divergence
from torch.utils._python_dispatch import TorchDispatchMode

import scg
from scg.backends.recorder import Recorder


def _code(model: Any, *args: Tensor, **options: Any) -> str:
    compiled = scg.compile(model, example_inputs=args, **options)
    compiled(*args).backward()
    return str(compiled.code).split("def forward")[1]


def test_a_sum_of_negated_elements_is_negated_once_and_twice_is_nothing() -> None:
    weight, x = nn.Parameter(torch.randn(5, 3)), torch.ones(4, 5)

    def model(x: Tensor) -> Tensor:
        z = Bernoulli(logits=x @ weight).sample()
        return (-Bernoulli(logits=z @ weight.t()).log_prob(x).sum(-1)).mean()

    code = _code(model, x, estimator="score_function", samples=2)
    negated = re.findall(r"(?:= -|neg\()(\w+)", code)
    assert "binary_cross_entropy_with_logits" in code and not [name for name in negated if name.startswith("log_prob")]


def test_tables_are_made_once_and_equal_slices_are_shared() -> None:
    logits, table = nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(3))

    def model() -> Tensor:
        q = Categorical(logits=logits)
        z = q.sample()
        return (table[z] ** 2 + q.log_prob(z)).mean()

    for estimator in ("enumerate", "unordered_set"):
        code = _code(model, estimator=estimator)
        assert "torch.tensor(" not in code and "movedim((), [])" not in code
        for line in (call for call in code.splitlines() if "gather(" in call):
            assert code.count(line.split("=", 1)[1].strip()) == 1, line


def test_a_masked_write_into_a_copy_is_a_choice() -> None:
    logits = nn.Parameter(torch.tensor([0.3, 20.0, -1.0], dtype=torch.float64))

    def model() -> Tensor:
        q = Geometric(logits=logits)
        z = q.sample()
        return (q.log_prob(z) + q.log_prob(z + 1)).sum()

    compiled = scg.compile(model, estimator="score_function", example_inputs=())
    torch.manual_seed(0)
    found = compiled()
    torch.manual_seed(0)
    assert float(found.detach()) == float(model().detach())


def test_a_mean_over_classes_stays_one_kernel_with_one_weight() -> None:
    weight, y = nn.Parameter(torch.randn(5, 3)), torch.tensor([0, 2, 1, 1])

    def model(y: Tensor) -> Tensor:
        z = Bernoulli(logits=weight.expand(4, 5, 3).sum(-1)).sample()
        return torch.nn.functional.cross_entropy(z @ weight, y)

    code = _code(model, y, estimator="score_function", samples=2)
    assert "mapped" not in code and "ones_like" not in code and "zeros(" not in code


def test_a_standard_prior_is_numbers_and_normalised_logits_one_kernel() -> None:
    loc, logits = nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(4, 3))

    def model() -> Tensor:
        z = Normal(loc, loc.exp()).rsample()
        prior = Normal(torch.zeros_like(z), 2 * torch.ones_like(z))
        return (-prior.log_prob(z)).mean() + Categorical(logits=logits).entropy().mean()

    code = _code(model)
    assert not re.search("(ones|zeros|full)_like|logsumexp", code) and code.count("isfinite") == 0
    assert code.count("> 0.0") == 1  # the scale of the prior is known to be positive
    compiled = scg.compile(model, example_inputs=())
    found = []
    for loss in (compiled, model):
        torch.manual_seed(0)
        found.append(torch.autograd.grad(loss(), [loc, logits]))
    torch.testing.assert_close(*found)


def _recorded(calls: Callable[[Tensor], Tensor], x: Tensor) -> str:
    """The code that is recorded, which finds the same value and gradient."""
    recorder = Recorder(FakeTensorMode(allow_non_fake_inputs=False))
    fake = recorder.placeholder("x", x)
    with recorder.fake_mode, recorder:
        out = calls(fake)
    recorder.graph.output(recorder.node(out))
    recorder.graph.eliminate_dead_code(
        lambda node: node.op in ("placeholder", "output") or node.meta.get("effect", False)
    )
    root = nn.Module()
    for name, constant in recorder.constants.items():
        root.register_buffer(name, constant)
    found = [fx.GraphModule(root, recorder.graph)(x), calls(x)]
    if x.requires_grad:
        found = [(out.detach(), torch.autograd.grad(out.sum(), x)) for out in found]
    torch.testing.assert_close(*found)
    return str(recorder.graph.python_code("self").src)


def test_a_filled_tensor_is_a_number_until_it_is_written_into() -> None:
    def calls(x: Tensor) -> Tensor:
        one, moved, other = torch.ones_like(x), torch.full_like(x, 2.0), torch.zeros_like(x)
        moved.add_(1)
        other[x > 0] = 3.0
        wide = torch.full((2, 3), 5.0)  # the first operand is smaller
        known = (x - one) + x * torch.zeros_like(x)
        return known + (x - one.log()) * (2 * one) / one.exp() + moved + x * other + (x + wide) * (one > 0).all()

    _recorded(calls, torch.tensor([0.5, -1.5, 2.5]))


def test_what_is_negated_twice_or_changed_by_nothing_is_left_out() -> None:
    def calls(x: Tensor) -> Tensor:
        minus = -x
        view = minus.detach().reshape(1, 3)
        return (view * -1.0 / 1.0 + minus) - view.squeeze(0) + (view + 0.5) + (minus + 2.0 * x)

    code = _recorded(calls, torch.tensor([0.5, -1.5, 2.5]))
    assert code.count(" = -") == 1 and "torch.neg" not in code  # of the one that a number is added to
    assert "/" not in code and "-1" not in code

    def written(x: Tensor) -> Tensor:
        y = x + 1
        view = (-y).reshape(1, 3)
        y.add_(1)
        return y - view

    _recorded(written, torch.tensor([0.5, -1.5, 2.5]))


def test_of_what_is_gathered_alone_is_computed() -> None:
    def calls(x: Tensor) -> Tensor:
        index = torch.tensor([[3], [7]])
        wide = torch.sigmoid(x.expand(2, 8)) - x.exp() / x[:1]
        return wide.gather(1, index) + torch.tanh(wide).gather(-1, index.expand(2, 4)).sum()

    code = _recorded(calls, nn.Parameter(torch.linspace(0.1, 2, 8)))
    assert code.count(".gather(") == 3  # of x, of what is expanded only then, and of half of all
    assert re.search(r"sigmoid\(gather\w*\)", code) and re.search(r"tanh\(sub\w*\)", code)


def test_calls_on_detached_arguments_share_those_with_gradient() -> None:
    def calls(x: Tensor) -> Tensor:
        with_gradient, fixed = torch.sigmoid(x), x.detach()
        found = with_gradient + torch.sigmoid(fixed) + torch.exp(fixed)
        written = torch.sin(x)
        written.add_(1)
        return found + torch.exp(x) + torch.sin(fixed) + written

    code = _recorded(calls, nn.Parameter(torch.tensor([0.5, -1.5, 2.5])))
    assert [code.count(f"torch.{name}(") for name in ("sigmoid", "exp", "sin")] == [1, 2, 2]


def test_a_divergence_is_summed_once_for_all_draws() -> None:
    weight, prior = nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.zeros(3))

    def model(x: Tensor) -> Tensor:
        q = Bernoulli(logits=x @ weight)
        z = q.sample()
        return (z.sum(-1) ** 2 + kl_divergence(q, Bernoulli(logits=prior.expand_as(z))).sum(-1)).mean()

    code = _code(model, torch.ones(5, 4), estimator="score_function", samples=7)
    assert "mapped" not in code and ".expand([5, 3])" in code


class Uniforms(TorchDispatchMode):
    """Makes every uniform number this one."""

    def __init__(self, value: float) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._value = value

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        return out.fill_(self._value) if func is torch.ops.aten.rand_like.default else out


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_many_bits_are_drawn_by_comparison_with_uniform_numbers(dtype: torch.dtype) -> None:
    logits = nn.Parameter(torch.linspace(-40, 40, 2048, dtype=dtype))

    def model() -> Tensor:
        return Bernoulli(logits=logits).sample().square().sum() + logits.sum()

    compiled = scg.compile(model, estimator="score_function", samples=3, example_inputs=())
    assert "torch.bernoulli" not in str(compiled.code) and ".rand_like" in str(compiled.code)
    for u in (0.0, 1e-17, 0.25, 0.5, 1 - 2**-53):
        with Uniforms(u):
            found = compiled() - logits.sum()
        expected = (u < logits.sigmoid().double()).sum().to(dtype)
        torch.testing.assert_close(found, expected)
    torch.manual_seed(0)
    bits = torch.stack([compiled() - logits.sum() for _ in range(200)])
    p = logits.sigmoid()
    error = (p * (1 - p)).sum().div(600).sqrt()
    assert abs(bits.mean() - p.sum()) < 4 * error


def test_draws_that_may_be_refused_few_and_fused_ones_stay_calls() -> None:
    p, few = nn.Parameter(torch.full((2048,), 0.5)), nn.Parameter(torch.zeros(100))

    def of_numbers() -> Tensor:
        return Bernoulli(probs=p).sample().sum()

    def of_few() -> Tensor:
        return Bernoulli(logits=few).sample().sum()

    for model in (of_numbers, of_few):
        assert "rand_like" not in str(scg.compile(model, estimator="score_function", example_inputs=()).code)


def test_a_probability_that_is_no_number_draws_none() -> None:
    logits = nn.Parameter(torch.zeros(2048))
    compiled = scg.compile(lambda: Bernoulli(logits=logits).sample().sum(), estimator="score_function")
    with torch.no_grad():
        assert 800 < compiled() < 1250
        logits[7] = float("nan")
        assert compiled().isnan()


@pytest.mark.parametrize("sites", [1, 6])
def test_score_terms_are_summed_once(sites: int) -> None:
    weight = nn.Parameter(torch.randn(sites, 5))

    def model() -> Tensor:
        return torch.stack([(Bernoulli(logits=row).sample() ** 2).sum() for row in weight]).prod()

    code = _code(model, estimator="score_function", samples=2)
    terms = [line for line in code.splitlines() if "_term" in line.split("=")[0]]
    assert terms and not [line for line in terms if "sum(" in line]
    assert len(re.findall(r"\bloss\w* = \w+\.sum\(\)", code)) == 1


def test_a_sum_of_what_was_written_into_stays() -> None:
    recorder = Recorder(FakeTensorMode())
    x = recorder.placeholder("x", torch.ones(3, 4))
    with recorder.fake_mode, recorder:
        for whole in (x * 2, (x * 2).t()):
            total = whole.sum(0)
            assert recorder.peephole.summed(total) is whole
            (whole if whole.is_contiguous() else whole.t()).add_(1)
            assert recorder.peephole.summed(total) is total

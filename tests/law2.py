"""Law 2 without Monte Carlo: an estimator summed over all its own draws, weighted by their probabilities.

    sum over draws d of P(d) * estimate(d)  ==  scg.exact(model)

The draws are forced where they reach ATen, so that the compiled module needs no hook and may draw as it likes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import scg
from scg.capture import captured
from scg.exact import Walk, exact, kept_buffers, objective_of
from tests.problems import Problem

aten = torch.ops.aten


class ForcedDraws(TorchDispatchMode):
    """Makes finite random operations follow a `Walk`, and multiplies up the probability of what they gave."""

    def __init__(self, walk: Walk) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._walk = walk
        self.probability = 1.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is aten.bernoulli.default:
            return self._bernoulli(args[0])
        if func is aten.bernoulli.p:
            return self._bernoulli(torch.full_like(args[0], args[1]))
        if func is aten.bernoulli_.float:
            return args[0].copy_(self._bernoulli(torch.full_like(args[0], args[1] if len(args) > 1 else 0.5)))
        if func is aten.multinomial.default:
            return self._multinomial(*args, **kwargs)
        if func is aten.binomial.default:
            return self._binomial(*args)
        before = torch.get_rng_state() if torch.Tag.nondeterministic_seeded in func.tags else None
        out = func(*args, **kwargs)
        assert before is None or torch.equal(before, torch.get_rng_state()), f"{func} is not finite noise"
        return out

    def _draw(self, table: Tensor) -> Tensor:
        """An outcome for each column of ``table`` ([n, N], probabilities).  # [N]"""
        rows = self._walk.choose_each(table > 0)
        self.probability *= float(table.double().gather(0, rows[None]).prod())
        return rows

    def _bernoulli(self, p: Tensor) -> Tensor:
        flat = p.reshape(-1)
        return self._draw(torch.stack([1 - flat, flat])).to(p.dtype).reshape(p.shape)

    def _binomial(self, count: Tensor, prob: Tensor) -> Tensor:
        count, prob = torch.broadcast_tensors(count, prob)
        n, p = count.reshape(-1), prob.reshape(-1)
        rows = []
        for column in range(len(n)):
            outcomes = torch.arange(int(n[column]) + 1, dtype=p.dtype)
            law = torch.distributions.Binomial(int(n[column]), probs=p[column], validate_args=False)
            rows.append(self._draw(law.log_prob(outcomes).exp()[:, None]))
        return torch.cat(rows).to(prob.dtype).reshape(prob.shape)

    def _multinomial(self, weights: Tensor, n: int, replacement: bool = False, *, generator: Any = None) -> Tensor:
        assert replacement or n == 1, "multinomial without replacement is not a product of draws"
        table = (weights / weights.sum(-1, keepdim=True)).reshape(-1, weights.shape[-1])  # [B, C]
        rows = self._draw(table.repeat_interleave(n, 0).T)  # [B * n]
        return rows.reshape(*weights.shape[:-1], n)


def expected_estimate(
    compiled: Callable[..., Any], params: Mapping[str, Tensor], *args: Any
) -> tuple[Tensor, dict[str, Tensor]]:
    """The expected objective and gradient estimate of ``compiled(*args)``, over all its draws.

    Args:
        compiled: what `scg.compile` returns (traced already, so that its state is complete), or any function whose
            draws are finite.
        params: the tensors to differentiate by, by name.
    """
    modules = [compiled] if isinstance(compiled, nn.Module) else []
    loss = torch.zeros((), dtype=torch.float64)
    gradient = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in params.items()}
    total = 0.0
    walk = Walk()
    while walk.more():
        draws = ForcedDraws(walk)
        with kept_buffers(modules), draws:  # moving averages start every draw from the same state
            estimate = objective_of(compiled(*args))
        total += draws.probability
        loss += draws.probability * estimate.detach()
        if estimate.requires_grad:
            grads = torch.autograd.grad(estimate, list(params.values()), allow_unused=True)
            for name, grad in zip(params, grads, strict=True):
                if grad is not None:
                    gradient[name] += draws.probability * grad
    assert abs(total - 1) < 1e-9, f"the probabilities of all draws sum to {total}"
    return loss, gradient


def assert_unbiased(problem: Problem, **options: Any) -> None:
    """Law 2 for ``scg.compile(problem.model, **options)`` on every call of the problem, value and gradient."""
    compiled = scg.compile(problem.model, **options)
    params = {path: p for path, p in captured(problem.model).tensors.items() if p.requires_grad}
    for call, args in enumerate(problem.calls):
        problem.before(call)
        for _ in range(2):  # a moving average needs a history, or it would be tested at zero only
            compiled(*args)
        got = expected_estimate(compiled, params, *args)
        torch.testing.assert_close(got, exact(problem.model, *args), rtol=1e-9, atol=1e-10)

"""Law 2 for estimators with uniform noise inside: sums over outcomes, Gauss-Legendre over the noise."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from scg.exact import Walk
from tests.law2 import ForcedDraws

aten = torch.ops.aten


def nodes(count: int, cuts: Sequence[float] = ()) -> tuple[Tensor, Tensor]:
    """Gauss-Legendre nodes and weights on (0, 1), ``count`` on each piece between the cuts.  # [N], [N]"""
    x, w = np.polynomial.legendre.leggauss(count)
    edges = [0.0, *cuts, 1.0]
    pieces = [(lo + (hi - lo) * (x + 1) / 2, w * (hi - lo) / 2) for lo, hi in itertools.pairwise(edges)]
    return torch.tensor(np.concatenate([p for p, _ in pieces])), torch.tensor(np.concatenate([q for _, q in pieces]))


class Given(TorchDispatchMode):
    """Hands out one Bernoulli draw and a list of uniforms, for many independent elements at once."""

    def __init__(self, outcome: Tensor, uniforms: Sequence[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._outcome, self._uniforms = outcome, list(uniforms)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is aten.bernoulli.default:
            return self._outcome.reshape(args[0].shape).to(args[0].dtype)
        if func is aten.rand_like.default:  # of many elements: one where it is below the probability
            return (1 - self._outcome).reshape(args[0].shape)
        if func is aten.rand.default:
            return self._uniforms.pop(0).reshape(args[0])
        return func(*args, **(kwargs or {}))


class ForcedUniforms(ForcedDraws):
    """`ForcedDraws` whose uniforms, of one element each, are handed out from a list."""

    def __init__(self, walk: Walk, uniforms: Iterator[float]) -> None:
        super().__init__(walk)
        self._uniforms = uniforms

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is aten.rand.default:
            return torch.full(args[0], next(self._uniforms), dtype=(kwargs or {}).get("dtype"))
        return super().__torch_dispatch__(func, types, args, kwargs)


def expected_gradient(
    compiled: Callable[..., Any], params: Mapping[str, Tensor], noise: int, count: int
) -> dict[str, Tensor]:
    """The gradient estimate of ``compiled()`` summed over all outcomes and integrated over ``noise`` uniforms."""
    x, w = nodes(count)
    total = {name: torch.zeros_like(p) for name, p in params.items()}
    for picks in itertools.product(range(count), repeat=noise):
        weight = float(w[list(picks)].prod())
        walk = Walk()
        while walk.more():
            with ForcedUniforms(walk, iter(x[list(picks)].tolist())) as draws:
                loss = compiled()
            for name, g in zip(
                params, torch.autograd.grad(loss, list(params.values()), allow_unused=True), strict=True
            ):
                if g is not None:
                    total[name] += weight * draws.probability * g
    return total

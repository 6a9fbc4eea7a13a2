"""What an estimator does, measured: samples of its gradient."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from scg.exact import kept_buffers, objective_of

if TYPE_CHECKING:
    from scg.pipeline import CompiledModule


def gradient_samples(
    compiled: CompiledModule, *args: Any, n: int = 1000, seed: int = 0, **kwargs: Any
) -> dict[str, Tensor]:
    """``n`` independent gradient estimates of one call.

    Nothing is left changed: the random number generator, buffers and moving averages are as before.

    Args:
        compiled: what `scg.compile` returns.
        *args, **kwargs: what it is called with.
        n: how many estimates, a forward and a backward pass each.
        seed: of the random number generator, for these draws only.

    Returns:
        For each of the model's parameters that requires grad, by the model's own name for it: ``[n, *shape]``, zero
        where the loss does not depend on it.
    """
    params = {
        name.removeprefix("model."): param
        for name, param in compiled.named_parameters()
        if name.startswith("model.") and param.requires_grad
    }
    samples = {name: param.new_zeros(n, *param.shape) for name, param in params.items()}
    with torch.random.fork_rng(), kept_buffers([compiled]), compiled.frozen(), torch.enable_grad():
        torch.manual_seed(seed)
        for i in range(n):
            objective = objective_of(compiled(*args, **kwargs))
            if objective.requires_grad:
                grads = torch.autograd.grad(objective, list(params.values()), allow_unused=True)
                for name, grad in zip(params, grads, strict=True):
                    if grad is not None:
                        samples[name][i] = grad
    return samples

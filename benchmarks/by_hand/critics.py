"""Critics and learned baselines, fitted in the same ``backward()``; ``state`` holds their networks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.by_hand.densities import bits, pixels
from benchmarks.by_hand.models import Bits, Gaussian


def _drawn(model: Bits, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Logits, draw, its log probability, its signal and the objective.  ``[B, D]``, at last a scalar"""
    logits = model.encoder(x)
    z = torch.bernoulli(torch.sigmoid(logits).detach())
    nll, log_q = pixels(model.decoder(z), x), bits(logits, z)
    return logits, z, log_q, nll.detach().unsqueeze(-1) + log_q.detach(), (nll + log_q.sum(-1)).mean()


def _predictor(net: Any, x: Tensor) -> Callable[[Tensor], Tensor]:
    """Predictions for outcomes ``[*K, B, D]``: the images enter the first layer once, not once a bit."""
    first, tanh, last = net
    of_image, of_outcome, of_place = first.weight.split([x.shape[-1], 1, first.in_features - x.shape[-1] - 1], 1)
    shared = F.linear(x, of_image, first.bias).unsqueeze(1) + of_place.T  # [B, D, H]
    return lambda z: last(tanh(shared + z.unsqueeze(-1) * of_outcome.squeeze(-1))).squeeze(-1)


def nvil(model: Bits, x: Tensor, state: Any) -> Tensor:
    _, _, log_q, signal, objective = _drawn(model, x)
    predicted = state.inner.net(x)
    with torch.no_grad():
        rest = signal - predicted
        old = [moment.total / moment.weight.clamp(min=1e-30) for moment in (state.mean, state.square)]
        for moment, values in ((state.mean, rest), (state.square, rest**2)):
            moment.total.mul_(0.8).add_(values.mean(), alpha=0.2)
            moment.weight.mul_(0.8).add_(0.2)
        advantage = (rest - old[0]) / (old[1] - old[0] ** 2).clamp(min=1.0).sqrt()
    return objective + ((advantage * log_q).sum() + ((signal - predicted) ** 2).mean()) / len(x)


def actor_critic(model: Bits, x: Tensor, state: Any) -> Tensor:
    _, _, log_q, signal, objective = _drawn(model, x)
    rest = signal - state.net(x)
    return objective + ((rest.detach() * log_q).sum() + (rest**2).mean()) / len(x)


def critic(model: Bits, x: Tensor, state: Any) -> Tensor:
    logits, z, log_q, signal, objective = _drawn(model, x)
    predict = _predictor(state.net, x)
    rest = signal - predict(z)
    with torch.no_grad():
        gain = predict(torch.ones_like(z)) - predict(torch.zeros_like(z))
    own = rest.detach() * log_q + gain * torch.sigmoid(logits)
    return objective + (own.sum() + (rest**2).mean()) / len(x)


def critic_only(model: Bits, x: Tensor, state: Any) -> Tensor:
    logits, z, log_q, signal, objective = _drawn(model, x)
    predict = _predictor(state.net, x)
    predicted = predict(z)
    with torch.no_grad():
        p, at_one, at_zero = torch.sigmoid(logits), predict(torch.ones_like(z)), predict(torch.zeros_like(z))
        advantage = predicted - (p * at_one + (1 - p) * at_zero)
    return objective + ((advantage * log_q).sum() + ((signal - predicted) ** 2).mean()) / len(x)


def gradient_critic(model: Gaussian, x: Tensor, state: Any) -> Tensor:
    loc, scale = model.loc(x), F.softplus(model.scale(x))
    with torch.no_grad():
        z = torch.normal(loc, scale)
        n = (z - loc) / scale
    nll = pixels(model.decoder(z), x)
    log_ratio = 0.5 * (z**2 - ((z - loc) / scale) ** 2) - scale.log()  # of q to the prior
    point = z.requires_grad_()
    predicted = _predictor(state.net, x)(point)
    (slope,) = torch.autograd.grad(predicted.sum(), point, retain_graph=True)
    rest = (nll.unsqueeze(-1) + log_ratio).detach() - predicted
    return (nll + log_ratio.sum(-1)).mean() + ((slope * (loc + scale * n)).sum() + (rest**2).mean()) / len(x)

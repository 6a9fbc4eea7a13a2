"""Sums over outcomes, and sets of distinct ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.by_hand.densities import pixels
from benchmarks.by_hand.models import Mixture


def enumerate_(model: Mixture, x: Tensor, state: Any) -> Tensor:
    log_p = torch.log_softmax(model.gate(x), -1).T  # [C, B]
    logits = model.out(torch.tanh(model.table.unsqueeze(1) + model.skip(x)))  # [C, B, pixels]
    return (log_p.exp() * (pixels(logits, x) + log_p)).sum(0).mean()


def unordered_set(model: Mixture, x: Tensor, state: Any) -> Tensor:
    """For sets of two the weights have closed forms, and so has the built-in baseline."""
    log_p = torch.log_softmax(model.gate(x), -1)
    with torch.no_grad():
        u = torch.rand_like(log_p).clamp(min=torch.finfo(log_p.dtype).tiny)
        index = (torch.log(-torch.log1p(-u)) - log_p).sort(-1).indices[..., :2].T  # [2, B]
    log_s = log_p.gather(-1, index.T).T  # [2, B]
    logits = model.out(torch.tanh(model.table[index] + model.skip(x)))
    f = pixels(logits, x) + log_s  # [2, B]
    with torch.no_grad():
        p = log_s.exp()
        later = p.flip(0) / (1 - p)  # of the other one, once this one is drawn
        weight = p * later
        weight = weight / weight.sum(0) / len(x)
        advantage = weight * (1 - p) * (f - f.flip(0))
    return (weight * f).sum() + (advantage * log_s).sum()


def without_replacement(model: Mixture, x: Tensor, state: Any) -> Tensor:
    """Two outcomes, weighted by one over the probability that they come before the third."""
    log_p = torch.log_softmax(model.gate(x), -1)
    with torch.no_grad():
        u = torch.rand_like(log_p).clamp(min=torch.finfo(log_p.dtype).tiny)
        times, order = (torch.log(-torch.log1p(-u)) - log_p).sort(-1)
        index = order[..., :2].T  # [2, B]
    log_s = log_p.gather(-1, index.T).T  # [2, B]
    f = pixels(model.out(torch.tanh(model.table[index] + model.skip(x))), x) + log_s
    with torch.no_grad():
        weight = log_s.exp() / -torch.expm1(-torch.exp(log_s + times[..., 2])) / len(x)
        advantage = weight * (weight.sum(0) * f - (weight * f).sum(0)) * len(x)
    return (weight * f).sum() + (advantage * log_s).sum()


def sum_and_sample(model: Mixture, x: Tensor, state: Any) -> Tensor:
    """The most probable outcome and one of the others."""
    log_p = torch.log_softmax(model.gate(x), -1)
    with torch.no_grad():
        order = log_p.sort(dim=-1, descending=True, stable=True).indices
        others = log_p.gather(-1, order[..., 1:])
        place = torch.multinomial(others.softmax(-1), 1, replacement=True)
        index = torch.cat([order[..., :1], order[..., 1:].gather(-1, place)], -1).T  # [2, B]
        rest = others.exp().sum(-1) / len(x)
    log_s = log_p.gather(-1, index.T).T  # [2, B]
    f = pixels(model.out(torch.tanh(model.table[index] + model.skip(x))), x) + log_s
    with torch.no_grad():
        weight = torch.stack([log_s[0].exp() / len(x), rest])
        advantage = rest * (f[1] - f[0])  # that of the most probable one is zero
    return (weight * f).sum() + (advantage * log_s[1]).sum()


def mapo(model: Mixture, x: Tensor, state: Any) -> Tensor:
    """Four remembered outcomes and two proposals; ``state`` holds the outcomes of the lowest cost."""
    log_p = torch.log_softmax(model.gate(x), -1)
    filled = state.filled.view(-1)
    with torch.no_grad():
        known = state.outcomes.view(-1, 1).expand(-1, len(x))  # [4, B]
        drawn = torch.multinomial(log_p.exp().repeat_interleave(2, 0), 1).view(-1, 2).T  # [2, B]
        index = torch.cat([known, drawn])
    log_s = log_p.gather(-1, index.T).T  # [6, B]
    f = pixels(model.out(torch.tanh(model.table[index] + model.skip(x))), x) + log_s
    with torch.no_grad():
        p = log_s[:4].exp() * filled.unsqueeze(-1)
        total = p.sum(0)
        outside = ~((drawn.unsqueeze(1) == known) & filled.unsqueeze(-1)).any(1)  # [2, B]
        accepted = outside / (outside.sum(0).clamp(min=1) * (1 + total))  # (1 - total) / (1 - total^2)
        weight = torch.cat([p, accepted]) / len(x)
        baseline = (p * f[:4]).sum(0) / torch.where(total > 0, total, 1.0)
        advantage = weight * (f - baseline)
        best = f.new_full((log_p.shape[-1],), torch.inf)  # the lowest cost of each outcome
        held = torch.cat([filled, filled.new_ones(2)])
        best.scatter_reduce_(0, index[held].flatten(), f[held].flatten(), "amin")
        costs, outcomes = best.topk(4, largest=False)
        state.outcomes.copy_(outcomes.view_as(state.outcomes))
        state.costs.copy_(costs.view_as(state.costs))
        state.filled.copy_(costs.isfinite().view_as(state.filled))
    return (weight * f).sum() + (advantage * log_s).sum()

"""Answers that an earlier policy drew; the rewards are known."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from benchmarks.by_hand.models import Tokens


def answers(model: Tokens, prompts: int) -> tuple[Tensor, ...]:
    """Groups of eight of up to 16 tokens each, with log probabilities of before and lengths."""
    prompt = torch.randint(model.start, (prompts,))
    tokens, mask, reward = model.answers(prompt, 8, 16)
    with torch.no_grad():
        log_p = _log_p(model, prompt, tokens)
        before = torch.where(mask > 0, log_p + 0.2 * torch.randn_like(log_p), -math.log(model.start))
    return prompt, tokens, mask, reward, before, mask.sum(-1)


def _log_p(model: Tokens, prompt: Tensor, tokens: Tensor) -> Tensor:
    """Of each token.  ``[P, G, T]``"""
    return torch.log_softmax(model.logits(prompt, tokens), -1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


def _gain(reward: Tensor) -> Tensor:
    """Minus the advantage over the others of the group."""
    group = reward.shape[1]
    return (reward.mean(1, keepdim=True) - reward) * (group / (group - 1) / reward.numel())


def importance_weighted(model: Tokens, *batch: Any) -> Tensor:
    prompt, tokens, mask, reward, before, lengths, _ = batch
    log_p = _log_p(model, prompt, tokens) * mask
    weight = (log_p.detach() - before * mask).sum(-1).exp()
    return (_gain(reward) * weight * log_p.sum(-1)).sum() - reward.mean()


def clipped_surrogate(model: Tokens, *batch: Any) -> Tensor:
    prompt, tokens, mask, reward, before, lengths, _ = batch
    ratio = (_log_p(model, prompt, tokens) - before).exp()
    gain = _gain(reward).unsqueeze(-1) * mask
    return torch.maximum(ratio * gain, ratio.clamp(0.8, 1.2) * gain).sum() - reward.mean()


def group_relative(model: Tokens, *batch: Any) -> Tensor:
    prompt, tokens, mask, reward, before, lengths, _ = batch
    ratio = (_log_p(model, prompt, tokens) - before).exp()
    centred = reward.mean(1, keepdim=True) - reward
    advantage = centred / (reward.std(1, keepdim=True) + 1e-4) / (lengths * reward.numel())
    gain = advantage.unsqueeze(-1) * mask
    return torch.maximum(ratio * gain, ratio.clamp(0.8, 1.2) * gain).sum() - reward.mean()

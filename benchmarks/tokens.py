"""A small autoregressive policy over tokens, trained by leave-one-out from replayed samples: with scg, and by hand.

Each prompt has a group of answers with a reward that a rule gives: how many places hold the prompt's token. Answers end
at their own lengths; the policy gradient of each answer runs over its own tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributions import Categorical

import scg
from scg.estimators.baselines import LeaveOneOut
from scg.estimators.score_function import ScoreFunction


class Policy(nn.Module):
    """About 50,000 parameters: the next token from the prompt and the tokens so far."""

    def __init__(self, vocabulary: int = 32, width: int = 96) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary + 1, width)
        self.mix = nn.GRU(width, width, batch_first=True)
        self.head = nn.Linear(width, vocabulary)
        self.start = vocabulary

    def logits(self, prompt: Tensor, tokens: Tensor) -> Tensor:
        """``[P, G, T, V]`` of tokens ``[P, G, T]`` after prompts ``[P]``."""
        groups, length = tokens.shape[1:]
        first = torch.full_like(tokens[..., :1], self.start)
        before = torch.cat([first, tokens[..., :-1]], -1)
        seen = self.embed(before) + self.embed(prompt)[:, None, None]
        mixed, _ = self.mix(seen.flatten(0, 1))
        return self.head(mixed).reshape(-1, groups, length, self.head.out_features)

    def forward(self, prompt: Tensor, tokens: Tensor, mask: Tensor, reward: Tensor) -> Tensor:
        logits = self.logits(prompt, tokens)
        z = scg.sample(
            Categorical(logits=logits * mask.unsqueeze(-1)), "tokens", value=tokens
        )  # nothing is drawn behind
        return -scg.depends(reward, on=z, dims=("tied", "tied")).mean()

    @torch.no_grad()
    def answers(self, prompt: Tensor, group: int, length: int) -> tuple[Tensor, Tensor, Tensor]:
        """Draws ``[P, G, T]`` tokens with their mask, and each answer's reward ``[P, G]``."""
        tokens = torch.zeros(len(prompt), group, length, dtype=torch.int64)
        for t in range(length):
            tokens[..., t] = Categorical(logits=self.logits(prompt, tokens[..., : t + 1])[..., t, :]).sample()
        ends = torch.randint(length // 2, length + 1, (len(prompt), group, 1))
        mask = (torch.arange(length) < ends).float()
        reward = ((tokens == prompt[:, None, None]) * mask).sum(-1) / ends.squeeze(-1)
        return tokens, mask, reward


def compiled(model: Policy) -> scg.CompiledModule:
    return scg.compile(model, estimator=ScoreFunction(baseline=LeaveOneOut(group=1)))


def by_hand(model: Policy, prompt: Tensor, tokens: Tensor, mask: Tensor, reward: Tensor) -> Tensor:
    """The surrogate as one writes it: its value is the mean cost, its gradient that of leave-one-out."""
    logits = model.logits(prompt, tokens)
    log_p = torch.log_softmax(logits, -1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    group = reward.shape[1]
    advantage = (reward.mean(1, keepdim=True) - reward) * (group / (group - 1) / reward.numel())
    term = (advantage.unsqueeze(-1) * mask * log_p).sum()
    return -reward.mean() + term - term.detach()

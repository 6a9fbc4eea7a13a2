"""Six programs and their pictures, each as an SVG of its compiled graph.

python examples/gallery.py --out docs/gallery
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli, Categorical, Normal, kl_divergence

import scg


class DiscreteVAE(nn.Module):
    """One layer of bits."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 8))
        self.decoder = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 64))

    def forward(self, x: Tensor) -> Tensor:
        q = Bernoulli(logits=self.encoder(x))
        z = q.sample()
        nll = -Bernoulli(logits=self.decoder(z)).log_prob(x).sum(-1)
        kl = kl_divergence(q, Bernoulli(logits=torch.zeros_like(q.logits))).sum(-1)
        loss = nll + kl
        return loss.mean()


class BeliefNet(nn.Module):
    """A sigmoid belief network of two layers: bits above bits, a sampled divergence at each."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder1, self.encoder2 = nn.Linear(64, 20), nn.Linear(20, 10)
        self.decoder1, self.decoder2 = nn.Linear(20, 64), nn.Linear(10, 20)
        self.prior = nn.Parameter(torch.zeros(10))

    def forward(self, x: Tensor) -> Tensor:
        q1 = Bernoulli(logits=self.encoder1(x))
        h1 = q1.sample()
        q2 = Bernoulli(logits=self.encoder2(h1))
        h2 = q2.sample()
        nll = -Bernoulli(logits=self.decoder1(h1)).log_prob(x).sum(-1)
        kl1 = (q1.log_prob(h1) - Bernoulli(logits=self.decoder2(h2)).log_prob(h1)).sum(-1)
        kl2 = (q2.log_prob(h2) - Bernoulli(logits=self.prior).log_prob(h2)).sum(-1)
        return (nll + kl1 + kl2).mean()


class HMM(nn.Module):
    """Hidden states drawn from their prior; each emits what is observed. The chain is summed over, exactly."""

    def __init__(self, states: int = 3, steps: int = 6) -> None:
        super().__init__()
        self.steps = steps
        self.initial = nn.Parameter(torch.zeros(states))
        self.transition = nn.Parameter(torch.zeros(states, states))
        self.emission = nn.Parameter(torch.randn(states))

    def forward(self, x: Tensor) -> Tensor:
        logits, total = self.initial.expand(x.shape[0], -1), torch.zeros(())
        for t in range(self.steps):
            z = Categorical(logits=logits).sample()
            nll = -Normal(self.emission[z], 1.0).log_prob(x[:, t])
            total = total + nll.mean()
            logits = self.transition[z]
        return total


@scg.opaque(batch_dims=1)
def reward(state: Tensor, action: Tensor) -> Tensor:
    """Keep the state near zero: something a simulator would say."""
    return -state.pow(2).sum(-1) - 0.1 * action


class Policy(nn.Module):
    """A policy over some steps of a simulator: each action is credited with the rewards that follow it."""

    def __init__(self, steps: int = 20) -> None:
        super().__init__()
        self.steps = steps
        self.pi = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 3))
        self.register_buffer("push", torch.randn(3, 4))

    def forward(self, state: Tensor) -> Tensor:
        total = torch.zeros(())
        for _ in range(self.steps):
            a = Categorical(logits=self.pi(state)).sample()
            cost = -reward(state, a.to(state.dtype))
            total = total + cost.mean()
            state = 0.9 * state + self.push[a]  # type: ignore[index]
        return total


class MixtureVAE(nn.Module):
    """A component of the mixture, drawn for every example, and a point near its centre."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(64, 32), nn.Tanh())
        self.choose, self.locate = nn.Linear(32, 5), nn.Linear(32 + 5, 2 * 3)
        self.centres = nn.Parameter(torch.randn(5, 3))
        self.decoder = nn.Sequential(nn.Linear(3, 32), nn.Tanh(), nn.Linear(32, 64))

    def forward(self, x: Tensor) -> Tensor:
        h = self.encoder(x)
        q_k = Categorical(logits=self.choose(h))
        k = q_k.sample()
        loc, scale = self.locate(torch.cat([h, nn.functional.one_hot(k, 5).to(h.dtype)], -1)).chunk(2, -1)
        q_z = Normal(loc, scale.exp())
        z = q_z.rsample()
        nll = -Bernoulli(logits=self.decoder(z)).log_prob(x).sum(-1)
        kl_k = kl_divergence(q_k, Categorical(logits=torch.zeros_like(q_k.logits)))
        kl_z = kl_divergence(q_z, Normal(self.centres[k], 1.0)).sum(-1)
        loss = nll + kl_k
        return (loss + kl_z).mean()


class RoutedTransformer(nn.Module):
    """A transformer block that sends every token to one of three experts."""

    def __init__(self, width: int = 16, experts: int = 3) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.router = nn.Linear(width, experts)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 32), nn.GELU(), nn.Linear(32, width)) for _ in range(experts)
        )
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h = self.norm1(x)
        x = x + self.attention(h, h, h, need_weights=False)[0]
        h = self.norm2(x)
        route = Categorical(logits=self.router(h)).sample()
        outs = torch.stack([expert(h) for expert in self.experts], -2)
        picked = outs.gather(-2, route[..., None, None].expand(*route.shape, 1, h.shape[-1])).squeeze(-2)
        logits = self.head(x + picked)
        nll = nn.functional.cross_entropy(logits.transpose(1, 2), y, reduction="none")
        return nll.mean()


@dataclass(frozen=True)
class Program:
    """A model, what it is called with, and how it is compiled."""

    model: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Tensor, ...]]
    options: dict[str, Any] = field(default_factory=dict)


PROGRAMS = {
    "discrete_vae": Program(DiscreteVAE, lambda: (torch.rand(50, 64).round(),), {"samples": 4}),
    "belief_net": Program(BeliefNet, lambda: (torch.rand(50, 64).round(),), {"samples": 4}),
    "hmm": Program(HMM, lambda: (torch.randn(50, 6),)),
    "policy": Program(Policy, lambda: (torch.randn(32, 4),), {"samples": 2}),
    "mixture_vae": Program(MixtureVAE, lambda: (torch.rand(50, 64).round(),)),
    "routed_transformer": Program(
        RoutedTransformer, lambda: (torch.randn(8, 12, 16), torch.randint(0, 10, (8, 12))), {"samples": 2}
    ),
}


def compiled(name: str) -> scg.CompiledModule:
    """One of the programs."""
    torch.manual_seed(0)
    program = PROGRAMS[name]
    return scg.compile(program.model(), example_inputs=program.inputs(), **program.options)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=Path("out/gallery"))
    parser.add_argument("--smoke-test", action="store_true")
    args = parser.parse_args()
    args.out.mkdir(exist_ok=True, parents=True)
    for name in list(PROGRAMS)[: 1 if args.smoke_test else None]:
        print(compiled(name).render(args.out / f"{name}.svg"))


if __name__ == "__main__":
    main()

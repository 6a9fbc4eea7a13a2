"""A hidden Markov model's likelihood: scg's elimination, the forward recursion by hand, and Pyro's TraceEnum_ELBO.

``python -m benchmarks.hmm [--quick]``; the comparison with Pyro needs the extra ``bench``.
"""

from __future__ import annotations

import argparse
import importlib.util
import time
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Categorical, Normal

import scg
from benchmarks.measure import Step, machine, paired, seconds


class HMM(nn.Module):
    """K states, Gaussian emissions; the negative log likelihood of ``[B, T]``."""

    def __init__(self, K: int) -> None:
        super().__init__()
        self.start = nn.Parameter(torch.randn(K))
        self.step = nn.Parameter(torch.randn(K, K))
        self.mean = nn.Parameter(torch.randn(K))

    def forward(self, x: Tensor) -> Tensor:
        batch, steps = x.shape
        z = Categorical(logits=self.start.expand(batch, -1)).sample()
        nll = torch.zeros(batch)
        for t in range(steps):
            nll = nll - Normal(self.mean[z], 1.0).log_prob(x[:, t])
            if t < steps - 1:
                z = Categorical(logits=self.step[z]).sample()
        return scg.logmarginal(nll).mean()


def by_hand(model: HMM, x: Tensor) -> Tensor:
    """The forward recursion, one matrix product a step, shifted by the maximum."""
    emission = Normal(model.mean, 1.0).log_prob(x.unsqueeze(-1)).unbind(1)  # T times [B, K]
    step = model.step.softmax(-1)
    a = model.start.log_softmax(-1) + emission[0]
    for e in emission[1:]:
        top = a.detach().amax(-1, keepdim=True)
        a = ((a - top).exp() @ step).log() + top + e
    return -a.logsumexp(-1).mean()


def in_pyro(model: HMM) -> Any:
    """The same likelihood as Pyro takes it, with `pyro.markov` and parallel enumeration."""
    import pyro
    import pyro.distributions as dist
    from pyro.infer import TraceEnum_ELBO

    def program(x: Tensor) -> None:
        with pyro.plate("batch", x.shape[0], dim=-1):
            z = None
            for t in pyro.markov(range(x.shape[1])):
                logits = model.start if z is None else model.step[z]
                z = pyro.sample(f"z_{t}", dist.Categorical(logits=logits), infer={"enumerate": "parallel"})
                pyro.sample(f"x_{t}", dist.Normal(model.mean[z], 1.0), obs=x[:, t])

    elbo = TraceEnum_ELBO(max_plate_nesting=1)
    return lambda x: elbo.differentiable_loss(program, lambda x: None, x) / x.shape[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    torch.manual_seed(0)
    torch.set_num_threads(1)
    K, T, B, pairs = (4, 6, 3, 3) if quick else (16, 50, 32, 60)
    model, x = HMM(K), torch.randn(B, T)
    print(machine())
    scg.compile(HMM(2))(torch.randn(3, 3))  # torch's own tracing machinery is imported
    compiled = scg.compile(model)
    first = seconds(lambda: compiled(x).backward(), time.process_time)
    longer = scg.compile(model)
    again = seconds(lambda: longer(torch.randn(B, 4 * T)).backward(), time.process_time)
    print(f"first call, T={T}: {first:.2f} s; T={4 * T}: {again:.2f} s, {again / first:.2f}x (less than 4x)")
    torch.testing.assert_close(compiled(x), by_hand(model, x))

    def step(loss: Any) -> Step:
        def run() -> None:
            model.zero_grad(set_to_none=True)
            loss(x).backward()

        return run

    ours = step(compiled)
    hand = step(lambda x: by_hand(model, x))
    against = paired(ours, hand, pairs, clock=time.process_time)
    print(f"K={K}, T={T}, batch {B}: against the loop by hand {against} (at most 1.2x)")
    if importlib.util.find_spec("pyro") is not None:
        theirs = in_pyro(model)
        torch.testing.assert_close(theirs(x), by_hand(model, x))
        against = paired(step(theirs), ours, max(pairs // 6, 3), clock=time.process_time)
        print(f"Pyro's TraceEnum_ELBO against ours {against} (at least 10x)")


if __name__ == "__main__":
    main()

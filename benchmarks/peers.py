"""scg against Pyro and Storchastic, the same estimator of the same model, paired: ``python -m benchmarks.peers``.

Each peer runs in a process of its own (one of them changes torch when it is imported), against a compiled step that was
made before the peer was imported. ``pip install 'scg[bench]'`` installs the peers; one that is missing is left out.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Bernoulli, kl_divergence

import scg
from benchmarks import chain, hmm, layers, vae
from benchmarks.measure import Step, machine, paired
from benchmarks.run import SAMPLES, training_step
from scg.estimators import ESTIMATORS

STEPS = 20


def of_scg(model: torch.nn.Module, x: Tensor, baseline: str, samples: int = SAMPLES) -> Step:
    """A step of the score function."""
    compiled = scg.compile(model, estimator=ESTIMATORS["score_function"](baseline=baseline), samples=samples)
    compiled(x)
    return training_step(lambda: compiled(x), model)


def of_storchastic(loss: Callable[[Any], None], model: torch.nn.Module) -> Step:
    """A step of Storchastic's score function with leave-one-out over four draws."""
    import storch

    def step() -> None:
        model.zero_grad(set_to_none=True)
        storch.reset()
        loss(storch)
        storch.backward()

    return step


def of_marginal(model: hmm.HMM, x: Tensor) -> Step:
    """A step of the exact likelihood."""
    compiled = scg.compile(model)
    compiled(x)
    return training_step(lambda: compiled(x), model)


def storchastic_vae(model: layers.OneLayerVAE, x: Tensor) -> Step:
    import storch

    method = storch.method.ScoreFunction("z", n_samples=SAMPLES, baseline_factory="batch_average")

    def loss(storch: Any) -> None:
        data = storch.denote_independent(x, 0, "data")
        q = Bernoulli(logits=model.encoder(data))
        z = method(q)
        storch.add_cost(-Bernoulli(logits=model.decoder(z)).log_prob(data).sum(-1), "nll")
        prior = Bernoulli(logits=model.prior.expand(len(x), -1))
        storch.add_cost(
            storch.deterministic(lambda logits: kl_divergence(Bernoulli(logits=logits), prior).sum(-1))(q.logits), "kl"
        )

    return of_storchastic(loss, model)


def storchastic_network(model: vae.VAE, x: Tensor) -> Step:
    import storch

    methods = [storch.method.ScoreFunction(name, n_samples=SAMPLES if name == "z1" else 1) for name in ("z1", "z2")]
    methods[0] = storch.method.ScoreFunction("z1", n_samples=SAMPLES, baseline_factory="batch_average")

    def loss(storch: Any) -> None:
        data = storch.denote_independent(x, 0, "data")
        q1 = Bernoulli(logits=model.infer_lower(data))
        z1 = methods[0](q1)
        q2 = Bernoulli(logits=model.infer_upper(z1))
        z2 = methods[1](q2)
        nll = -Bernoulli(logits=model.generate_pixels(z1)).log_prob(data).sum(-1)
        lower = (q1.log_prob(z1) - Bernoulli(logits=model.generate_lower(z2)).log_prob(z1)).sum(-1)
        upper = (q2.log_prob(z2) - Bernoulli(logits=model.prior + 0 * z2).log_prob(z2)).sum(-1)
        for name, cost in {"nll": nll, "lower": lower, "upper": upper}.items():
            storch.add_cost(cost, name)

    return of_storchastic(loss, model)


def storchastic_chain(model: chain.Chain, start: Tensor) -> Step:
    import storch

    methods = [storch.method.ScoreFunction(f"z{t}", n_samples=SAMPLES if t == 0 else 1) for t in range(model.steps)]

    def loss(storch: Any) -> None:
        state = storch.denote_independent(start, 0, "data")
        for t in range(model.steps):
            z = methods[t](Bernoulli(logits=model.policy(state)))
            state = torch.tanh(model.dynamics(state + z - 0.5))
            storch.add_cost((state**2).sum(-1), f"c{t}")

    return of_storchastic(loss, model)


AVERAGE = {"baseline": {"use_decaying_avg_baseline": True, "baseline_beta": 0.9}}


def of_pyro(
    generate: Callable[[Tensor], None], infer: Callable[[Tensor], None], model: Any, x: Tensor, samples: int = SAMPLES
) -> Step:
    """A step of Pyro's score function with moving averages."""
    import pyro
    from pyro.infer import TraceGraph_ELBO

    pyro.enable_validation(False)
    elbo = TraceGraph_ELBO(num_particles=samples, vectorize_particles=samples > 1, max_plate_nesting=1)

    def step() -> None:
        model.zero_grad(set_to_none=True)
        elbo.loss_and_grads(generate, infer, x)

    return step


def pyro_vae(model: layers.OneLayerVAE, x: Tensor) -> Step:
    import pyro
    import pyro.distributions as dist

    def generate(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(logits=model.prior.expand(len(x), -1)).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=model.decoder(z)).to_event(1), obs=x)

    def infer(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Bernoulli(logits=model.encoder(x)).to_event(1), infer=AVERAGE)

    return of_pyro(generate, infer, model, x)


def pyro_network(model: vae.VAE, x: Tensor, samples: int = SAMPLES) -> Step:
    import pyro
    import pyro.distributions as dist

    def generate(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z2 = pyro.sample("z2", dist.Bernoulli(logits=model.prior.expand(len(x), -1)).to_event(1))
            z1 = pyro.sample("z1", dist.Bernoulli(logits=model.generate_lower(z2)).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=model.generate_pixels(z1)).to_event(1), obs=x)

    def infer(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z1 = pyro.sample("z1", dist.Bernoulli(logits=model.infer_lower(x)).to_event(1), infer=AVERAGE)
            pyro.sample("z2", dist.Bernoulli(logits=model.infer_upper(z1)).to_event(1), infer=AVERAGE)

    return of_pyro(generate, infer, model, x, samples)


def pyro_hmm(model: hmm.HMM, x: Tensor) -> Step:
    import pyro

    pyro.enable_validation(False)
    loss = hmm.in_pyro(model)
    return training_step(lambda: loss(x), model)


def _images() -> Tensor:
    return (torch.rand(100, 784) < 0.3).float()


def _vae() -> tuple[layers.OneLayerVAE, Tensor]:
    return layers.OneLayerVAE(), _images()


def _network() -> tuple[vae.VAE, Tensor]:
    return vae.VAE(), _images()


def _hmm() -> tuple[hmm.HMM, Tensor]:
    return hmm.HMM(16), torch.randn(32, 50)


def _chain() -> tuple[chain.Chain, Tensor]:
    return chain.Chain(STEPS), torch.randn(32, 8)


@dataclass(frozen=True)
class Run:
    """One row of the table."""

    package: str
    module: str
    program: str
    make: Callable[[], tuple[Any, Tensor]]
    """Model and data."""
    peer: Callable[[Any, Tensor], Step]
    ours: Callable[[Any, Tensor], Step]
    wanted: str = ""


_LEAVE_ONE_OUT = partial(of_scg, baseline="leave_one_out")
_MOVING_AVERAGE = partial(of_scg, baseline="moving_average")

_VAE, _NETWORK = "VAE of one Bernoulli layer, 784-200", "VAE of two (a sigmoid belief network), 784-200-200"
_CHAIN, _HMM = f"chain of {STEPS} steps", "hidden Markov model, K=16, T=50"

RUNS = {
    "storchastic-vae": Run("storchastic", "storch", _VAE, _vae, storchastic_vae, _LEAVE_ONE_OUT),
    "storchastic-network": Run(
        "storchastic", "storch", _NETWORK, _network, storchastic_network, _LEAVE_ONE_OUT, "at least 1.3x"
    ),
    "storchastic-chain": Run(
        "storchastic", "storch", _CHAIN, _chain, storchastic_chain, _LEAVE_ONE_OUT, "at least 30x"
    ),
    "pyro-vae": Run("pyro-ppl", "pyro", _VAE, _vae, pyro_vae, _MOVING_AVERAGE),
    "pyro-network": Run("pyro-ppl", "pyro", _NETWORK, _network, pyro_network, _MOVING_AVERAGE, "at least 2.5x"),
    "pyro-network-once": Run(
        "pyro-ppl",
        "pyro",
        f"{_NETWORK}, one draw",
        _network,
        partial(pyro_network, samples=1),
        partial(_MOVING_AVERAGE, samples=1),
        "at least 2.5x",
    ),
    "pyro-hmm": Run("pyro-ppl", "pyro", _HMM, _hmm, pyro_hmm, of_marginal, "at least 10x"),
}


def run(name: str, pairs: int) -> None:
    """Prints one row: how much longer the peer takes."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    row = RUNS[name]
    model, x = row.make()
    ours = row.ours(model, x)  # traced before the peer is imported
    ratio = paired(row.peer(model, x), ours, pairs, warm_up=3, clock=time.process_time, before=1)
    print(f"| {row.program} | {ratio} | {row.wanted} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=RUNS)
    parser.add_argument("--pairs", type=int, default=30)
    parser.add_argument("--here", action="store_true", help="run --only in this process")
    args = parser.parse_args()
    if args.here:
        run(args.only, args.pairs)
        return
    print(machine(), "", "| peer, program | the peer's step against scg's | wanted of scg |", "|---|---|---|", sep="\n")
    for name in [args.only] if args.only else RUNS:
        row = RUNS[name]
        if importlib.util.find_spec(row.module) is None:
            print(f"| {name} | left out: pip install {row.package} | |")
            continue
        command = [sys.executable, "-W", "ignore", "-m", "benchmarks.peers", "--here", "--only", name]
        done = subprocess.run([*command, "--pairs", str(args.pairs)], capture_output=True, text=True)
        lines = done.stdout.strip().splitlines() or [f"| {name} | failed: {done.stderr.strip().splitlines()[-1]} | |"]
        version = importlib.metadata.version(row.package)
        print(lines[-1].replace("| ", f"| {row.package} {version}: ", 1), flush=True)


if __name__ == "__main__":
    main()

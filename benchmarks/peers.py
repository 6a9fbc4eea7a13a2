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
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Bernoulli

import scg
from benchmarks import chain, vae
from benchmarks.measure import Step, machine, paired
from benchmarks.run import SAMPLES, training_step
from scg.estimators import ESTIMATORS

STEPS = 20


def of_scg(model: torch.nn.Module, x: Tensor, baseline: str) -> Step:
    """A step of the score function over four draws."""
    compiled = scg.compile(model, estimator=ESTIMATORS["score_function"](baseline=baseline), samples=SAMPLES)
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


def storchastic_vae(model: vae.VAE, x: Tensor) -> Step:
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


def pyro_vae(model: vae.VAE, x: Tensor) -> Step:
    import pyro
    import pyro.distributions as dist
    from pyro.infer import TraceGraph_ELBO

    average = {"baseline": {"use_decaying_avg_baseline": True, "baseline_beta": 0.9}}

    def generate(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z2 = pyro.sample("z2", dist.Bernoulli(logits=model.prior.expand(len(x), -1)).to_event(1))
            z1 = pyro.sample("z1", dist.Bernoulli(logits=model.generate_lower(z2)).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=model.generate_pixels(z1)).to_event(1), obs=x)

    def infer(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z1 = pyro.sample("z1", dist.Bernoulli(logits=model.infer_lower(x)).to_event(1), infer=average)
            pyro.sample("z2", dist.Bernoulli(logits=model.infer_upper(z1)).to_event(1), infer=average)

    pyro.enable_validation(False)
    elbo = TraceGraph_ELBO(num_particles=SAMPLES, vectorize_particles=True, max_plate_nesting=1)

    def step() -> None:
        model.zero_grad(set_to_none=True)
        elbo.loss_and_grads(generate, infer, x)

    return step


def _vae() -> tuple[vae.VAE, Tensor]:
    return vae.VAE(), (torch.rand(100, 784) < 0.3).float()


def _chain() -> tuple[chain.Chain, Tensor]:
    return chain.Chain(STEPS), torch.randn(32, 8)


RUNS: dict[str, tuple[str, str, Callable[[], Any], Callable[..., Step], str, str]] = {
    "storchastic-vae": ("storchastic", "storch", _vae, storchastic_vae, "leave_one_out", "at least 1.3x"),
    "storchastic-chain": ("storchastic", "storch", _chain, storchastic_chain, "leave_one_out", "at least 30x"),
    "pyro-vae": ("pyro-ppl", "pyro", _vae, pyro_vae, "moving_average", "at least 2.5x"),
}
"""Name to package, module, program, the peer's step, scg's baseline, and what is wanted of scg."""


def run(name: str, pairs: int) -> None:
    """Prints one row: how much longer the peer takes."""
    _, _, make, peer, baseline, wanted = RUNS[name]
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, x = make()
    ours = of_scg(model, x, baseline)  # traced before the peer is imported
    print(f"| {name.split('-')[-1]} | {paired(peer(model, x), ours, pairs, warm_up=3)} | {wanted} |")


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
        package, module = RUNS[name][:2]
        if importlib.util.find_spec(module) is None:
            print(f"| {name} | left out: pip install {package} | |")
            continue
        command = [sys.executable, "-W", "ignore", "-m", "benchmarks.peers", "--here", "--only", name]
        done = subprocess.run([*command, "--pairs", str(args.pairs)], capture_output=True, text=True)
        rows = done.stdout.strip().splitlines() or [f"| {name} | failed: {done.stderr.strip().splitlines()[-1]} | |"]
        print(rows[-1].replace("| ", f"| {package} {importlib.metadata.version(package)}: ", 1), flush=True)


if __name__ == "__main__":
    main()

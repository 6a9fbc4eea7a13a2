"""Compiled programs against hand-written PyTorch: ``python -m benchmarks.run [--only vae] [--no-inductor] [--quick]``.

Prints Markdown tables and writes them to out/benchmarks.md.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli

import scg
from benchmarks import chain, layers, tokens, vae
from benchmarks.by_hand import CASES
from benchmarks.measure import (
    Paired,
    Step,
    cuda_graph,
    in_new_process,
    machine,
    paired,
    peak_bytes,
    seconds,
    synchronized,
)

SAMPLES = 4


def training_step(loss: Callable[[], Tensor], model: nn.Module) -> Step:
    """Forward and backward, gradients dropped first."""

    def step() -> None:
        model.zero_grad(set_to_none=True)
        loss().backward()

    return step


def score_function(model: nn.Module, **options: Any) -> Any:
    return scg.compile(model, estimator="score_function", samples=SAMPLES, **options)


def bench_vae(quick: bool, inductor: bool) -> Iterator[tuple[str, str, str]]:
    """784-200-200, batch 100, leave-one-out over four draws."""
    sizes = (20, 8, 6) if quick else (784, 200, 200)
    pairs = 3 if quick else 200
    model = vae.VAE(*sizes)
    x = (torch.rand(100, sizes[0]) < 0.3).float()
    compiled = score_function(model)
    ours = training_step(lambda: compiled(x), model)
    hand = training_step(lambda: vae.by_hand(model, x, SAMPLES), model)
    yield "VAE, eager, forward and backward", str(paired(ours, hand, pairs)), "at most 1.05x"
    mine, theirs = peak_bytes(ours), peak_bytes(hand)
    yield "VAE, eager, peak memory of a step", f"{mine / theirs:.3f}x, {mine / 2**20:.1f} MiB", "at most 1.10x"
    if inductor:
        fused = score_function(model, backend="inductor")
        hand_fused = torch.compile(vae.by_hand, fullgraph=True)
        ours = training_step(lambda: fused(x), model)
        hand = training_step(lambda: hand_fused(model, x, SAMPLES), model)
        yield "VAE, inductor against torch.compile", str(paired(ours, hand, pairs)), "at most 1.05x"


def bench_chain(quick: bool, inductor: bool) -> Iterator[tuple[str, str, str]]:
    """T sites with a cost each, batch 32."""
    steps = 5 if quick else 100
    state = torch.randn(32, 8)
    times = []
    for length in (steps, 2 * steps):
        model = chain.Chain(length)
        compiled = score_function(model)
        times.append(seconds(lambda compiled=compiled: compiled(state).backward()))  # type: ignore[misc]
        if length == steps:
            ours = training_step(lambda compiled=compiled: compiled(state), model)  # type: ignore[misc]
            hand = training_step(lambda model=model: chain.by_hand(model, state, SAMPLES), model)  # type: ignore[misc]
            step = str(paired(ours, hand, 3 if quick else 60))
    yield f"chain of {steps} sites, first call", f"{times[0]:.2f} s", "under 10 s"
    yield f"chain of {2 * steps} sites, first call", f"{times[1]:.2f} s, {times[1] / times[0]:.2f}x", "at most 2.5x"
    yield f"chain of {steps} sites, step against reversed cumsum", step, "at most 1.15x"


def bench_local_expectation(quick: bool, inductor: bool) -> Iterator[tuple[str, str, str]]:
    """784-200-784 at batch 50, against leave-one-out over four draws: variance and time, in training."""
    model = layers.OneLayerVAE(784, 20 if quick else 200)
    data, _ = layers.digits()
    x = data[:50]
    loo = scg.compile(model, estimator="score_function", samples=SAMPLES, example_inputs=(x,))
    local = {K: scg.compile(model, estimator="local_expectation", samples=K, example_inputs=(x,)) for K in (1, 8)}
    trained = 0
    for steps in (0, 2) if quick else (0, 300, 1000):
        layers.train(model, (data,), steps - trained, estimator="score_function", samples=SAMPLES)
        trained = steps
        baseline = scg.gradient_samples(loo, x, n=4 if quick else 40)
        for K, compiled in local.items():
            found = scg.gradient_samples(compiled, x, n=4 if quick else 20)
            for part in ("encoder", ""):
                ours, theirs = layers.total_variance(found, part), layers.total_variance(baseline, part)
                what = f"local_expectation, K={K}, variance of {part or 'all'} gradients after {steps} steps"
                yield what, f"{theirs / max(ours, 1e-12):.0f}x less, {ours:.3g} against {theirs:.3g}", "50x less"
    other = training_step(lambda: loo(x), model)
    for K, compiled in local.items():
        step = training_step(lambda compiled=compiled: compiled(x), model)  # type: ignore[misc]
        ratio = str(paired(step, other, 3 if quick else 40, 2))
        yield f"local_expectation, K={K}, step against leave-one-out, K={SAMPLES}", ratio, "at most 20x"


def bench_hnca(quick: bool, inductor: bool) -> Iterator[tuple[str, str, str]]:
    """784-64-64-64-10 at batch 50, against leave-one-out and against backpropagation without draws."""
    model = layers.Network(784, 8 if quick else 64)
    images, classes = layers.digits()
    batch = (images[:50], classes[:50])
    names = {"hnca, K=2": ("hnca", 2), "leave-one-out, K=2": ("score_function", 2), "hnca": ("hnca", 1)}
    steps = {
        name: scg.compile(model, estimator=estimator, samples=samples, example_inputs=batch)
        for name, (estimator, samples) in names.items()
    }
    layers.train(model, (images, classes), 2 if quick else 300, estimator="hnca", samples=2)
    hindsight, score = (scg.gradient_samples(steps[name], *batch, n=4 if quick else 100) for name in list(names)[:2])
    for layer in range(3):
        ours, theirs = (layers.total_variance(found, f"layers.{layer}") for found in (hindsight, score))
        what = f"hnca, K=2, variance of layer {layer + 1} against leave-one-out, K=2"
        yield what, f"{theirs / max(ours, 1e-12):.0f}x less, {ours:.3g} against {theirs:.3g}", "less"
    for name, compiled in steps.items():
        estimator, samples = names[name]
        x, y = batch[0].repeat(samples, 1), batch[1].repeat(samples)
        step = training_step(lambda compiled=compiled: compiled(*batch), model)  # type: ignore[misc]
        other = training_step(lambda x=x, y=y: model.deterministic(x, y), model)  # type: ignore[misc]
        ratio = str(paired(step, other, 3 if quick else 100, clock=time.process_time))
        yield f"{name}, step against backpropagation of as many rows", ratio, "at most 3x"
        if inductor and estimator == "hnca":
            fused = scg.compile(model, estimator=estimator, samples=samples, backend="inductor", example_inputs=batch)
            plain = torch.compile(model.deterministic)
            step = training_step(lambda fused=fused: fused(*batch), model)  # type: ignore[misc]
            other = training_step(lambda x=x, y=y, plain=plain: plain(x, y), model)  # type: ignore[misc]
            ratio = str(paired(step, other, 3 if quick else 100, clock=time.process_time))
            yield f"{name}, the same, both compiled by inductor", ratio, "at most 3x"


def bench_tokens(quick: bool, inductor: bool) -> Iterator[tuple[str, str, str]]:
    """Replayed answers of an autoregressive policy, leave-one-out over groups of eight."""
    model = tokens.Policy(4, 8) if quick else tokens.Policy()
    prompt = torch.randint(4, (2 if quick else 8,))
    batch = (prompt, *model.answers(prompt, 8, 5 if quick else 16))
    loss = tokens.compiled(model)
    ours = training_step(lambda: loss(*batch), model)
    hand = training_step(lambda: tokens.by_hand(model, *batch), model)
    yield (
        "token policy, leave-one-out from replayed answers",
        str(paired(ours, hand, 3 if quick else 200)),
        "at most 1.1x",
    )


FIRST_CALL = """
import time, torch
torch.set_num_threads(1)
import scg
from benchmarks import vae
x = (torch.rand(100, 784) < 0.3).float()
for call in range({calls}):
    start = time.perf_counter()
    scg.compile(vae.VAE(), estimator="score_function", samples=4)(x).backward()
print(time.perf_counter() - start)
"""

IMPORT = """
import time, torch
start = time.perf_counter()
import scg
print(time.perf_counter() - start)
"""


def bench_startup(quick: bool, inductor: bool) -> Iterator[tuple[str, str, str]]:
    """What a new process pays."""
    repeats = 1 if quick else 5

    def median(script: str) -> float:
        return sorted(in_new_process(script) for _ in range(repeats))[repeats // 2]

    yield "import scg beyond import torch", f"{median(IMPORT):.2f} s", "under 0.3 s"
    yield "VAE, first call in a new process", f"{median(FIRST_CALL.format(calls=1)):.2f} s", "under 4 s"
    yield "VAE, first call of a second model", f"{median(FIRST_CALL.format(calls=2)):.2f} s", "under 2 s"


def bench_estimators(quick: bool, inductor: bool) -> Iterator[tuple[str, ...]]:
    """Each estimator against itself by hand, in processor time, which is what other programs disturb least."""
    for name, case in CASES.items():
        model = case.model(*case.small) if quick else case.model()
        batch = case.inputs(model, case.batch)
        pairs = 3 if quick else 60
        yield (
            f"`{name}`",
            case.model.__name__,
            str(against_itself(name, model, batch, pairs)),
            against_itself_fused(name, model, batch, pairs) if inductor else "not measured",
        )


def against_itself(name: str, model: nn.Module, batch: tuple[Tensor, ...], pairs: int, fused: bool = False) -> Paired:
    """The compiled step and the hand-written one, both eager or both ``fused`` by inductor."""
    case, backend = CASES[name], "inductor" if fused else "eager"
    compiled = scg.compile(
        model, estimator=case.estimator or name, samples=case.samples, backend=backend, example_inputs=batch
    )
    by_hand = torch.compile(case.by_hand, fullgraph=True) if fused else case.by_hand
    state = compiled.estimators["z"] if "z" in compiled.estimators else None
    ours = training_step(lambda: compiled(*batch), compiled)
    hand = training_step(lambda: by_hand(model, *batch, state), compiled)
    return paired(ours, hand, pairs, clock=time.process_time)


def against_itself_fused(name: str, model: nn.Module, batch: tuple[Tensor, ...], pairs: int) -> str:
    try:
        return str(against_itself(name, model, batch, pairs, fused=True))
    except scg.ScgError:
        return "eager only"
    except torch._dynamo.exc.TorchDynamoException:
        return "torch.compile takes no such loss"
    finally:
        torch.compiler.reset()


class SideBySide(nn.Module):
    """As many draws, of one vector each, with one cost."""

    def __init__(self, sites: int, width: int = 8) -> None:
        super().__init__()
        self.encoders = nn.ModuleList([nn.Linear(width, width) for _ in range(sites)])

    def forward(self, x: Tensor) -> Tensor:
        total = torch.zeros_like(x)
        for encoder in self.encoders:
            total = total + scg.sample(Bernoulli(logits=encoder(x)))
        return (total - x).square().mean()


def bench_compile(quick: bool, inductor: bool) -> Iterator[tuple[str, str, str]]:
    """The first call against the number of sites: in a chain with a cost each, and side by side below one cost."""
    sizes = (2, 4) if quick else (25, 50, 100, 200)
    x = torch.randn(32, 8)
    score_function(chain.Chain(1))(x)  # torch's own tracing machinery is imported
    for what, make in {"in a chain": chain.Chain, "side by side": SideBySide}.items():
        times = []
        for size in sizes:
            compiled = score_function(make(size))
            times.append(seconds(lambda compiled=compiled: compiled(x).backward()))  # type: ignore[misc]
        measured = ", ".join(f"{size}: {time:.2f} s" for size, time in zip(sizes, times, strict=True))
        yield f"first call, sites {what}", measured, "at most 2.5x for twice as many"


def bench_gpu(quick: bool, inductor: bool) -> Iterator[tuple[str, str, str]]:
    """The VAE's step where there is CUDA: eager, inductor, and one CUDA graph of forward and backward."""
    if not torch.cuda.is_available():
        return
    model = vae.VAE().cuda()
    x = (torch.rand(100, 784, device="cuda") < 0.3).float()
    pairs = 20 if quick else 300
    compiled = score_function(model)
    hand = training_step(lambda: vae.by_hand(model, x, SAMPLES), model)
    eager = synchronized(training_step(lambda: compiled(x), model))
    yield "VAE on the GPU, eager", str(paired(eager, synchronized(hand), pairs)), "at most 1.05x"
    if inductor:
        fused, hand_fused = score_function(model, backend="inductor"), torch.compile(vae.by_hand, fullgraph=True)
        ours = synchronized(training_step(lambda: fused(x), model))
        theirs = synchronized(training_step(lambda: hand_fused(model, x, SAMPLES), model))
        yield "VAE on the GPU, inductor", str(paired(ours, theirs, pairs)), "at most 1.05x"
    graph = synchronized(cuda_graph(training_step(lambda: compiled(x), model)))
    yield "VAE on the GPU, one CUDA graph against eager by hand", str(paired(graph, synchronized(hand), pairs)), "less"


BENCHMARKS: dict[str, Callable[[bool, bool], Iterator[tuple[str, ...]]]] = {
    "vae": bench_vae,
    "estimators": bench_estimators,
    "chain": bench_chain,
    "local_expectation": bench_local_expectation,
    "hnca": bench_hnca,
    "tokens": bench_tokens,
    "startup": bench_startup,
    "compile": bench_compile,
    "gpu": bench_gpu,
}

HEADS = {"estimators": ("estimator", "model", "eager (wanted: at most 1.10x)", "inductor (at most 1.05x)")}
"""Columns of the tables, where they are not these."""
HEAD = ("what", "measured", "wanted")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=BENCHMARKS, help="one of the benchmarks")
    parser.add_argument("--no-inductor", action="store_true", help="leave out what needs a C++ compiler and minutes")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that all of it runs")
    parser.add_argument("--out", type=Path, default=Path("out/benchmarks.md"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    lines: list[str] = []

    def put(*added: str) -> None:
        lines.extend(added)
        print("\n".join(added), flush=True)

    put(machine())
    above: tuple[str, ...] = ()
    for name in [args.only] if args.only else BENCHMARKS:
        head = HEADS.get(name, HEAD)
        if head != above:
            put("", f"| {' | '.join(head)} |", "|---" * len(head) + "|")
        above = head
        for row in BENCHMARKS[name](args.quick, not args.no_inductor):
            put(f"| {' | '.join(row)} |")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()

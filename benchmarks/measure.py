"""How the benchmarks measure: paired and interleaved, one thread, medians of ratios."""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

Step = Callable[[], object]


@dataclass(frozen=True)
class Paired:
    """Times of two steps that took turns."""

    first: float
    """Median seconds of the first step."""
    second: float
    """Median seconds of the second step."""
    ratio: float
    """Median over the pairs of first / second."""
    low: float
    high: float
    """The quartiles of the ratios."""

    def __str__(self) -> str:
        return (
            f"{self.ratio:.3f}x ({self.low:.3f} to {self.high:.3f}), "
            f"{1e3 * self.first:.2f} ms against {1e3 * self.second:.2f} ms"
        )


def paired(
    first: Step,
    second: Step,
    pairs: int = 200,
    warm_up: int = 10,
    clock: Callable[[], float] = time.perf_counter,
    before: int = 0,
) -> Paired:
    """Runs both steps in turn, the order alternating, so that a busy machine slows both alike.

    With ``clock=time.process_time`` the time that other programs take of a shared processor does not count.

    Args:
        before: steps of a turn before the one that is timed. In training a step follows one of its kind; after one that
            takes many times longer it would find nothing of its own in the processor's caches.
    """
    for _ in range(warm_up):
        first()
        second()
    times: tuple[list[float], list[float]] = ([], [])
    for i in range(pairs):
        for which in (0, 1) if i % 2 else (1, 0):
            for _ in range(before):
                (first, second)[which]()
            start = clock()
            (first, second)[which]()
            times[which].append(clock() - start)
    ratios = [a / b for a, b in zip(*times, strict=True)]
    low, ratio, high = statistics.quantiles(ratios, n=4) if pairs > 1 else ratios * 3
    return Paired(statistics.median(times[0]), statistics.median(times[1]), ratio, low, high)


def seconds(step: Step, clock: Callable[[], float] = time.perf_counter) -> float:
    """Of one run."""
    start = clock()
    step()
    return clock() - start


def synchronized(step: Step) -> Step:
    """Until the GPU has done it."""

    def run() -> None:
        step()
        torch.cuda.synchronize()

    return run


def cuda_graph(step: Step) -> Step:
    """The step recorded once, then replayed; it must keep its gradients' memory."""
    side = torch.cuda.Stream()  # what is allocated at first must not be in the graph
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def peak_bytes(step: Step) -> int:
    """The most memory that one run holds at once beyond what is held before it, as PyTorch's allocator sees it."""
    step()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        step()
    held = peak = 0
    assert prof.profiler is not None and prof.profiler.kineto_results is not None
    events = (event for event in prof.profiler.kineto_results.events() if event.name() == "[memory]")
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def in_new_process(script: str) -> float:
    """The number that a Python script prints last, run on its own; byte code is kept, as where a user runs it."""
    root = Path(__file__).parent.parent
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    for _ in range(2):  # the first one writes it
        done = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=root, env=environment
        )
    return float(done.stdout.split()[-1])


def machine() -> str:
    """One line to print above every table."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        name = next(
            (line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")),
            name,
        )
    return f"{name}, {torch.get_num_threads()} thread, Python {platform.python_version()}, torch {torch.__version__}"

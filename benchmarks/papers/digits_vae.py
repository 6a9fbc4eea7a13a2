"""Van Krieken et al. 2021, section 5, small: the bound a discrete VAE reaches, by estimator.

The model and settings of `benchmarks.digits`: 8 bits between 8 by 8 binary digits, the bound exact over all codes.
"Theirs" is what hand-written estimators came to on the same settings, two seeds; the order is what has to hold.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator

from benchmarks import digits
from benchmarks.papers.setting import Figure

COMPARED = ("enumerate", "score_function", "disarm", "arm")


def run(quick: bool = False) -> Iterator[Figure]:
    from examples.discrete_vae import digits as images

    train, test = images()
    steps, seeds = (3, 1) if quick else (1500, 2)
    found, theirs = {}, {}
    for line in digits.runs():
        name = line.estimator if isinstance(line.estimator, str) else line.estimator.name
        if line.reference is None or name not in COMPARED:
            continue
        repeats = 1 if name == "enumerate" else seeds  # which takes a minute
        results = [digits.train(line, train, test, steps, seed)[0].train for seed in range(repeats)]
        found[line.label], theirs[line.label] = statistics.mean(results), line.reference[0]
    order = [
        ("`enumerate`",),
        ("`score_function`, leave-one-out, 4 draws",),
        ("`disarm`", "`score_function`, leave-one-out, 2 draws", "`arm`"),
        ("`score_function`, moving average",),
        ("`score_function`, no baseline",),
    ]
    above = [float("inf")]
    for group in order:
        for label in group:
            holds = quick or found[label] < min(above)
            yield Figure(f"train bound, {label}", theirs[label], found[label], holds)
        above = [found[label] for label in group]

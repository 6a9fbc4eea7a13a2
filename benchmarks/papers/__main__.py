"""Runs the reproductions: ``python -m benchmarks.papers [--only NAME] [--quick]``; prints a table a paper."""

from __future__ import annotations

import argparse
import time

import torch

from benchmarks.measure import machine
from benchmarks.papers import (
    bayesian_regression,
    digits_vae,
    eight_categories,
    gaussian_costs,
    many_bernoullis,
    one_bernoulli,
    reinmax_bias,
    relax_toy,
    semi_supervised,
)

SETTINGS = {
    module.__name__.rpartition(".")[2]: module
    for module in (
        one_bernoulli,
        eight_categories,
        gaussian_costs,
        many_bernoullis,
        relax_toy,
        reinmax_bias,
        bayesian_regression,
        semi_supervised,
        digits_vae,
    )
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=SETTINGS)
    parser.add_argument("--quick", action="store_true", help="few draws, to see that all of it runs")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(machine())
    failed = 0
    for name in [args.only] if args.only else SETTINGS:
        module, start = SETTINGS[name], time.perf_counter()
        print(f"\n**{(module.__doc__ or '').splitlines()[0]}**\n\n| what | theirs | ours | holds |\n|---|---|---|---|")
        torch.manual_seed(0)
        for figure in module.run(args.quick):
            failed += not figure.holds
            print(figure, flush=True)
        print(f"\n{time.perf_counter() - start:.0f} s")
    if failed and not args.quick:
        raise SystemExit(f"{failed} figures do not hold")


if __name__ == "__main__":
    main()

"""What each step of credit assignment is worth: the variance of the gradient on 20 decisions with a cost each.

From the total cost to the cost-to-go, to what may be taken from it: a moving average, a value function, a critic that
sees the decision as well; and to lambda-returns, which are biased as far as the value function is wrong. The learned
parts read the sufficient context that the compiler finds: of all that came before, the state alone.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli, Normal
from tqdm import trange

import scg
from scg.estimators.actor_critic import ActorCritic
from scg.estimators.critic import Critic
from scg.estimators.learned import Learned
from scg.estimators.score_function import ScoreFunction
from scg.estimators.targets import TDLambda


class Chain(nn.Module):
    """A state that decisions push to and fro, with some noise; it should stay near zero."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(steps))

    def forward(self) -> Tensor:
        x, total = scg.sample(Normal(torch.zeros(()), 1.5), "start"), torch.zeros(())
        for t, logit in enumerate(self.logits):
            push = scg.sample(Bernoulli(logits=logit - x), f"push_{t}")
            x = scg.sample(Normal(0.95 * x + push - 0.5, 0.1), f"x_{t}")
            total = total + scg.cost(0.1 * x**2, f"cost_{t}")
        return total


PLAIN = ScoreFunction(baseline=None)
RUNGS: dict[str, tuple[Any, str]] = {
    "total cost": (PLAIN, "none"),
    "cost-to-go": (PLAIN, "element"),
    "less a moving average": (ScoreFunction(baseline="moving_average"), "element"),
    "less a value function": (ScoreFunction(baseline="learned"), "element"),
    "less a critic": (Critic(), "element"),
    "lambda-returns (biased)": (ActorCritic(Learned(target=TDLambda(0.8))), "element"),
}
"""Name -> (estimator of the decisions, credit): each one step further."""


def variances(estimator: Any, credit: str, *, steps: int, training: int, n: int) -> Tensor:
    """Of the gradient in the logit of each step, once learned parts have seen enough.  ``[steps]``"""
    torch.manual_seed(0)
    chain = Chain(steps)

    def compiled(samples: int) -> scg.CompiledModule:
        chosen = {"push_*": estimator}
        return scg.compile(chain, estimators=chosen, credit=credit, samples=samples, example_inputs=())

    taught = compiled(16)
    learned = list(taught.estimator_parameters())
    optimizer = torch.optim.Adam(learned, lr=2e-2) if learned else None
    for _ in trange(training, desc="training", leave=False, disable=None):
        objective = taught()  # moving averages move with every call
        if optimizer is not None:
            optimizer.zero_grad()
            objective.backward()
            optimizer.step()
    loss = compiled(1)
    loss.load_state_dict(taught.state_dict())
    return scg.gradient_samples(loss, n=n)["logits"].var(0)


COLOURS = ("#808080", "#2b7fc4", "#c4682b", "#2b9a6e", "#b0559b", "#9a7d1a")
"""Seen on white and on black alike."""


def plot(found: dict[str, Tensor], path: Path) -> None:
    """All steps together as bars, and step by step."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    grey = COLOURS[0]
    keys = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
    style: dict[str, Any] = {**dict.fromkeys(keys, grey), "svg.fonttype": "none", "svg.hashsalt": "scg"}
    style |= {"axes.spines.top": False, "axes.spines.right": False, "font.family": "sans-serif"}
    with rc_context(style):
        figure = Figure(figsize=(9, 3.4), layout="constrained", facecolor="none")
        whole, each = figure.subplots(1, 2)
        names, sums = list(found), [float(v.sum()) for v in found.values()]
        bars = whole.barh(names, sums, color=COLOURS, height=0.6)
        whole.bar_label(bars, [f"{value:.3g}" for value in sums], padding=3)
        whole.set(xscale="log", xlim=(min(sums) / 2, 3 * max(sums)), title="variance of the gradient, all steps")
        whole.invert_yaxis()
        for (name, values), colour, marker in zip(found.items(), COLOURS, "sov^DX", strict=True):
            each.plot(values, color=colour, marker=marker, markersize=4, linewidth=1, label=name)
        each.set(yscale="log", xlabel="step", title="of each step's logit")
        each.legend(fontsize="x-small", frameon=False, loc="lower left")
        each.xaxis.get_major_locator().set_params(integer=True)
        for axes in (whole, each):
            axes.set_facecolor("none")
        figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path("out"))
    parser.add_argument("--smoke-test", action="store_true")
    args = parser.parse_args()
    steps, training, n = (4, 3, 10) if args.smoke_test else (args.steps, 600, 1000)
    found = {}
    for name, (estimator, credit) in RUNGS.items():
        found[name] = variances(estimator, credit, steps=steps, training=training, n=n)
        print(f"{name:24}{float(found[name].sum()):10.3g}", flush=True)
    args.out.mkdir(exist_ok=True)
    try:
        plot(found, args.out / "credit_on_a_chain.svg")
    except ImportError:
        print("for the plot: pip install 'scg[plot]'")


if __name__ == "__main__":
    main()

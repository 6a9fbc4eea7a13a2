"""LaTeX of real programs, word for word, and names that no formula may break on."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli, Normal

import scg
from scg.backends.latex import symbol
from scg.estimators.score_function import ScoreFunction
from tests.problems import PROBLEMS


class VAE(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enc, self.dec = nn.Linear(6, 2), nn.Linear(2, 6)

    def forward(self, x: Tensor) -> Tensor:
        z = Bernoulli(logits=self.enc(x)).sample()
        nll = scg.cost(-Bernoulli(logits=self.dec(z)).log_prob(x).sum(-1), "nll")
        return nll.mean()


X = torch.ones(5, 6)


def test_a_vae_word_for_word() -> None:
    compiled = scg.compile(VAE(), samples=4, estimator="score_function", example_inputs=(X,))
    lines = str(compiled.formula()).splitlines()
    assert lines == [
        r"\begin{aligned}",
        r"\mathcal{L}(\theta) &= \mathbb{E}_{z}\Big[ \tfrac{1}{5} \sum \mathit{nll} \Big] \\",
        r"\mathit{nll} &= -\mathrm{sum}(\log \mathrm{Bernoulli}(x;\, \mathrm{logits}_{\mathtt{dec}}(z))) \\",
        r"z &\sim \mathrm{Bernoulli}(\mathrm{logits}_{\mathtt{enc}}(x)) \\",
        r"\hat g_{z} &= (Q - b)\, \nabla_\theta \log p_\theta(z),\quad \theta = \mathtt{enc},\quad "
        r"Q = \tfrac{1}{5} \sum_{e \succ z} {\mathit{nll}}_e,\quad b = \text{leave\_one\_out} \\",
        r"\mathcal{S} &= \frac{1}{4} \sum_k \Big[ \tfrac{1}{5} \sum \mathit{nll} \Big] + "
        r"\sum_{s \in \{z\}} (t_s - \bot(t_s)),\quad \nabla t_s = \hat g_s,\quad \bot = \text{stop}",
        r"\end{aligned}",
    ]
    assert compiled.formula()._repr_latex_().startswith("$$\n\\begin{aligned}")


def test_sites_that_need_no_term() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mu = nn.Parameter(torch.zeros(()))

        def forward(self) -> Tensor:
            eps = Normal(self.mu, 1.0).rsample()
            z_1 = Bernoulli(logits=eps).sample()
            return (z_1 - 2 * eps) ** 2

    found = scg.compile(Both(), example_inputs=()).formula()
    assert found.sites == (
        r"\mathit{eps} &\sim \mathrm{Normal}(\mathrm{loc}_{\mathtt{mu}}, \mathrm{scale})",
        r"z_{1} &\sim \mathrm{Bernoulli}(\mathrm{logits}(\mathit{eps}))",
    )
    assert (
        r"\hat g_{\mathit{eps}} &= \nabla_\theta f(g_\theta(\epsilon)),\quad \theta = \mathtt{mu}" in found.gradients[0]
    )
    assert r"\mathcal{S} &= \sum_{z_{1}} p(z_{1})\, \Big[" in found.surrogate and "t_s" not in found.surrogate


def test_the_second_order_surrogate_has_boxes() -> None:
    compiled = scg.compile(VAE(), estimator=ScoreFunction(baseline=None), order=2, example_inputs=(X,))
    assert r"\square(x) = \exp(x - \bot(x))" in compiled.formula().surrogate
    assert ",\\quad b = 0" in compiled.formula().gradients[0]


@pytest.mark.parametrize("name", ["chain", "learned_coefficient", "unrolled_loop", "opaque_cost", "shared_logits"])
def test_braces_and_delimiters_balance(name: str) -> None:
    problem = PROBLEMS[name]()
    compiled = scg.compile(problem.model, example_inputs=problem.calls[0])
    text = str(compiled.formula())
    bare = re.sub(r"\\[{}]", "", text)
    assert bare.count("{") == bare.count("}")
    assert text.count(r"\Big[") == text.count(r"\Big]")
    assert all(line.count("&") == 1 for line in text.splitlines()[1:-1])


def test_every_estimator_is_written() -> None:
    problem = PROBLEMS["tied_batch"]()
    for name in scg.ESTIMATORS:
        try:
            compiled = scg.compile(problem.model, estimator=name, example_inputs=problem.calls[0])
        except scg.EstimatorError:
            continue
        (gradient,) = compiled.formula().gradients
        assert scg.ESTIMATORS[name].formula in gradient


def test_symbols() -> None:
    assert [symbol(name) for name in ("z", "z1", "z_2", "theta", "nll_3", "a_b", "x%{")] == [
        "z", "z_{1}", "z_{2}", r"\theta", r"\mathit{nll}_{3}", r"\mathit{a\_b}", r"\mathit{x\%\{}",
    ]  # fmt: skip

"""``log q(z) - log p(z)`` however it is spelled is the divergence; what only looks like it stays sampled."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import (
    Bernoulli,
    Beta,
    Categorical,
    Dirichlet,
    Distribution,
    Gamma,
    Gumbel,
    Independent,
    Laplace,
    LogNormal,
    LowRankMultivariateNormal,
    MultivariateNormal,
    Normal,
    OneHotCategorical,
    Poisson,
    kl_divergence,
)

import scg
from scg.backends.views import picture
from scg.estimators.reparam import Reparam
from scg.ir import Expected
from scg.passes.closed_forms import ClosedForms
from scg.passes.normalize import normalize
from tests.law2 import expected_estimate
from tests.passes.closed_forms.oracle import gradients

BETA = 0.3


class Pair(nn.Module):
    """A draw of q, a fixed decoder, and a cost that should hold ``beta KL(q, p)`` averaged over the first dim."""

    beta: Tensor

    def __init__(self, cost: Callable[..., Any], family: Callable[[Tensor, Tensor], Distribution] = Normal) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)

        def positive(*size: int) -> nn.Parameter:
            return nn.Parameter(0.5 + torch.rand(*size, dtype=torch.float64, generator=generator))

        self.cost, self.family = cost, family
        self.a, self.b, self.c, self.d = positive(2, 3), positive(2, 3), positive(3), positive(3)
        self.register_buffer("beta", torch.tensor(BETA, dtype=torch.float64))

    def laws(self) -> tuple[Distribution, Distribution]:
        return self.family(self.a, self.b), self.family(self.c, self.d)

    def forward(self) -> Any:
        return self.cost(self, *self.laws())

    def divergence(self) -> Tensor:
        q, p = self.laws()
        kl = kl_divergence(q, p.expand(q.batch_shape))
        return BETA * kl.reshape(2, -1).sum(-1).mean()


def _elements(model: Pair, q: Distribution, p: Distribution) -> Tensor:
    z = q.sample()
    return model.beta * (q.log_prob(z) - p.log_prob(z)).sum() / 2


def _independent(model: Pair, q: Distribution, p: Distribution) -> Tensor:
    q, p = Independent(q, 1), Independent(p.expand((2, 3)), 1)
    z = q.rsample()
    return (model.beta * (q.log_prob(z) - p.log_prob(z))).mean()


def _one_independent(model: Pair, q: Distribution, p: Distribution) -> Tensor:
    joint = Independent(q, 1)
    z = joint.sample()
    return model.beta * (joint.log_prob(z) - p.log_prob(z).sum(-1)).mean()


def _two_costs(model: Pair, q: Distribution, p: Distribution) -> Tensor:
    z = q.sample()
    prior = scg.cost(-p.log_prob(z).sum(-1), "prior")
    posterior = scg.cost(q.log_prob(z).sum(-1), "posterior")
    return BETA * posterior.mean() + BETA * prior.mean()


def _among_others(model: Pair, q: Distribution, p: Distribution) -> Tensor:
    z = q.sample()
    other = (q.scale**2).sum(-1) if isinstance(q, Normal) else torch.zeros(2, dtype=torch.float64)
    elbo = p.log_prob(z).sum(-1) - other - q.log_prob(z).sum(-1) + other
    return -(elbo * model.beta).mean()


def _negated_ratio(model: Pair, q: Distribution, p: Distribution) -> Tensor:
    z = q.sample()
    ratio = p.log_prob(z.detach()) - q.log_prob(z)
    return (ratio.reshape(-1) * -model.beta).sum() * 0.5


def _own_draws(model: Pair, q: Distribution, p: Distribution) -> Tensor:
    z = q.sample(torch.Size([4]))
    return model.beta * (q.log_prob(z) - p.log_prob(z)).sum(-1).mean()


def _same_law_twice(model: Pair, q: Distribution, p: Distribution) -> Tensor:
    z = q.sample()
    again = Normal(model.a, model.b)
    return model.beta * (again.log_prob(z) - p.log_prob(z)).sum(-1).mean()


SPELLINGS = (_elements, _independent, _one_independent, _two_costs, _among_others, _negated_ratio, _own_draws,
             _same_law_twice)  # fmt: skip


@pytest.mark.parametrize("spelling", SPELLINGS, ids=lambda f: f.__name__.strip("_"))
def test_every_spelling_is_the_divergence(spelling: Callable[..., Any]) -> None:
    model = Pair(spelling)
    compiled = scg.compile(model, closed_forms=True)
    assert_equal(compiled(), model)
    assert [node.form_name for node in compiled.graph.of(Expected)] == ["kl_divergence"]
    assert not compiled.graph.sites["z"].credits
    (note,) = compiled.graph.notes
    assert note.startswith("closed form over %z: kl_divergence for %") and "test_divergences.py:" in note
    assert note in str(compiled.explain())


def assert_equal(loss: Tensor, model: Pair) -> None:
    wanted = model.divergence()
    torch.testing.assert_close(loss, wanted, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(gradients(loss, model), gradients(wanted, model), rtol=1e-9, atol=1e-11)


def _sum_elements(model: Pair, q: Distribution, p: Distribution) -> Tensor:
    z = q.sample()
    return model.beta * (q.log_prob(z) - p.log_prob(z)).reshape(2, -1).sum(-1).mean()


FAMILIES: dict[str, Callable[[Tensor, Tensor], Distribution]] = {
    "Bernoulli": lambda x, y: Bernoulli(logits=x),
    "Categorical": lambda x, y: Categorical(logits=x),
    "OneHotCategorical": lambda x, y: OneHotCategorical(logits=x),
    "Gamma": Gamma,
    "Beta": Beta,
    "Dirichlet": lambda x, y: Dirichlet(x),
    "Poisson": lambda x, y: Poisson(x),
    "Laplace": Laplace,
    "LogNormal": LogNormal,
    "Gumbel": Gumbel,
    "MultivariateNormal": lambda x, y: MultivariateNormal(x, scale_tril=torch.diag_embed(y)),
    "LowRankMultivariateNormal": lambda x, y: LowRankMultivariateNormal(x, 0.2 * y[..., None], y),
}


QUICK = {"Bernoulli", "OneHotCategorical", "Poisson", "LogNormal", "MultivariateNormal"}


@pytest.mark.parametrize("family", [pytest.param(f, marks=[pytest.mark.slow] * (f not in QUICK)) for f in FAMILIES])
def test_families(family: str) -> None:
    model = Pair(_sum_elements, FAMILIES[family])
    compiled = scg.compile(model, closed_forms=True, samples=2)
    assert_equal(compiled(), model)


@pytest.mark.parametrize("family", ["Gamma", "OneHotCategorical"])
def test_alone_they_are_entropy_and_expected_log_density(family: str) -> None:
    def cost(model: Pair, q: Distribution, p: Distribution) -> Tensor:
        z = q.sample()
        log_q, log_p = (law.log_prob(z).reshape(2, -1).sum(-1).mean() for law in (q, p))
        return model.beta * (log_q - 0.5 * log_p)

    model = Pair(cost, FAMILIES[family])
    found = scg.compile(model, closed_forms=True)()
    q, p = model.laws()
    p = p.expand(q.batch_shape)
    wanted = BETA * (-0.5 * q.entropy() + 0.5 * kl_divergence(q, p)).reshape(2, -1).sum(-1).mean()
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(gradients(found, model), gradients(wanted, model))


# -- what must stay sampled -------------------------------------------------------------------------------------------
def _drawn_as_data(model: Pair, q: Distribution, p: Distribution) -> Tensor:
    with torch.no_grad():
        z = q.sample()
    return (q.log_prob(z) - p.log_prob(z)).sum()


def _replayed(model: Pair, q: Distribution, p: Distribution) -> Tensor:
    z = scg.sample(q, "z", value=torch.ones(2, 3, dtype=torch.float64))
    reward = scg.depends(torch.ones(2, dtype=torch.float64), on=z, dims=("tied",))
    return (q.log_prob(z) - p.log_prob(z)).sum() + reward.sum()


def _stopped_rsample(model: Pair, q: Distribution, p: Distribution) -> Tensor:
    z = q.rsample()
    return (q.log_prob(z.detach()) - p.log_prob(z.detach())).sum() + z.exp().sum()


def _stopped_ratio(model: Pair, q: Distribution, p: Distribution) -> Tensor:
    z = q.sample()
    return (q.log_prob(z) - p.log_prob(z)).detach().sum()


def _weighted_by_the_draw(model: Pair, q: Distribution, p: Distribution) -> Tensor:
    z = q.sample()
    return (torch.sigmoid(z) * (q.log_prob(z) - p.log_prob(z))).sum()


def _weighted_by_what_follows(model: Pair, q: Distribution, p: Distribution) -> Tensor:
    z = q.sample()
    mask = scg.sample(Bernoulli(logits=z), "mask", estimator="score_function")
    return (mask * (q.log_prob(z) - p.log_prob(z))).sum()


def _squared(model: Pair, q: Distribution, p: Distribution) -> Tensor:
    z = q.sample()
    return ((q.log_prob(z) - p.log_prob(z)) ** 2).sum()


def _prior_of_the_draw(model: Pair, q: Distribution, p: Distribution) -> Tensor:
    z = q.sample()
    return Laplace(z.exp(), 1.0).log_prob(z).sum()


def _bound(model: Pair, q: Distribution, p: Distribution) -> Tensor:
    z = q.sample()
    return scg.multisample((q.log_prob(z) - p.log_prob(z)).sum(-1)).mean()


SAMPLED = (_drawn_as_data, _replayed, _stopped_rsample, _stopped_ratio, _weighted_by_the_draw,
           _weighted_by_what_follows, _squared, _prior_of_the_draw, _bound)  # fmt: skip


@pytest.mark.parametrize("cost", SAMPLED, ids=lambda f: f.__name__.strip("_"))
def test_left_alone(cost: Callable[..., Any]) -> None:
    model = Pair(cost)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # _stopped_ratio looks like a hand-written surrogate
        compiled, plain = (scg.compile(model, closed_forms={"z": on}, samples=2) for on in (True, False))
        for module in (compiled, plain):
            torch.manual_seed(0)
            module()
    assert not compiled.graph.of(Expected) and str(compiled.graph) == str(plain.graph)


def test_weights_that_do_not_follow_from_the_draw_are_coefficients() -> None:
    def cost(model: Pair, q: Distribution, p: Distribution) -> Tensor:
        mask = scg.sample(Bernoulli(logits=model.c), "mask", estimator="score_function")
        z = q.sample()
        return (mask * (q.log_prob(z) - p.log_prob(z))).sum()

    model = Pair(cost)
    compiled = scg.compile(model, closed_forms={"z": True, "*": False})
    compiled()
    assert [node.form_name for node in compiled.graph.of(Expected)] == ["kl_divergence"]
    sites = compiled.graph.sites
    assert sites["mask"].credits and not sites["z"].credits


def test_the_path_derivative_keeps_its_log_density_sampled() -> None:
    def cost(model: Pair, q: Distribution, p: Distribution) -> Tensor:
        z = q.sample()
        return (q.log_prob(z) - p.log_prob(z)).sum() + z.exp().sum()

    compiled = scg.compile(Pair(cost), estimator=Reparam(path_derivative=True), closed_forms=True)
    compiled()
    assert not compiled.graph.of(Expected)
    assert compiled.graph.notes == (
        "no closed forms for %z: reparam differentiates its sampled log density in a way of its own",
    )


class Shifted(Normal):
    """A subclass that is no Normal: neither its mean nor its divergences are inherited."""

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        return super().rsample(sample_shape) + 1.0

    def log_prob(self, value: Tensor) -> Tensor:
        return super().log_prob(value - 1.0)  # type: ignore[no-untyped-call]


def test_a_subclass_inherits_no_closed_form() -> None:
    def cost(model: Pair, q: Distribution, p: Distribution) -> Tensor:
        z = q.rsample()
        return (q.log_prob(z) - p.log_prob(z) + z).sum()

    compiled = scg.compile(Pair(cost, Shifted), closed_forms=True)
    compiled()
    assert not compiled.graph.of(Expected) and not compiled.graph.notes


# -- the rest of the program ------------------------------------------------------------------------------------------
def _with_outputs(model: Pair, q: Distribution, p: Distribution) -> tuple[Tensor, Tensor, Tensor]:
    z = q.sample()
    kl = (q.log_prob(z) - p.log_prob(z)).sum(-1)
    return (z.exp().sum(-1) + kl).mean(), kl, z


def test_other_outputs_come_from_the_draw() -> None:
    model = Pair(_with_outputs)
    torch.manual_seed(0)
    loss, kl, z = scg.compile(model, closed_forms=True)()
    q, p = model.laws()
    torch.testing.assert_close(kl, (q.log_prob(z) - p.log_prob(z)).sum(-1))
    torch.testing.assert_close(loss, (z.exp().sum(-1) + kl_divergence(q, p).sum(-1)).mean())


def test_switches() -> None:
    def cost(model: Pair, q: Distribution, p: Distribution) -> Tensor:
        a, b = scg.sample(q, "a"), scg.sample(q, "b")
        return sum(((q.log_prob(z) - p.log_prob(z)).sum() for z in (a, b)), torch.zeros(()))

    model = Pair(cost)

    def closed(closed_forms: Any) -> set[str]:
        compiled = scg.compile(model, closed_forms=closed_forms)
        compiled()
        return {name for name, site in compiled.graph.sites.items() if not site.credits}

    assert closed(False) == set()
    assert closed(True) == closed({"*": True}) == {"a", "b"}
    assert closed({"a": False, "*": True}) == {"b"}
    assert closed({"a": True}) == {"a"}
    with pytest.raises(scg.EstimatorError, match="closed_forms={'c': …} matches no site; sites: a, b"):
        closed({"c": True})


def test_a_second_derivative_is_that_of_the_divergence() -> None:
    model = Pair(_elements)
    found = scg.compile(model, closed_forms=True, order=2)()
    for loss in (found, model.divergence()):
        (first,) = torch.autograd.grad(loss, model.b, create_graph=True)
        second = torch.autograd.grad(first.square().sum(), model.b)[0]
        if loss is found:
            kept = second
    torch.testing.assert_close(kept, second)


@pytest.mark.parametrize("estimator", ["enumerate", "score_function"])
def test_a_divergence_that_is_a_coefficient_too_stays_one(estimator: str) -> None:
    def cost(model: Pair, q: Distribution, p: Distribution) -> Tensor:
        z = q.sample()
        kl = (q.log_prob(z) - p.log_prob(z)).sum()
        y = scg.sample(Bernoulli(logits=model.c), "y", estimator=estimator)
        return kl + kl * torch.exp(y).sum()

    model = Pair(cost)
    kl = kl_divergence(*model.laws()).sum()
    wanted = kl * (1 + (1 + model.c.sigmoid() * (math.e - 1)).sum())
    params = dict(model.named_parameters())
    found, gradient = expected_estimate(scg.compile(model, closed_forms=True, example_inputs=()), params)
    torch.testing.assert_close(found, wanted.detach())
    torch.testing.assert_close(list(gradient.values()), gradients(wanted, model))


def test_a_second_run_changes_nothing() -> None:
    graph = normalize(scg.trace(Pair(_two_costs)))
    once = ClosedForms(True)(graph)
    assert once != graph and ClosedForms(True)(once) == once


def test_the_picture_and_the_formula_show_the_replaced_term() -> None:
    compiled = scg.compile(Pair(_with_outputs), closed_forms=True)
    compiled()
    boxes = [[text for line in box.lines for text, _ in line] for box in picture(compiled.graph).boxes]
    assert ["kl_divergence(Normal, Normal) · sum", "f64[2]", "closed form"] in boxes
    assert "kl" in compiled.graph.costs and "kl" not in compiled.graph.sites["z"].credits
    assert r"\mathrm{kl\_divergence}\big(\mathrm{Normal}" in str(compiled.formula())
    assert "expected f64[2, 3] kl_divergence(%q, %p)" in " ".join(str(compiled.graph).split())

"""gradcheck: right programs pass, biased estimators are measured, planted faults are traced to their site."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli, Distribution, Normal, Uniform

import scg
from scg.analysis.edges import element_edge
from scg.analysis.influence import Relation
from scg.backends import coefficients
from scg.estimators.arm import ARM
from scg.estimators.base import YES, ScoreEstimator, SiteContext, SiteInfo, Support
from scg.estimators.baselines import Baseline, LeaveOneOut, MovingAverage
from scg.estimators.reparam import Reparam
from scg.estimators.score_function import ScoreFunction
from scg.ir import CreditEdge, Sample
from scg.passes import credit as credit_pass

F64 = torch.float64


class Bits(nn.Module):
    """Two examples with two bits each; both bits of an example meet in its cost."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([[0.4, -0.3], [0.9, 0.2]], dtype=F64))
        self.v = nn.Parameter(torch.tensor([0.7, -0.4], dtype=F64))

    def forward(self) -> Tensor:
        z = Bernoulli(logits=self.w).sample()
        return ((z @ self.v + z.prod(-1) + 1.0) ** 2).mean()


class TwoSites(nn.Module):
    """An inner site whose parameters see the draw of an outer one."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([0.5, -0.4], dtype=F64))

    def forward(self) -> Tensor:
        a = Bernoulli(logits=self.w[0]).sample()
        b = Bernoulli(logits=self.w[1] + 1.5 * a).sample()
        return (2 * a + 3 * b - 0.7) ** 2


class Running(nn.Module):
    """The cost of each step sees the draws up to it."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([0.4, -0.3, 0.8], dtype=F64))

    def forward(self) -> Tensor:
        z = Bernoulli(logits=self.w).sample()
        return ((z.cumsum(0) + 0.3) ** 2).mean()


class Threshold(nn.Module):
    """A jump behind a Normal draw."""

    def __init__(self) -> None:
        super().__init__()
        self.mu = nn.Parameter(torch.tensor([0.3, -0.2], dtype=F64))

    def forward(self) -> Tensor:
        z = Normal(self.mu, 1.0).rsample()
        return ((z > 0).double() * 2 + z).sum()


# -- estimators with a fault each -----------------------------------------------------------------------------------
@dataclass(frozen=True)
class DroppedDetach(ScoreEstimator):
    """The score function, its multiplier with a gradient of its own."""

    name: ClassVar[str] = "dropped_detach"

    @classmethod
    def supports(cls, site: SiteInfo) -> Support:
        return YES

    def term(self, context: SiteContext) -> Tensor:
        assert isinstance(context.dist, Bernoulli)
        return (context.signal - 3 * context.dist.probs) * context.log_prob


class SeesItsSample(Baseline):
    name = "sees_its_sample"

    def value(self, context: SiteContext) -> Tensor:
        return 2 * context.value


class WholeMean(LeaveOneOut):
    """K where K - 1 belongs."""

    name = "whole_mean"

    def advantage(self, context: SiteContext) -> Tensor:
        return context.signal - context.signal.mean(context.iid, keepdim=True)


class Stale(MovingAverage):
    """Reads after the update: this step's signal is in it."""

    name = "stale"

    def value(self, context: SiteContext) -> Tensor:
        if context.training:
            context.state.update(context.signal)
        return context.state.read()


class WrongSign(ARM):
    name = "wrong_sign"

    def term(self, context: SiteContext) -> Tensor:
        return -super().term(context)


class AnyPath(Reparam):
    name = "any_path"

    @classmethod
    def supports(cls, site: SiteInfo) -> Support:
        return YES


@dataclass(frozen=True)
class Silent(ScoreEstimator):
    """Gives no term: the site is left out of the surrogate."""

    name: ClassVar[str] = "silent"

    @classmethod
    def supports(cls, site: SiteInfo) -> Support:
        return YES

    def term(self, context: SiteContext) -> Tensor:
        return 0 * context.log_prob


class Merged(ScoreFunction):
    """All samples are one draw."""

    name = "merged"

    def draw(self, dist: Distribution, shape: torch.Size) -> Tensor:
        draw = super().draw(dist, torch.Size())
        return draw.expand(*shape, *draw.shape[-len(dist.batch_shape) :]).clone()


@dataclass(frozen=True)
class Fault:
    """What is planted, and who must be named."""

    model: type[nn.Module]
    part: str
    name: str
    site: str | None
    options: dict[str, Any] = field(default_factory=dict)
    plant: Callable[[pytest.MonkeyPatch], None] = lambda monkeypatch: None


def _baseline(baseline: Baseline) -> ScoreFunction:
    return ScoreFunction(baseline=baseline)


def _wrong_coefficient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sum where the objective has a mean."""
    right = coefficients._compress

    def wrong(gradient: Tensor) -> float | Tensor:
        found = right(gradient)
        return found * gradient.numel() if isinstance(found, float) else found

    monkeypatch.setattr(coefficients, "_compress", wrong)


def _tied_where_mixed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Element b of the cost is said to see element b of the site alone."""

    def wrong(site: Sample, value: str, relation: Relation) -> CreditEdge:
        if relation.shape == site.tensor.shape:
            return CreditEdge(site.name, value, (0,), (False,), ("tied",))
        return element_edge(site, value, relation)

    monkeypatch.setattr(credit_pass, "element_edge", wrong)


FAULTS = {
    "dropped detach": Fault(Bits, "estimator", "dropped_detach", "z", {"estimator": DroppedDetach()}),
    "baseline sees its sample": Fault(
        Bits, "baseline", "sees_its_sample", "z", {"estimator": _baseline(SeesItsSample())}
    ),
    "wrong sign in ARM": Fault(Bits, "estimator", "wrong_sign", "z", {"estimator": WrongSign()}),
    "K for K - 1": Fault(
        TwoSites, "baseline", "whole_mean", "a", {"estimators": {"a": _baseline(WholeMean())}, "samples": 2}
    ),
    "reparam through a threshold": Fault(Threshold, "estimator", "any_path", "z", {"estimator": AnyPath()}),
    "missing inner score": Fault(TwoSites, "estimator", "silent", "b", {"estimators": {"b": Silent()}}),
    "wrong coefficient of a mean": Fault(
        Bits, "pass", "split_costs", "z", {"estimator": "score_function", "samples": 2}, _wrong_coefficient
    ),
    "merged samples": Fault(Bits, "estimator", "merged", "z", {"estimator": Merged(), "samples": 2}),
    "a tied dim that is not": Fault(
        Running, "pass", "assign_credit", "z", {"estimator": "score_function", "samples": 2}, _tied_where_mixed
    ),
    "stale moving average": Fault(Bits, "baseline", "stale", "z", {"estimator": _baseline(Stale(decay=0.3))}),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_caught_and_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fault = FAULTS[name]
    fault.plant(monkeypatch)
    check = scg.gradcheck(scg.compile(fault.model(), **fault.options), n=300)
    assert not check, check
    (suspect,) = check.suspects
    assert (suspect.part, suspect.name, suspect.site) == (fault.part, fault.name, fault.site), check
    assert fault.site is None or suspect.loc.startswith("test_gradcheck.py:")


@pytest.mark.parametrize("model", [Bits, TwoSites, Running, Threshold])
@pytest.mark.parametrize("options", [{}, {"estimator": "score_function", "samples": 2}], ids=["auto", "leave_one_out"])
def test_a_right_program_passes(model: type[nn.Module], options: dict[str, Any]) -> None:
    check = scg.gradcheck(scg.compile(model(), **options), n=300)
    assert check.passed and not check.suspects, check


def test_a_declared_bias_is_measured_and_passes() -> None:
    check = scg.gradcheck(scg.compile(Bits(), estimator="straight_through"), n=300)
    verdicts = {found.name: found.verdict for found in check.parameters}
    assert check and verdicts == {"w": "biased, as declared", "v": "ok"}


class Stretched(nn.Module):
    """A uniform draw whose bound is learned: nothing for the score function."""

    def __init__(self) -> None:
        super().__init__()
        self.top = nn.Parameter(torch.tensor([1.5, 2.0], dtype=F64))

    def forward(self) -> Tensor:
        z = Uniform(torch.zeros(2, dtype=F64), self.top).rsample()
        return (z**2).sum()


def test_references_of_a_continuous_program() -> None:
    model = Stretched()
    compiled = scg.compile(model)
    truth = {"top": 2 * model.top.detach() / 3}
    assert scg.gradcheck(compiled, n=200, reference=truth).passed
    assert not scg.gradcheck(compiled, n=200, reference={"top": -truth["top"]}, blame=False).passed
    found = scg.gradcheck(compiled, n=200)
    assert found.passed and len(found.parameters) == 1 and found.reference.startswith("finite differences")
    jump = scg.compile(Threshold())
    score, shifts = (scg.gradcheck(jump, n=200, reference=way) for way in ("score_function", "finite_differences"))
    assert score.passed and shifts.passed and "score function" in score.reference
    exact = 1 + 2 * Normal(0.0, 1.0).log_prob(torch.tensor([0.3, -0.2])).exp()  # d/dmu of E[2 1[z > 0] + z]
    for check in (score, shifts):
        (mu,) = check.parameters
        assert mu.gradient == pytest.approx(float(exact.max()), rel=0.25)
    with pytest.raises(scg.EstimatorError, match="reference='guess' must be one of"):
        scg.gradcheck(jump, reference="guess")


def test_nothing_is_left_changed() -> None:
    compiled = scg.compile(Bits(), estimator=ScoreFunction(baseline="moving_average"))
    compiled()
    state = {key: value.clone() for key, value in compiled.state_dict().items()}
    generator = torch.get_rng_state()
    check = scg.gradcheck(compiled, n=50)
    assert torch.equal(generator, torch.get_rng_state())
    for key, value in compiled.state_dict().items():
        torch.testing.assert_close(value, state[key], rtol=0, atol=0)
    assert "passed" in str(check) and check.to_html().count("<table>") == 1


def test_too_few_draws_are_said_to_be_too_few() -> None:
    compiled = scg.compile(Bits(), estimator=ScoreFunction(baseline=None))
    (w, _) = scg.gradcheck(compiled, n=3).parameters
    assert w.verdict == "too noisy"

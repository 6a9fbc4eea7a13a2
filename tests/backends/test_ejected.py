"""The generated code as a module of its own: the same value and the same gradients for the same seed, without scg."""

from __future__ import annotations

import copy
import importlib.util
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Bernoulli, Normal, VonMises

import scg
from scg.estimators.actor_critic import ActorCritic
from scg.estimators.baselines import Baseline, MovingAverage
from scg.estimators.critic import Critic, CriticOnly
from scg.estimators.learned import InputDependent, Learned
from scg.estimators.nvil import NVIL
from scg.estimators.optimal_scale import OptimalScale
from scg.estimators.score_function import ScoreFunction
from scg.estimators.self_critic import SelfCritic
from scg.estimators.targets import TD, TDLambda
from scg.pipeline import CompiledModule
from tests.problems import PROBLEMS

CASES = [
    ("tied_batch", "score_function", 1), ("tied_batch", "score_function", 2), ("chain", "auto", 1),
    ("tied_batch", "disarm", 2), ("tied_batch", "arm", 1), ("tied_batch", "unordered_set", 1),
    ("tied_batch", "sum_and_sample", 1), ("tied_batch", "without_replacement", 1), ("unrolled_loop", "enumerate", 1),
    ("tied_batch", "local_expectation", 1), ("chain", "measure_valued", 2), ("tied_batch", "bitflip", 2),
    ("tied_batch", "relax", 1), ("tied_batch", "rebar", 2), ("tied_batch", "muprop", 1),
    ("tied_batch", "gumbel_softmax", 1), ("tied_batch", "reinmax", 1), ("tied_batch", "gumbel_rao", 1),
    ("opaque_cost", "bitflip", 2), ("opaque_cost", "score_function", 2), ("not_differentiable", "auto", 2),
    ("reparam_above_both", "auto", 2), ("mixed_batch", "score_function", 2), ("learned_coefficient", "auto", 1),
    ("integer_index", "auto", 1), ("detached", "score_function", 2), ("chain", "spsa", 2),
]  # fmt: skip


def arguments(compiled: CompiledModule, args: tuple[Any, ...]) -> list[Tensor]:
    """What ``forward`` of the ejected module takes, as leaves of their own."""
    bound = compiled._bound(args, {})
    tensors = [args[at] for at in bound.program.inputs]
    tensors += [table[key] for table, key in bound.tables] + list(bound.program.state)
    return [copy.deepcopy(tensor.detach()).requires_grad_(tensor.requires_grad) for tensor in tensors]


def same(compiled: CompiledModule, args: tuple[Any, ...], folder: Path) -> str:
    """Asserts that the saved and imported text does what the compiled module does, and returns the text."""
    text = compiled.code
    path = folder / "a_step.py"
    path.write_text(text)
    spec = importlib.util.spec_from_file_location("a_step", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    mine = arguments(compiled, args)
    bound = compiled._bound(args, {})
    live = [args[at] for at in bound.program.inputs] + [table[key] for table, key in bound.tables]
    live += list(bound.program.state)
    for tensor in live:
        tensor.grad = None
    torch.manual_seed(3)
    expected = compiled(*args)
    torch.manual_seed(3)
    found = module.forward(*mine)
    assert type(found) is type(expected)
    mine_loss, loss = _objective(found), _objective(expected)
    assert torch.equal(mine_loss, loss)
    if loss.requires_grad:
        torch.autograd.backward(loss)
        torch.autograd.backward(mine_loss)
    for theirs, own in zip(live, mine, strict=True):
        assert torch.equal(theirs, own), "state moved differently"
        assert (theirs.grad is None) == (own.grad is None)
        if theirs.grad is not None and own.grad is not None:
            assert torch.equal(theirs.grad, own.grad)
    assert "def forward" in text and "import scg" not in text and "from scg" not in text
    return text


def _objective(out: Any) -> Tensor:
    found = out["loss"] if isinstance(out, dict) else out[0] if isinstance(out, tuple) else out
    assert isinstance(found, Tensor)
    return found


@pytest.mark.parametrize(("name", "estimator", "samples"), CASES)
def test_the_same_gradients(name: str, estimator: str, samples: int, tmp_path: Path) -> None:
    problem = PROBLEMS[name]()
    compiled = scg.compile(problem.model, estimator=estimator, samples=samples, example_inputs=problem.calls[0])
    same(compiled, problem.calls[0], tmp_path)


def test_likelihoods_below_bits(tmp_path: Path) -> None:
    """Of the next layer's bits and of a class, in products of factors."""
    first, second, last = nn.Linear(3, 4), nn.Linear(4, 5), nn.Linear(5, 3)

    def model(x: Tensor, y: Tensor) -> Tensor:
        z = scg.sample(Bernoulli(logits=second(scg.sample(Bernoulli(logits=first(x))))))
        return F.cross_entropy(last(z), y, reduction="none").mean()

    batch = (torch.randn(6, 3), torch.tensor([0, 1, 2, 2, 1, 0]))
    text = same(scg.compile(model, estimator="hnca", example_inputs=batch), batch, tmp_path)
    assert "def log_ratio_of_bits" in text and "def log_ratio_of_class" in text


class Names(nn.Module):
    """Parameters called what the module's own text calls things."""

    def __init__(self) -> None:
        super().__init__()
        for name, value in {"torch": torch.tensor([0.3, -0.2]), "F": torch.tensor(0.5)}.items():
            self.register_parameter(name, nn.Parameter(value))
        self.register_buffer("math", torch.arange(100.0))
        self.a, self.a_weight = nn.Linear(1, 1), nn.Parameter(torch.tensor(0.7))

    def forward(self, variable: Tensor) -> dict[str, Any]:
        free = dict(self.named_parameters()) | dict(self.named_buffers())
        nan = Normal(free["F"], 1.0).rsample()
        z: Tensor = scg.sample(Bernoulli(logits=free["torch"] * nan), "torch")
        loss = (z.sum() - variable.sum()) ** 2 + (free["math"] * 0.01).sum() * nan + self.a(z[:1]).sum() * self.a_weight
        return {"loss": loss, "rest": [z, (nan,)]}


def test_names_do_not_clash(tmp_path: Path) -> None:
    args = (torch.ones(3),)
    text = same(scg.compile(Names(), example_inputs=args), args, tmp_path)
    assert "return {'loss': " in text


def test_large_constants_are_packed(tmp_path: Path) -> None:
    table, theta = torch.randn(20, 20), nn.Parameter(torch.zeros(20))

    def loss() -> Tensor:
        z = Bernoulli(logits=theta).sample()
        return (table @ z).sum()

    text = same(scg.compile(loss, estimator="score_function", example_inputs=()), (), tmp_path)
    assert "b85decode" in text or "table" in text


def test_draws_by_rejection_are_written_out(tmp_path: Path) -> None:
    mu = nn.Parameter(torch.tensor([0.1, 0.4]))

    def loss() -> Tensor:
        z = VonMises(mu, torch.ones(2)).sample()
        return torch.cos(z).sum()

    text = same(scg.compile(loss, samples=2, example_inputs=()), (), tmp_path)
    assert "def draw_VonMises" in text


class Rounded(torch.autograd.Function):
    """Has a backward of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.round(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return 2 * grads[0]


@pytest.mark.parametrize("samples", [1, 2])
def test_a_custom_function_comes_from_the_users_file(samples: int, tmp_path: Path) -> None:
    mu = nn.Parameter(torch.zeros(3))
    apply: Callable[[Tensor], Tensor] = Rounded.apply
    compiled = scg.compile(lambda: apply(Normal(mu, 1.0).rsample()).sum(), samples=samples, example_inputs=())
    assert f"from {__name__} import Rounded" in same(compiled, (), tmp_path)


def test_a_local_function_leaves_a_place_to_fill(tmp_path: Path) -> None:
    theta = nn.Parameter(torch.zeros(3))

    @scg.opaque(shape=lambda z: ())
    def reward(z: Tensor) -> Tensor:
        return z.sum()

    compiled = scg.compile(lambda: -reward(Bernoulli(logits=theta).sample()), example_inputs=())
    assert "is a local name: put the function here" in compiled.code


def test_it_runs_where_scg_cannot_be_imported(tmp_path: Path) -> None:
    problem = PROBLEMS["tied_batch"]()
    compiled = scg.compile(problem.model, estimator="rebar", example_inputs=problem.calls[0])
    text = compiled.code
    shapes = [tuple(tensor.shape) for tensor in arguments(compiled, problem.calls[0])]
    call = f"forward(*[torch.zeros(s, dtype=torch.float64, requires_grad=True) for s in {shapes}]).backward()"
    (tmp_path / "step.py").write_text(text)
    program = f"import sys; sys.modules['scg'] = None; import torch; from step import forward; {call}"
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True)


PREFERRED = ("tied_batch", "chain", "unrolled_loop", "opaque_cost", "reparam_above_both", "integer_index")
"""Problems to look for one that an estimator fits, in this order; then all others, then `PROGRAMS`."""


class Cubed(nn.Module):
    """A normal draw."""

    def __init__(self) -> None:
        super().__init__()
        self.mu = nn.Parameter(torch.tensor([0.1, 0.4]))

    def forward(self) -> Tensor:
        return ((Normal(self.mu, 1.0).sample() - 1) ** 3).sum()


class Bound(Cubed):
    """A bound of several normal draws."""

    def forward(self) -> Tensor:
        q = Normal(self.mu, 0.8)
        z = q.sample()
        log_weight = Normal(0.0, 1.0).log_prob(z) + Normal(z, 0.5).log_prob(torch.tensor(1.2)) - q.log_prob(z)
        return scg.multisample(-log_weight, "iwae").sum()


class Logged(Cubed):
    """Four groups of three actions that were drawn earlier, by others."""

    def forward(self, action: Tensor, reward: Tensor, behaviour: Tensor) -> Tensor:  # type: ignore[override]
        a = scg.sample(Bernoulli(logits=self.mu[:1].expand(4, 3)), "a", value=action)
        return scg.depends(reward, on=a, dims=("tied", "tied")).sum()


PROGRAMS: dict[str, tuple[type[nn.Module], int, tuple[Tensor, ...]]] = {
    "draw": (Cubed, 2, ()),
    "bound": (Bound, 3, ()),
    "logged": (Logged, 1, (torch.arange(12).reshape(4, 3) % 2.0, torch.rand(4, 3), -torch.rand(4, 3))),
}


@pytest.mark.slow
@pytest.mark.parametrize("estimator", scg.ESTIMATORS)
def test_every_estimator(estimator: str, tmp_path: Path) -> None:
    """On the first program that has a site for it; there is one for each."""
    for name in [*PREFERRED, *(name for name in PROBLEMS if name not in PREFERRED), *PROGRAMS]:
        if name in PROGRAMS:
            made, samples, args = PROGRAMS[name]
            model: Any = made()
        else:
            problem = PROBLEMS[name]()
            model, samples, args = problem.model, 2, problem.calls[0]
        try:
            compiled = scg.compile(model, estimator=estimator, samples=samples, example_inputs=args, allow_biased=None)
        except (scg.EstimatorError, scg.TraceError):
            continue
        if estimator in {site.estimator for site in compiled.graph.sites.values()}:
            same(compiled, args, tmp_path)
            return
    pytest.fail(f"no program here has a site for {estimator}")


COMPOSED: dict[str, Any] = {
    "moving average": MovingAverage(),
    "learned": Learned(),
    "learned, TD(0), slow copy": Learned(target=TD(1), slow=0.9),
    "learned, lambda": Learned(target=TDLambda(0.5)),
    "input-dependent": InputDependent(),
    "self-critic": SelfCritic(),
    "optimal scale": OptimalScale(),
    "critic, TD(0)": Critic(target=TD(1)),
    "actor-critic, lambda": ActorCritic(Learned(target=TDLambda(0.5))),
    "critic only": CriticOnly(),
    "variance reduced by centering": NVIL(),
}


@pytest.mark.slow
@pytest.mark.parametrize("label", COMPOSED)
@pytest.mark.parametrize("name", ["chain", "tied_batch"])
def test_baselines_and_critics(name: str, label: str, tmp_path: Path) -> None:
    """Their parameters and running statistics are arguments of the module, and move like the compiled one's."""
    given = COMPOSED[label]
    estimator = ScoreFunction(baseline=given) if isinstance(given, Baseline) else given
    problem = PROBLEMS[name]()
    samples = 2 if label == "optimal scale" else 1
    compiled = scg.compile(
        problem.model, estimator=estimator, samples=samples, example_inputs=problem.calls[0], allow_biased=None
    )
    for _ in range(2):  # from the state that the first step left
        same(compiled, problem.calls[0], tmp_path)

"""Marginal likelihoods: value, gradient and Hessian against sums over every outcome, and what an elimination costs."""

from __future__ import annotations

import cProfile
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli, Binomial, Categorical, Independent, Normal, OneHotCategorical

import scg
from benchmarks.hmm import HMM, by_hand
from tests.law2 import expected_estimate
from tests.test_elimination import F64, X3, X6, Weights


def _flip(logit: Tensor, name: str | None = None) -> Tensor:
    return scg.sample(Bernoulli(logits=logit), name)


def _pick(logits: Tensor, name: str | None = None) -> Tensor:
    return scg.sample(Categorical(logits=logits), name)


def _nll(mean: Tensor, x: Tensor, scale: float = 1.0) -> Tensor:
    return -Normal(mean, scale).log_prob(x)


X23 = torch.stack([X3, X3.flip(0) - 0.4])  # [B, T]


def hmm(w: Weights, T: int = 3) -> Tensor:
    z, nll = _pick(w.v3), torch.zeros((), dtype=F64)
    for t, x in enumerate(X6[:T]):
        nll = nll + _nll(w.m32[z, 0], x)
        z = _pick(w.m33[z]) if t < T - 1 else z
    return scg.logmarginal(nll)


def batch_of_hmms(w: Weights) -> Tensor:
    z, nll = _pick(w.v3.expand(2, 3)), torch.zeros(2, dtype=F64)
    for t in range(2):
        nll = nll + _nll(w.m32[z, 1], X23[:, t])
        z = _pick(w.m33[z]) if t < 1 else z
    return scg.logmarginal(nll).mean()


def driven_hmm(w: Weights) -> Tensor:
    """Transitions differ between examples."""
    z, nll = Bernoulli(logits=w.v2).sample(), []
    for t in range(3):
        nll.append(_nll(w.m32[0][z.long()], X23[:, t], 0.8))
        z = Bernoulli(logits=w.m22[:, 0] * X23[:, t] + z).sample() if t < 2 else z
    return scg.logmarginal(torch.stack(nll, -1).sum(-1)).mean()


def factorial_hmm(w: Weights) -> Tensor:
    a, b, nll = _flip(w.v2[0]), _flip(w.v2[1]), torch.zeros((), dtype=F64)
    for t, x in enumerate(X6[:3]):
        nll = nll + _nll(w.v3[0] * a + w.v3[1] * b, x)
        if t < 2:
            a, b = _flip(w.m22[0, 0] + w.m22[0, 1] * a), _flip(w.m22[1, 0] + w.m22[1, 1] * b)
    return scg.logmarginal(nll)


def coupled_hmm(w: Weights) -> Tensor:
    a, b, nll = _flip(w.v2[0]), _flip(w.v2[1]), torch.zeros((), dtype=F64)
    for t, x in enumerate(X6[:3]):
        nll = nll + _nll(w.v3[0] * a + w.v3[1] * b, x)
        if t < 2:
            a, b = _flip(w.m22[0, 0] * b + w.m22[0, 1] * a), _flip(w.m22[1, 0] * a + w.m22[1, 1] * b)
    return scg.logmarginal(nll)


def second_order_hmm(w: Weights) -> Tensor:
    a, b, nll = _flip(w.v2[0]), _flip(w.v2[1]), torch.zeros((), dtype=F64)
    for t in range(4):
        a, b = b, _flip(w.v6[t] + a - 2 * b)
        nll = nll + _nll(w.v3[0] * a - b, X6[t])
    return scg.logmarginal(nll)


def mixture(w: Weights) -> Tensor:
    z = Categorical(logits=w.v2).sample((3,))
    return scg.logmarginal(_nll(w.m22[0][z], X3, 0.7)).mean()


def mixture_of_products(w: Weights) -> Tensor:
    """One latent for all columns."""
    z = _pick(w.m23)  # [2]
    return scg.logmarginal(_nll(w.m33[z], X23).sum(-1)).sum()


def shared_and_local(w: Weights) -> Tensor:
    """The local latents are a plate inside of the logarithm."""
    shared = _flip(w.v2[0])
    local = Bernoulli(logits=w.v3 + w.v2[1] * shared).sample()
    return scg.logmarginal(_nll(local * (1 + shared) + w.v4[0], X3).sum())


def shared_and_local_of_each(w: Weights) -> Tensor:
    """Latents of an example, and of its columns: a plate in a batch."""
    shared = Bernoulli(logits=w.v2).sample()  # [2]
    local = Bernoulli(logits=w.m22 * shared[:, None] + w.v2).sample()  # [2, 2]
    nll = _nll(local + shared[:, None] * w.v3[0], X23[:, :2]).mean(-1) * 3
    return scg.logmarginal(nll + 0.3 * shared).mean()


def nested_plates(w: Weights) -> Tensor:
    middle = Bernoulli(logits=w.v2).sample()  # [2]
    leaf = Bernoulli(logits=w.m22 * (middle[:, None] - 0.4)).sample()  # [2, 2]
    return scg.logmarginal(_nll(leaf, X23[:, :2]).sum() + _nll(middle * w.v4[0], X3[:2]).sum())


def chains_in_a_plate(w: Weights) -> Tensor:
    """Local chains below a shared latent."""
    shared = _flip(w.v2[0])
    z, nll = Bernoulli(logits=w.m22[0] * shared).sample(), torch.zeros((), dtype=F64)
    for t in range(2):
        nll = nll + _nll(z * w.v4[t] + shared, X3[:2]).sum()
        z = Bernoulli(logits=w.m22[1] - z + w.v2[1]).sample() if t < 1 else z
    return scg.logmarginal(nll)


def crossed_plates(w: Weights) -> Tensor:
    """Two vectors meet at every pair of indices: no order keeps them apart."""
    a, b = Bernoulli(logits=w.v2).sample(), Bernoulli(logits=w.v3).sample()
    return scg.logmarginal(_nll(a[:, None] * b - w.v4[0], X23).sum())


def tree(w: Weights) -> Tensor:
    root = _flip(w.v2[0])
    left, right = _flip(w.v4[0] * root), _flip(w.v4[1] + root)
    leaves = [_flip(w.v6[i] + w.v4[2] * (left if i < 1 else right)) for i in range(2)]
    nll = sum((_nll(leaf * w.v4[3], 0.2 * X6[i]) for i, leaf in enumerate(leaves)), start=torch.zeros((), dtype=F64))
    return scg.logmarginal(nll + 0.1 * root)


def diamond(w: Weights) -> Tensor:
    top = _flip(w.v2[0])
    left, right = _flip(w.v3[0] + w.v3[1] * top), _flip(w.v3[2] * top)
    collider = Bernoulli(logits=w.v4[0] * left * right + w.v4[1] * left - 0.3)
    return scg.logmarginal(-collider.log_prob(torch.ones((), dtype=F64)))


def table_look_up(w: Weights) -> Tensor:
    a, b = _pick(w.v3), _pick(w.v2)
    return scg.logmarginal(w.m32[a, b] ** 2 + w.v3[a])


def joined_vector(w: Weights) -> Tensor:
    z = Bernoulli(logits=w.v3).sample()
    return scg.logmarginal((z[1:] * z[:-1] * X3[:2]).sum() + _nll(z.sum() * w.v2[0], X3[0]))


def counts(w: Weights) -> Tensor:
    n = Binomial(3, logits=w.v2[0]).sample()
    return scg.logmarginal(_nll(n * w.v2[1], X3[2]) + _flip(w.v3[0] * n) * n)


def one_hot(w: Weights) -> Tensor:
    z = OneHotCategorical(logits=w.m23).sample()
    return scg.logmarginal(_nll(z @ w.m32, X23[:, :2]).sum(-1)).mean()


def independent(w: Weights) -> Tensor:
    z = Independent(Bernoulli(logits=w.m23), 1).sample()
    x = Independent(Normal(z * w.v3, 1.0), 1)
    return scg.logmarginal(-x.log_prob(X23)).mean()


def weighted(w: Weights) -> Tensor:
    """A mask that tells which factors count, and a learned temperature."""
    z = Categorical(logits=w.m23).sample()
    mask = torch.tensor([1.0, 0.0], dtype=F64)
    return scg.logmarginal(w.v2[0].exp() * mask * _nll(w.v3[z], X3[:2]) - z / 2 + 1.0).sum()


def impossible(w: Weights) -> Tensor:
    """Steps that cannot be taken, and an outcome that no data fits."""
    barred = torch.tensor([[0.0, 0.0, -torch.inf], [-torch.inf, 0.0, 0.0], [-torch.inf, -torch.inf, 0.0]], dtype=F64)
    z, nll = _pick(w.v3 + barred[1]), torch.zeros((), dtype=F64)
    for t in range(2):
        nll = nll + _nll(w.m32[z, 0], X6[t])
        z = _pick(w.m33[z] + barred[z])
    return scg.logmarginal(nll + torch.tensor([torch.inf, 0.0, 1.0], dtype=F64)[z])


def beside_an_expectation(w: Weights) -> Tensor:
    """The same latent inside of a logarithm, and in a cost of its own."""
    z = _flip(w.v2[0])
    return scg.logmarginal(_nll(z * w.v2[1], X3[0])) + (z - 0.3) ** 2 * w.v3[0]


def below_a_draw(w: Weights) -> Tensor:
    """The expectation of a log marginal: a site that stays outside."""
    a = _flip(w.v2[0], "a")
    z = _pick(w.v3 + a, "z")
    return scg.logmarginal(_nll(w.m32[z, 0] + a, X3[0]), over="z")


def batch_below_draws(w: Weights) -> Tensor:
    a = scg.sample(Bernoulli(logits=w.v2), "a")  # [2]
    z = _flip(w.v2 + a, "z0")
    nll = _nll(w.v3[0] * z + a, X3[:2])
    z = _flip(w.m22[0] * z, "z1")
    return scg.logmarginal(nll + _nll(w.v3[1] * z, X3[:2]), over="z?").mean()


def a_marginal_in_a_marginal(w: Weights) -> Tensor:
    a = _flip(w.v2[0], "a")
    z = _flip(w.v2[1] + a, "z")
    inner = scg.logmarginal(_nll(z * w.v3[0], X3[0]), over="z")
    return scg.logmarginal(inner * w.v3[1] ** 2 + a)


def never_reached(w: Weights) -> Tensor:
    """A middle state that nothing leads to, in a sum of tables that hold no distribution of it."""
    barred = torch.tensor([0.0, -torch.inf], dtype=F64)
    z = _pick(w.v2)
    c = _pick(barred + w.m22[z])
    d = _pick(w.m22[c])
    return scg.logmarginal(_nll(w.m22[z, c], X6[0]) + _nll(w.m22[1 - d, c], X6[1]))


PROGRAMS: tuple[Callable[[Weights], Tensor], ...] = (
    hmm, batch_of_hmms, driven_hmm, factorial_hmm, coupled_hmm, second_order_hmm, mixture, mixture_of_products,
    shared_and_local, shared_and_local_of_each, nested_plates, chains_in_a_plate, crossed_plates, tree, diamond,
    table_look_up, joined_vector, counts, one_hot, independent, weighted, impossible, beside_an_expectation,
    below_a_draw, batch_below_draws, a_marginal_in_a_marginal, never_reached,
)  # fmt: skip


LONG = (second_order_hmm, batch_of_hmms, coupled_hmm, tree)


@pytest.mark.parametrize(
    "program",
    [pytest.param(p, marks=pytest.mark.slow) if p in LONG else p for p in PROGRAMS],
    ids=[program.__name__ for program in PROGRAMS],
)
def test_value_and_gradient_are_exact(program: Callable[[Weights], Tensor]) -> None:
    w = Weights()

    def loss() -> Tensor:
        return program(w)

    compiled = scg.compile(loss, estimator="enumerate")
    value = compiled()
    names = [f"w.{name}" for name, _ in w.named_parameters()]
    found = torch.autograd.grad(value, list(w.parameters()), allow_unused=True, materialize_grads=True)
    exact_value, exact = scg.exact(loss)
    torch.testing.assert_close(value.detach(), exact_value, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(dict(zip(names, found, strict=True)), exact, rtol=1e-9, atol=1e-11)


def _all_paths(w: Weights, K: int, T: int) -> Tensor:
    """``-log p(x)`` of `hmm`, every path by itself."""
    paths = torch.cartesian_prod(*[torch.arange(K)] * T)  # [K^T, T]
    start, step = w.v3.log_softmax(-1), w.m33.log_softmax(-1)
    prior = start[paths[:, 0]] + sum(step[paths[:, t], paths[:, t + 1]] for t in range(T - 1))
    return -torch.logsumexp(prior - _nll(w.m32[paths, 0], X6[:T]).sum(-1), 0)


def test_a_chain_of_six_steps_and_its_hessian() -> None:
    w = Weights()
    compiled = scg.compile(lambda: hmm(w, 6), order=2)
    values = {"compiled": compiled(), "all paths": _all_paths(w, 3, 6)}
    params = [w.v3, w.m32, w.m33]
    hessians = []
    for value in values.values():
        first = torch.autograd.grad(value, params, create_graph=True)
        flat = torch.cat([g.flatten() for g in first])
        rows = [torch.autograd.grad(g, params, retain_graph=True) for g in flat]
        hessians.append(torch.stack([torch.cat([part.flatten() for part in row]) for row in rows]))
    torch.testing.assert_close(*values.values(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(*hessians, rtol=1e-10, atol=1e-12)


def test_the_hessian_is_finite_where_steps_are_impossible() -> None:
    w = Weights()
    hessians = []
    for barred in (-torch.inf, -600.0):  # never, and next to never
        table = torch.tensor([[0.0, 0.0, barred], [barred, 0.0, 0.0], [barred, barred, 0.0]], dtype=F64)

        def loss(table: Tensor = table) -> Tensor:
            z, nll = _pick(w.v3 + table[1]), torch.zeros((), dtype=F64)
            for t in range(3):
                nll = nll + _nll(w.m32[z, 0], X6[t])
                z = _pick(w.m33[z] + table[z]) if t < 2 else z
            return scg.logmarginal(nll)

        params = [w.v3, w.m32, w.m33]
        first = torch.autograd.grad(scg.compile(loss, order=2)(), params, create_graph=True)
        rows = [torch.autograd.grad(g, params, retain_graph=True) for part in first for g in part.flatten()]
        hessians.append(torch.stack([torch.cat([part.flatten() for part in row]) for row in rows]))
    assert bool(torch.isfinite(hessians[0]).all())
    torch.testing.assert_close(*hessians, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("estimator", ["score_function", "local_expectation"])
@pytest.mark.parametrize("program", [below_a_draw, batch_below_draws], ids=lambda program: program.__name__)
def test_unbiased_below_a_draw(program: Callable[[Weights], Tensor], estimator: str) -> None:
    w = Weights()

    def loss() -> Tensor:
        return program(w)

    compiled = scg.compile(loss, estimator=estimator)
    compiled()
    assert compiled.graph.sites["a"].estimator == estimator
    params = {f"w.{name}": p for name, p in w.named_parameters()}
    torch.testing.assert_close(expected_estimate(compiled, params), scg.exact(loss), rtol=1e-9, atol=1e-11)


def test_pathwise_gradients_go_through() -> None:
    mu, logit = nn.Parameter(torch.tensor(0.3, dtype=F64)), nn.Parameter(torch.tensor(-0.4, dtype=F64))

    def loss() -> Tensor:
        h = scg.sample(Normal(mu, 1.0), "h")
        z = _flip(logit + h, "z")
        return scg.logmarginal(_nll(z * h, X3[0]), over="z")

    compiled = scg.compile(loss, example_inputs=())
    assert compiled.graph.sites["h"].estimator == "reparam"
    torch.manual_seed(0)
    found = torch.autograd.grad(compiled(), [mu, logit])
    torch.manual_seed(0)
    h = Normal(mu, 1.0).rsample()
    p = (logit + h).sigmoid()
    want = -torch.log((1 - p) * (-_nll(0 * h, X3[0])).exp() + p * (-_nll(h, X3[0])).exp())
    torch.testing.assert_close(found, torch.autograd.grad(want, [mu, logit]))


def test_other_outputs_are_one_draw_and_the_marginal_itself() -> None:
    w = Weights()

    def model() -> dict[str, Tensor]:
        a = scg.sample(Bernoulli(logits=w.v2), "a")
        z = _flip(w.v2 + a, "z")
        nll = scg.logmarginal(_nll(z * w.v3[0], X3[:2]), over="z")
        return {"loss": nll.mean(), "nll": nll, "a": a, "z": z}

    compiled = scg.compile(model, estimator="enumerate")
    for _ in range(4):
        out = compiled()
        p = (w.v2 + out["a"]).sigmoid()
        want = -torch.log((1 - p) * (-_nll(0 * p, X3[:2])).exp() + p * (-_nll(0 * p + w.v3[0], X3[:2])).exp())
        torch.testing.assert_close(out["nll"], want)
        assert set(out["z"].tolist()) <= {0.0, 1.0}


def test_slices_of_a_sequence_are_scored_at_once() -> None:
    """Emissions of all steps in one call; the table of transitions is no example's own."""
    model = HMM(3).double()
    x = torch.randn(2, 10, dtype=F64)
    with torch.no_grad():
        model.step[0, 1] = -torch.inf
    compiled = scg.compile(model)
    torch.testing.assert_close(compiled(x), by_hand(model, x))
    assert compiled.code.count("unbind") == 12 and "gather" not in compiled.code
    assert compiled.code.count(" @ ") == 9 and "permute([1, 2, 0])" not in compiled.code


# -- what it costs, and what it refuses -------------------------------------------------------------------------------
def test_the_plan_is_told() -> None:
    w = Weights()
    compiled = scg.compile(lambda: factorial_hmm(w), example_inputs=())
    text = str(compiled.explain())
    assert "6 sites, tree-width 2, tables of up to 8 rows" in text
    assert "summed out in logmarginal" in text


@pytest.mark.slow
def test_a_chain_compiles_in_time_linear_in_its_length() -> None:
    calls = {}
    for T in (8, 10, 20, 40):  # what is made once is made for the first
        compiled = scg.compile(HMM(3))
        with cProfile.Profile() as profile:
            compiled(torch.randn(2, T))
        calls[T] = sum(entry.callcount for entry in profile.getstats())
    assert calls[40] - calls[20] < 2.1 * (calls[20] - calls[10])


def test_a_chain_takes_a_fixed_number_of_operations_a_step() -> None:
    def loss(logits: Tensor, T: int) -> Tensor:
        z, nll = _pick(logits[0]), torch.zeros(())
        for t in range(T):
            nll = nll + _nll(z.float(), torch.tensor(0.1 * t))
            z = _pick(logits[z]) if t < T - 1 else z
        return scg.logmarginal(nll)

    logits = nn.Parameter(torch.zeros(4, 4))
    lengths = [scg.compile(loss, example_inputs=(logits, T)).code.count(" = ") for T in (5, 8, 14)]
    assert abs(lengths[2] - lengths[1] - 2 * (lengths[1] - lengths[0])) <= 2


def test_outside_of_compile_it_is_its_value() -> None:
    x = torch.randn(3)
    assert scg.logmarginal(x) is x


def _refused(loss: Callable[[], Any], match: str, **options: Any) -> None:
    with pytest.raises(scg.EstimatorError, match=match):
        scg.compile(loss, example_inputs=(), **options)


def test_refusals() -> None:
    w = Weights()
    _refused(lambda: scg.logmarginal(scg.sample(Normal(w.v2[0], 1.0), "h") ** 2), r"'?%h.* cannot be summed over")
    _refused(lambda: hmm(w), "logmarginal .* sums over it", estimators={"z*": "score_function"})

    def below() -> Tensor:
        z = _flip(w.v2[0], "z")
        s = scg.sample(Normal(z, 1.0), "s")
        return scg.logmarginal((s - z) ** 2, over="z")

    _refused(below, "%s .* depends on %z, which logmarginal .* sums over")

    def wide() -> Tensor:
        first = [_pick(torch.zeros(20) + w.v2[0], f"z{i}") for i in range(5)]
        return scg.logmarginal(torch.stack(first).sum() * w.v2[1])

    _refused(wide, "a table of 3,200,000 rows")


def test_impossible_data_is_infinite_and_a_rare_path_is_kept() -> None:
    logits = nn.Parameter(torch.tensor([0.0, -60.0]))

    def loss(x: Tensor) -> Tensor:
        z = _pick(logits)
        y = _pick(torch.stack([logits, logits.flip(0)])[z])
        return scg.logmarginal(torch.stack([torch.tensor(math.inf), x])[y] + torch.stack([x, torch.zeros(())])[z])

    compiled = scg.compile(loss)
    value = compiled(torch.tensor(50.0))
    torch.testing.assert_close(value.item(), 110.0)  # through z = 1, at 60 nats, rather than z = 0 at 60 + 100
    assert bool(torch.isfinite(torch.autograd.grad(value, logits)[0]).all())
    assert compiled(torch.tensor(math.inf)).item() == math.inf

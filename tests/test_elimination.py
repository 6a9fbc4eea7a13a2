"""Exact enumeration: value and gradient of finite programs in one call, and what it costs on chains and vectors."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import (
    Bernoulli,
    Binomial,
    Categorical,
    Distribution,
    Geometric,
    Independent,
    NegativeBinomial,
    Normal,
    OneHotCategorical,
    Poisson,
)  # fmt: skip

import scg
from tests.law2 import expected_estimate

F64 = torch.float64


class Weights(nn.Module):
    """Parameters of every shape a program here asks for, fresh and the same every time."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        shapes = {"v2": (2,), "v3": (3,), "v4": (4,), "v6": (6,), "m22": (2, 2), "m23": (2, 3), "m32": (3, 2),
                  "m33": (3, 3), "t222": (2, 2, 2)}  # fmt: skip
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(torch.randn(shape, generator=generator, dtype=F64)))

    v2: Tensor
    v3: Tensor
    v4: Tensor
    v6: Tensor
    m22: Tensor
    m23: Tensor
    m32: Tensor
    m33: Tensor
    t222: Tensor


X3 = torch.tensor([0.5, -1.0, 2.0], dtype=F64)
X6 = torch.tensor([0.3, -0.4, 1.1, 0.2, -2.0, 0.9], dtype=F64)


def _flip(logit: Tensor, name: str | None = None) -> Tensor:
    return scg.sample(Bernoulli(logits=logit), name)


def _pick(logits: Tensor) -> Tensor:
    return Categorical(logits=logits).sample()


def hmm(w: Weights) -> Tensor:
    """K=3, T=6: an ELBO-like sum of emissions."""
    z, loss = _pick(w.v3), torch.zeros((), dtype=F64)
    for x in X6:
        loss = loss - Normal(w.m32[z, 0], 1.0).log_prob(x)
        z = _pick(w.m33[z])
    return loss + 0.1 * z


def factorial_hmm(w: Weights) -> Tensor:
    a, b, loss = _flip(w.v2[0]), _flip(w.v2[1]), torch.zeros((), dtype=F64)
    for x in X6[:4]:
        loss = loss + (x - w.v3[0] * a - w.v3[1] * b) ** 2
        a, b = _flip(w.m22[0, 0] + w.m22[0, 1] * a), _flip(w.m22[1, 0] + w.m22[1, 1] * b)
    return loss + a * b


def mixture(w: Weights) -> Tensor:
    z = Categorical(logits=w.v2).sample((3,))
    return -Normal(w.m22[0][z], 0.7).log_prob(X3).mean()


def shared_and_local(w: Weights) -> Tensor:
    shared = _flip(w.v2[0])
    local = Bernoulli(logits=w.v3 + w.v2[1] * shared).sample()
    return ((X3 - local * (1 + shared)) ** 2).mean()


def tree(w: Weights) -> Tensor:
    root = _flip(w.v2[0])
    left, right = _flip(w.v4[0] * root), _flip(w.v4[1] + root)
    leaves = [_flip(w.v6[i] + w.v4[2] * (left if i < 2 else right)) for i in range(4)]
    return sum(((leaf - 0.2 * i) ** 2 for i, leaf in enumerate(leaves)), start=torch.zeros((), dtype=F64)) + root


def diamond(w: Weights) -> Tensor:
    top = _flip(w.v2[0])
    left, right = _flip(w.v3[0] + w.v3[1] * top), _flip(w.v3[2] * top)
    return -Bernoulli(logits=w.v4[0] * left * right + w.v4[1] * left - 0.3).log_prob(torch.ones((), dtype=F64))


def explaining_away(w: Weights) -> Tensor:
    a, b = _flip(w.v2[0]), _flip(w.v2[1])
    c = _flip(w.v3[0] * a + w.v3[1] * b)
    return (c - 0.3) ** 2 + a * c - 0.2 * b


def first_of_a_vector(w: Weights) -> Tensor:
    z = Bernoulli(logits=w.v3).sample()
    return (z[0] - 0.4) ** 2 + (z * X3).sum()


def sum_of_a_vector(w: Weights) -> Tensor:
    z = Bernoulli(logits=w.m23).sample()
    return -Normal(z.sum(-1), 1.3).log_prob(X3[:2]).sum()


def neighbours(w: Weights) -> Tensor:
    z = Bernoulli(logits=w.v4).sample()
    return (z[1:] * z[:-1] * X3).sum()


def table_look_up(w: Weights) -> Tensor:
    a, b = _pick(w.v3), _pick(w.v2)
    return w.m32[a, b] ** 2


def batched_look_up(w: Weights) -> Tensor:
    a, b = Categorical(logits=w.m23).sample(), Categorical(logits=w.m22).sample()
    return (w.m32[a, b] * X3[:2]).sum() + F.embedding(a, w.m32).prod(-1).sum()


def gathered(w: Weights) -> Tensor:
    z = Categorical(logits=w.m23).sample()
    return (w.m23.gather(1, z[:, None]).squeeze(-1) ** 2).mean()


def where(w: Weights) -> Tensor:
    z = Bernoulli(logits=w.v3).sample()
    return torch.where(z > 0.5, (X3 - w.v2[0]) ** 2, (X3 - w.v2[1]).abs()).mean()


def minibatch(w: Weights) -> Tensor:
    index = torch.tensor([2, 0])
    z = Bernoulli(logits=w.v3[index]).sample()
    return 1.5 * ((X3[index] - w.v2[0] * z) ** 2).sum() + 0.1 * (w.v3**2).sum()


def one_hot(w: Weights) -> Tensor:
    z = OneHotCategorical(logits=w.m23).sample()
    return ((z @ w.m32).tanh() ** 2).mean()


def counts(w: Weights) -> Tensor:
    n = Binomial(3, logits=w.v2[0]).sample()
    return _flip(w.v2[1] * n - 1) * n + (n - 1.2) ** 2


def independent(w: Weights) -> Tensor:
    q = Independent(Bernoulli(logits=w.m23), 1)
    z = q.sample()
    return (q.log_prob(z) + (z @ w.v3 - 0.5) ** 2).mean()


def batch_of_chains(w: Weights) -> Tensor:
    z, loss = torch.zeros(2, dtype=F64), torch.zeros((), dtype=F64)
    for t in range(3):
        z = Bernoulli(logits=w.m23[:, t] + w.v2[0] * z).sample()
        loss = loss + ((z - X3[t]) ** 2 * w.v2).mean()
    return loss


def crossed_chains(w: Weights) -> Tensor:
    z, loss = torch.zeros(2, dtype=F64), torch.zeros((), dtype=F64)
    for t in range(3):
        z = Bernoulli(logits=w.m23[:, t] + w.v2[0] * z.flip(0)).sample()
        loss = loss + ((z - X3[t]) ** 2 * w.v2).mean()
    return loss


def second_order_chain(w: Weights) -> Tensor:
    a, b, loss = _flip(w.v2[0]), _flip(w.v2[1]), torch.zeros((), dtype=F64)
    for t in range(4):
        a, b = b, _flip(w.v6[t] + a - 2 * b)
        loss = loss + (a - b) ** 2 * (t + 1)
    return loss


def ends_of_a_chain(w: Weights) -> Tensor:
    first = z = _flip(w.v2[0])
    for t in range(4):
        z = _flip(w.v6[t] + 1.5 * z)
    return (first - z) ** 2


def weight_is_a_draw(w: Weights) -> Tensor:
    mask, z = Bernoulli(logits=w.v3).sample(), Bernoulli(logits=X3 * w.v2[0]).sample()
    return (mask * (z - 0.3) ** 2).sum() / 3


def detached(w: Weights) -> Tensor:
    z = _flip(w.v2[0])
    y = _flip(w.v2[1] * z.detach())
    return ((y - 0.2) ** 2).detach() * z + y


def matrix_product(w: Weights) -> Tensor:
    z = Bernoulli(logits=w.m22).sample()
    return ((z @ w.m22).relu().sum(-1) ** 2).mean()


def impossible(w: Weights) -> Tensor:
    z = Categorical(logits=F.pad(w.v2, (0, 1), value=-torch.inf)).sample()
    return torch.stack([w.v3[0] ** 2, w.v3[1], torch.full((), float("inf"), dtype=F64)])[z]


EXACT: tuple[Callable[[Weights], Tensor], ...] = (
    hmm, factorial_hmm, mixture, shared_and_local, tree, diamond, explaining_away, first_of_a_vector, sum_of_a_vector,
    neighbours, table_look_up, batched_look_up, gathered, where, minibatch, one_hot, counts, independent,
    batch_of_chains, crossed_chains, second_order_chain, ends_of_a_chain, weight_is_a_draw, detached, matrix_product,
    impossible,
)  # fmt: skip


@pytest.mark.parametrize(
    "program",
    [pytest.param(p, id=p.__name__, marks=[pytest.mark.slow] if p is hmm else []) for p in EXACT],
)
def test_one_call_is_exact(program: Callable[[Weights], Tensor]) -> None:
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


# -- enumerated sites above and below sampled ones ----------------------------------------------------------------
def below_two_enumerated(w: Weights) -> Tensor:
    """The cost sees the first site too: what is summed is conditional on the row of the second."""
    a = _flip(w.v2[0], "a")
    b = _flip(w.v2[1] + 1.3 * a, "b")
    s = _flip(w.v3[0] * b - 0.2, "s")
    return (a - 0.3) * (s + 1) * 2 + b * s * a


def below_a_fork(w: Weights) -> Tensor:
    a = _flip(w.v2[0], "a")
    b, c = _flip(w.v2[1] + 1.3 * a, "b"), _flip(w.v3[1] - 2 * a, "c")
    s = _flip(w.v3[0] * b - 0.2, "s")
    return (s + 1) * c + b * s


def between(w: Weights) -> Tensor:
    a = _flip(w.v2[0], "a")
    s = _flip(w.v2[1] + 1.3 * a, "s")
    b = _flip(w.v3[0] * s + w.v3[1] * a, "b")
    return (s - 0.4) * b + a * b


def vectors(w: Weights) -> Tensor:
    a = scg.sample(Bernoulli(logits=w.v2), "a")
    b = scg.sample(Bernoulli(logits=w.m22[0] + a.flip(0)), "b")
    s = scg.sample(Bernoulli(logits=w.m22[1] * b), "s")
    return ((s + 0.5) * a.flip(0) * X3[:2]).sum() + (s * b).sum()


def partly_above(w: Weights) -> Tensor:
    """Only one element of the sampled site follows from the enumerated one, the other meets it in a cost."""
    b = scg.sample(Bernoulli(logits=w.v2), "b")
    s = scg.sample(Bernoulli(logits=torch.stack([w.v3[0], 1.5 * b[0] + w.v3[1]])), "s")
    return s[0] * (b[1] - 0.2) * 2 + s[1] * b[0]


@pytest.mark.parametrize("estimator", ["score_function", "local_expectation", "measure_valued"])
@pytest.mark.parametrize(
    "program",
    [below_two_enumerated, below_a_fork, between, vectors, partly_above],
    ids=lambda program: program.__name__,
)
def test_sampled_among_enumerated(program: Callable[[Weights], Tensor], estimator: str) -> None:
    w = Weights()

    def loss() -> Tensor:
        return program(w)

    compiled = scg.compile(loss, estimator="enumerate", estimators={"s": estimator})
    compiled()
    params = {f"w.{name}": p for name, p in w.named_parameters()}
    torch.testing.assert_close(expected_estimate(compiled, params), scg.exact(loss), rtol=1e-9, atol=1e-11)


# -- what it costs ------------------------------------------------------------------------------------------------
def _chain(logits: Tensor) -> Callable[[], Tensor]:
    def loss() -> Tensor:
        z, total = torch.zeros((), dtype=F64), torch.zeros((), dtype=F64)
        for t in range(len(logits)):
            z = Bernoulli(logits=logits[t] + z).sample()
            total = total + (z - 0.3) ** 2 * (t + 1)
        return total

    return loss


def _forward(logits: Tensor) -> Tensor:
    p, total = torch.zeros((), dtype=F64), torch.zeros((), dtype=F64)
    for t in range(len(logits)):
        p = (1 - p) * logits[t].sigmoid() + p * (logits[t] + 1).sigmoid()
        total = total + ((1 - p) * 0.09 + p * 0.49) * (t + 1)
    return total


def test_a_chain_takes_a_fixed_number_of_operations_a_step() -> None:
    lengths = {}
    for T in (6, 12, 24):
        compiled = scg.compile(_chain(nn.Parameter(torch.zeros(T, dtype=F64))), example_inputs=())
        assert {site.estimator for site in compiled.graph.sites.values()} == {"enumerate"}
        lengths[T] = compiled.code.count("\n")
    assert lengths[24] - lengths[12] == 2 * (lengths[12] - lengths[6])


@pytest.mark.slow
def test_a_chain_of_200() -> None:
    logits = nn.Parameter(torch.linspace(-2, 2, 200, dtype=F64))
    value = scg.compile(_chain(logits))()
    want = _forward(logits)
    torch.testing.assert_close(value, want)
    torch.testing.assert_close(*(torch.autograd.grad(total, logits)[0] for total in (value, want)))


def test_a_vector_of_1000_takes_two_rows() -> None:
    logits = nn.Parameter(torch.linspace(-2, 2, 1000, dtype=F64))
    compiled = scg.compile(lambda: ((Bernoulli(logits=logits).sample() - 0.3) ** 2).sum())
    value = compiled()
    p = logits.sigmoid()
    torch.testing.assert_close(value, (p * 0.49 + (1 - p) * 0.09).sum())
    assert "2 rows" in compiled.graph.of(scg.ir.Sample)[0].reason


def _total(logits: Tensor) -> Tensor:
    z, total = torch.zeros((), dtype=F64), torch.zeros((), dtype=F64)
    for t in range(len(logits)):
        z = Bernoulli(logits=logits[t] + z).sample()
        total = total + z
    return total.exp()


def test_over_the_budget_sites_are_sampled_and_it_is_said() -> None:
    logits = nn.Parameter(torch.zeros(8, dtype=F64))
    compiled = scg.compile(lambda: _total(logits), example_inputs=(), enumerate_limit=16)
    names = [site.estimator for site in compiled.graph.sites.values()]
    assert names == ["enumerate"] * 4 + ["score_function"] * 4
    assert "32 rows would meet at" in compiled.graph.of(scg.ir.Sample)[-1].reason


def test_over_the_budget_of_bytes_too_and_sites_are_forced_and_forbidden_by_name() -> None:
    logits = nn.Parameter(torch.zeros(2, dtype=F64))

    def loss() -> Tensor:
        z, y = (scg.sample(Bernoulli(logits=logits[i]), "zy"[i]) for i in range(2))
        return (z * torch.zeros(1).expand(2**29)).sum() + y

    compiled = scg.compile(loss, example_inputs=())
    sites = compiled.graph.sites
    assert [sites["z"].estimator, sites["y"].estimator] == ["score_function", "enumerate"]
    assert " GB of values would be held, over 1.07 GB beyond one draw's" in sites["z"].reason
    forced = scg.compile(loss, estimators={"z": "enumerate", "y": "score_function"}, example_inputs=()).graph.sites
    assert [forced["z"].estimator, forced["y"].estimator] == ["enumerate", "score_function"]
    assert "asked for by estimators['z']" in forced["z"].reason


def test_the_plan_is_told() -> None:
    logits = nn.Parameter(torch.zeros(6, dtype=F64))
    text = str(scg.compile(_chain(logits), example_inputs=()).explain())
    assert "at most 2 rows meet at %z, tables of up to 4 joint probabilities, tree-width 1, " in text
    assert " FLOPs forward, " in text and "bytes of values" in text


_PEAK = """
import resource
import torch, scg
from torch.distributions import Bernoulli
logits = torch.nn.Parameter(torch.linspace(-2, 2, {size}))
def chain():
    z, total = torch.zeros(()), torch.zeros(())
    for logit in logits:
        z = Bernoulli(logits=logit + z).sample()
        total = total + (z - 0.3) ** 2
    return total
def vector():
    return ((Bernoulli(logits=logits).sample() - 0.3) ** 2).sum()
compiled = scg.compile({program})
compiled().backward()
assert all(site.estimator == "enumerate" for site in compiled.graph.sites.values())
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("program", "size"), [("chain", 200), ("vector", 1000)])
def test_long_chains_and_wide_vectors_take_less_than_a_gigabyte(program: str, size: int) -> None:
    script = _PEAK.format(program=program, size=size)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 1.0


def test_over_the_budget_an_explicit_request_is_an_error() -> None:
    logits = nn.Parameter(torch.zeros(20, dtype=F64))
    with pytest.raises(scg.EstimatorError, match="with the sites enumerated above it, .* rows would meet at"):
        scg.compile(lambda: _total(logits), estimator="enumerate", example_inputs=())


# -- counts without a bound ----------------------------------------------------------------------------------------
UP_TO = scg.ESTIMATORS["enumerate"]
COUNTS: dict[str, Callable[[Tensor], Distribution]] = {
    "poisson": lambda rate: Poisson(rate.exp()),
    "geometric": lambda logit: Geometric(logits=logit),
    "negative_binomial": lambda logit: NegativeBinomial(2.5, logits=logit),
}


def _rates() -> nn.Parameter:
    return nn.Parameter(torch.tensor([-0.7, 0.2], dtype=F64))


@pytest.mark.parametrize("law", COUNTS.values(), ids=COUNTS)
def test_counts_up_to_a_bound_follow_their_truncated_distribution(law: Callable[[Tensor], Distribution]) -> None:
    """Apart, and joined by one cost that sees both."""
    rates, bound = _rates(), 4

    def loss() -> Tensor:
        n = law(rates).sample()
        return ((n - 0.4) ** 2).sum() + 0.1 * n.sum() ** 3

    v = torch.arange(bound + 1, dtype=F64)
    p = law(rates.unsqueeze(-1)).log_prob(v).softmax(-1)  # [2, V]
    joint = p[0].unsqueeze(-1) * p[1]
    want = (p * (v - 0.4) ** 2).sum() + 0.1 * (joint * (v.unsqueeze(-1) + v) ** 3).sum()
    value = scg.compile(loss, estimator=UP_TO(bound=bound))()
    torch.testing.assert_close(value, want)
    torch.testing.assert_close(*(torch.autograd.grad(total, rates)[0] for total in (value, want)))


def test_a_bound_far_out_gives_the_moments() -> None:
    rates = _rates()
    value = scg.compile(lambda: ((Poisson(rates.exp()).sample() - 0.4) ** 2).sum(), estimator=UP_TO(bound=40))()
    want = (rates.exp() + (rates.exp() - 0.4) ** 2).sum()
    torch.testing.assert_close(value, want, rtol=1e-12, atol=0)
    torch.testing.assert_close(*(torch.autograd.grad(total, rates)[0] for total in (value, want)), rtol=1e-12, atol=0)


def test_a_likelihood_leaves_out_the_terms_beyond_the_bound() -> None:
    rates = _rates()
    compiled = scg.compile(
        lambda: scg.logmarginal(-Normal(Poisson(rates.exp()).sample(), 1.0).log_prob(X3[:2])).sum(),
        estimators={"*": UP_TO(bound=4)},
    )
    v = torch.arange(5, dtype=F64)
    terms = Poisson(rates.exp().unsqueeze(-1)).log_prob(v) + Normal(v, 1.0).log_prob(X3[:2].unsqueeze(-1))
    value, want = compiled(), -terms.logsumexp(-1).sum()
    torch.testing.assert_close(value, want)
    torch.testing.assert_close(*(torch.autograd.grad(total, rates)[0] for total in (value, want)))


def test_what_a_bound_leaves_out_is_told() -> None:
    rates = _rates()

    def loss() -> Tensor:
        return (Poisson(rates.exp()).sample() ** 2).sum()

    assert "BIASED: counts beyond 7 are left out" in str(
        scg.compile(loss, estimator=UP_TO(bound=7), example_inputs=()).explain()
    )
    refused: list[tuple[dict[str, object], str]] = [
        ({"estimator": "enumerate"}, r"give it the last outcome to sum over.*bound=…"),
        ({"estimator": UP_TO(bound=7), "allow_biased": False}, "'enumerate' is biased"),
    ]
    for options, message in refused:
        with pytest.raises(scg.EstimatorError, match=message):
            scg.compile(loss, example_inputs=(), **options)  # type: ignore[arg-type]
    with pytest.raises(scg.EstimatorError, match="Bernoulli has a last outcome"):
        scg.compile(lambda: Bernoulli(logits=rates).sample().sum(), estimator=UP_TO(bound=7), example_inputs=())
    with pytest.raises(ValueError, match="bound=-1 must be at least 0"):
        UP_TO(bound=-1)

"""The graph does what the model does: values, gradients, buffers and structure, under one seed."""

from __future__ import annotations

import copy
import threading
import warnings
from collections import OrderedDict, UserDict
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Bernoulli, Categorical, Distribution, Independent, Normal, kl_divergence
from torch.distributions import transforms as T
from torch.distributions.transformed_distribution import TransformedDistribution
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

from scg import ir
from scg.errors import StateWarning, TraceError
from scg.ir import Graph
from scg.primitives import cost, depends, opaque, sample
from scg.tracer import trace
from tests.ir_eval import evaluate


# -- equality with the original ---------------------------------------------------------------------------------------
def run(fn: Callable[[], Any], tensors: list[Tensor]) -> tuple[list[Any], list[Tensor | None]]:
    """Leaves of the output, and the gradients of its objective, from one seed."""
    torch.manual_seed(0)
    leaves = pytree.tree_leaves(fn())
    learned = tensors and leaves[0].requires_grad
    grads = torch.autograd.grad(leaves[0], tensors, allow_unused=True) if learned else ()
    return leaves, list(grads)


def check(model: Callable[..., Any], *args: Any, rtol: float = 0, **kwargs: Any) -> Graph:
    """Traces ``model`` and compares the graph with it; returns the graph."""
    before = copy.deepcopy(model.state_dict()) if isinstance(model, nn.Module) else {}
    graph = trace(model, args, kwargs)
    if isinstance(model, nn.Module):
        for name, value in model.state_dict().items():
            assert type(value) is Tensor and torch.equal(value, before[name]), f"tracing changed {name}"
    wanted = [t for t in [*graph.tensors.values(), *pytree.tree_leaves((args, kwargs))] if _learned(t)]
    found = run(lambda: evaluate(graph, args, kwargs), wanted)
    after = copy.deepcopy(model.state_dict()) if isinstance(model, nn.Module) else {}
    if isinstance(model, nn.Module):
        model.load_state_dict(before)
    expected = run(lambda: model(*args, **kwargs), wanted)
    assert pytree.tree_structure(graph.outputs) == pytree.tree_structure(model(*args, **kwargs))
    for left, right in zip(pytree.tree_leaves(found), pytree.tree_leaves(expected), strict=True):
        if isinstance(left, Tensor):
            torch.testing.assert_close(left, right, rtol=rtol, atol=rtol, equal_nan=True)
        else:
            assert left == right
    if isinstance(model, nn.Module):
        model.load_state_dict(before)
        torch.manual_seed(0)
        model(*args, **kwargs)
        for name, value in model.state_dict().items():
            torch.testing.assert_close(after[name], value, rtol=0, atol=0, msg=f"buffer {name} is not updated once")
    return graph


def _learned(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad


class Model(nn.Module):
    """A module made of parts and a function of them."""

    def __init__(self, fn: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        self.fn = fn
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.fn(self, *args, **kwargs)


def weight(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape, generator=torch.Generator().manual_seed(1)) * 0.3)


class VAE(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enc = nn.Linear(6, 4)
        self.dec = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 6))

    def forward(self, x: Tensor) -> Tensor:
        q = Bernoulli(logits=self.enc(x))
        z = q.sample()
        recon = -Bernoulli(logits=self.dec(z)).log_prob(x).sum(-1)
        kl = (q.log_prob(z) - Bernoulli(probs=0.5 * torch.ones_like(z)).log_prob(z)).sum(-1)
        return (recon + kl).mean()


X = torch.rand(3, 6, generator=torch.Generator().manual_seed(2)).round()


def test_vae_in_full() -> None:
    graph = check(VAE(), X)
    assert list(graph.sites) == ["z"]
    site = graph.sites["z"]
    assert site.distribution == "Bernoulli" and site.shape == (3, 4) and site.loc.startswith("test_tracer.py:")
    assert set(graph.tensors) == {f"{n}.{k}" for n in ("enc", "dec.0", "dec.2") for k in ("weight", "bias")}
    ops = [node.op_name for node in graph.of(ir.Op)]
    assert ops == ["linear", "linear", "relu", "linear", "sum.dim_IntList", "neg", "ones_like", "mul.Tensor",
                   "sub.Tensor", "sum.dim_IntList", "add.Tensor", "mean"]  # fmt: skip
    assert {node.scope for node in graph.of(ir.Op)} == {"enc", "dec.0", "dec.1", "dec.2", ""}


def test_the_same_trace_twice_gives_the_same_graph() -> None:
    model = VAE()
    assert trace(model, (X,)) == trace(model, (X,))


# -- distributions -----------------------------------------------------------------------------------------------------
def spd(n: int) -> Tensor:
    return torch.eye(n) * 2 + 0.1


class Shifted(Normal):
    """A user's subclass that calls its parent."""

    def __init__(self, centre: Tensor) -> None:
        super().__init__(centre, torch.ones_like(centre))

    def log_prob(self, value: Tensor) -> Tensor:
        return super().log_prob(value) - 1.0  # type: ignore[no-untyped-call]


class Triangular(Distribution):
    """A user's distribution with an odd constructor."""

    arg_constraints = {}
    has_rsample = True

    def __init__(self, *, widths: dict[str, Tensor]) -> None:
        self.widths = widths
        super().__init__(widths["w"].shape, validate_args=False)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        noise = torch.rand((2, *self._extended_shape(torch.Size(sample_shape))))
        return self.widths["w"] * (noise[0] - noise[1])

    def log_prob(self, value: Tensor) -> Tensor:
        w = self.widths["w"]
        return torch.log((w - value.abs()).clamp(min=1e-6)) - 2 * torch.log(w)


D = torch.distributions
DISTRIBUTIONS: dict[str, Callable[[Tensor], Distribution]] = {
    "Bernoulli": lambda w: D.Bernoulli(logits=w),
    "BernoulliProbs": lambda w: D.Bernoulli(probs=w.sigmoid()),
    "Beta": lambda w: D.Beta(w.exp(), 2.0),
    "Binomial": lambda w: D.Binomial(5, logits=w),
    "Categorical": lambda w: D.Categorical(logits=w),
    "CategoricalProbs": lambda w: D.Categorical(probs=w.exp()),
    "Cauchy": lambda w: D.Cauchy(w, 1.0),
    "Chi2": lambda w: D.Chi2(w.exp()),
    "ContinuousBernoulli": lambda w: D.ContinuousBernoulli(logits=w),
    "Dirichlet": lambda w: D.Dirichlet(w.exp()),
    "Exponential": lambda w: D.Exponential(w.exp()),
    "FisherSnedecor": lambda w: D.FisherSnedecor(w.exp(), 3.0),
    "Gamma": lambda w: D.Gamma(w.exp(), 1.5),
    "GeneralizedPareto": lambda w: D.GeneralizedPareto(w, 1.0, torch.tensor(0.2)),
    "Geometric": lambda w: D.Geometric(logits=w),
    "Gumbel": lambda w: D.Gumbel(w, 1.0),
    "HalfCauchy": lambda w: D.HalfCauchy(w.exp()),
    "HalfNormal": lambda w: D.HalfNormal(w.exp()),
    "Independent": lambda w: D.Independent(D.Normal(w, 1.0), 1),
    "InverseGamma": lambda w: D.InverseGamma(w.exp() + 1, 1.0),
    "Kumaraswamy": lambda w: D.Kumaraswamy(w.exp(), 2.0),
    "Laplace": lambda w: D.Laplace(w, 1.0),
    "LKJCholesky": lambda w: D.LKJCholesky(3, w.exp()),
    "LogNormal": lambda w: D.LogNormal(w, 0.5),
    "LogisticNormal": lambda w: D.LogisticNormal(w, torch.ones_like(w)),
    "LowRankMultivariateNormal": lambda w: D.LowRankMultivariateNormal(w, w.unsqueeze(-1), w.exp()),
    "MixtureSameFamily": lambda w: D.MixtureSameFamily(D.Categorical(logits=w), D.Normal(w, 1.0)),
    "Multinomial": lambda w: D.Multinomial(4, logits=w),
    "MultivariateNormal": lambda w: D.MultivariateNormal(w, scale_tril=torch.linalg.cholesky(spd(w.shape[-1]))),
    "MultivariateNormalCov": lambda w: D.MultivariateNormal(w, covariance_matrix=spd(w.shape[-1])),
    "NegativeBinomial": lambda w: D.NegativeBinomial(3.0, logits=w),
    "Normal": lambda w: D.Normal(w, 1.0),
    "NormalChecked": lambda w: D.Normal(w, w.exp(), validate_args=True),
    "OneHotCategorical": lambda w: D.OneHotCategorical(logits=w),
    "OneHotCategoricalStraightThrough": lambda w: D.OneHotCategoricalStraightThrough(logits=w),
    "Pareto": lambda w: D.Pareto(w.exp(), 3.0),
    "Poisson": lambda w: D.Poisson(w.exp()),
    "RelaxedBernoulli": lambda w: D.RelaxedBernoulli(torch.tensor(0.5), logits=w),
    "RelaxedOneHotCategorical": lambda w: D.RelaxedOneHotCategorical(torch.tensor(0.5), logits=w),
    "StudentT": lambda w: D.StudentT(w.exp() + 2),
    "Transformed": lambda w: TransformedDistribution(D.Normal(w, 1.0), [T.TanhTransform(cache_size=1)]),
    "TransformedLearned": lambda w: TransformedDistribution(
        D.Normal(torch.zeros_like(w), 1.0), [T.AffineTransform(w, w.exp()), T.SigmoidTransform()]
    ),
    "Uniform": lambda w: D.Uniform(w, w + 1),
    "VonMises": lambda w: D.VonMises(w, torch.tensor(2.0)),
    "Weibull": lambda w: D.Weibull(w.exp(), 2.0),
    "Shifted": Shifted,
    "Triangular": lambda w: Triangular(widths={"w": w.exp()}),
}


@pytest.mark.parametrize("name", DISTRIBUTIONS)
@pytest.mark.parametrize("method", ["sample", "rsample", "scg.sample"])
def test_every_distribution_is_drawn_and_scored_whole(name: str, method: str) -> None:
    w = weight(2, 4)
    if method == "rsample" and not DISTRIBUTIONS[name](w.detach()).has_rsample:
        pytest.skip("has no rsample")

    def model(x: Tensor) -> dict[str, Tensor]:
        d = DISTRIBUTIONS[name](w * x)
        z = sample(d) if method == "scg.sample" else getattr(d, method)()
        return {"loss": (z.float() * 0.5).sum() + d.log_prob(z).sum(), "z": z}

    graph = check(model, torch.ones(4))
    assert len(graph.of(ir.Dist)) == len(graph.of(ir.Sample)) == len(graph.of(ir.LogProb)) == 1
    assert list(graph.sites) == ["z"] and graph.sites["z"].distribution == type(_base(DISTRIBUTIONS[name](w))).__name__


def _base(dist: Distribution) -> Distribution:
    return dist.base_dist if isinstance(dist, Independent) else dist


def test_every_distribution_of_torch_is_in_the_list() -> None:
    known = {type(make(torch.zeros(2, 4))) for make in DISTRIBUTIONS.values()}
    named = {cls for cls in vars(D).values() if isinstance(cls, type) and issubclass(cls, Distribution)}
    left_out = {D.Distribution, D.ExponentialFamily, D.TransformedDistribution, D.Wishart}
    assert named - known <= left_out


def test_a_saturated_transform_keeps_its_cache() -> None:
    w = nn.Parameter(torch.tensor(12.0))

    def model() -> Tensor:
        d = TransformedDistribution(Normal(w, 1.0), [T.TanhTransform(cache_size=1)])
        z = d.rsample()
        return z + d.log_prob(z)

    assert evaluate(trace(model)).isfinite()
    check(model)


def test_draws_of_a_shape() -> None:
    w = weight(3)
    graph = check(lambda: (Independent(Normal(w, 1.0), 1).rsample((5, 2)) ** 2).mean())
    (site,) = graph.of(ir.Sample)
    assert site.sample_shape == (5, 2) and site.tensor.shape == (5, 2, 3) and site.tensor.event_ndim == 1


def test_a_prior_that_is_an_attribute() -> None:
    model = Model(
        lambda m, x: -(m.prior.log_prob(z := Normal(m.net(x), 1.0).rsample()) + m.prior.probs.sum() * 0 + z).mean()
        if hasattr(m.prior, "probs") else -(m.prior.log_prob(z := Normal(m.net(x), 1.0).rsample()) + z).mean(),
        net=nn.Linear(6, 4), prior=Normal(torch.zeros(4), torch.ones(4)),
    )  # fmt: skip
    graph = check(model, X)
    assert {"prior.loc", "prior.scale"} <= set(graph.tensors)


def test_lazy_properties_of_a_captured_distribution_are_not_left_in_it() -> None:
    prior = Bernoulli(logits=torch.zeros(4))
    check(lambda x: (prior.probs * x).sum(), torch.ones(4))
    assert type(prior.probs) is Tensor


@pytest.mark.parametrize("pair", ["normal", "bernoulli", "categorical", "gamma", "dirichlet"])
def test_closed_form_divergences(pair: str) -> None:
    make = {
        "normal": lambda w: Normal(w, w.exp()), "bernoulli": lambda w: Bernoulli(logits=w),
        "categorical": lambda w: Categorical(logits=w), "gamma": lambda w: D.Gamma(w.exp(), w.exp() + 1),
        "dirichlet": lambda w: D.Dirichlet(w.exp()),
    }[pair]  # fmt: skip
    w = weight(2, 3)
    check(lambda: kl_divergence(make(w), make(w * 0.5)).sum() + make(w).entropy().sum(), rtol=1e-5)  # type: ignore[no-untyped-call]


# -- random functions --------------------------------------------------------------------------------------------------
def test_random_functions_of_learned_parameters_are_sites() -> None:
    w = weight(2, 4)

    def model() -> Tensor:
        a = torch.bernoulli(w.sigmoid())
        b = w.sigmoid().bernoulli()
        c = torch.multinomial(w.exp(), 1)
        e = torch.multinomial(w.exp(), 3, replacement=True)
        f = torch.normal(w, 1.0)
        g = torch.normal(0.0, w.exp())
        return (a + b + f + g).sum() * (c.float().sum() + e.float().mean())

    graph = trace(model)
    assert {name: site.distribution for name, site in graph.sites.items()} == {
        "a": "Bernoulli", "b": "Bernoulli", "c": "Categorical", "e": "Categorical", "f": "Normal", "g": "Normal",
    }  # fmt: skip
    assert evaluate(graph).shape == ()
    assert graph["e"].tensor.shape == (3, 2)  # n draws in front; the model sees them last


def test_random_functions_of_a_draw_are_sites() -> None:
    w = weight(3)

    def model() -> Tensor:
        z = Bernoulli(logits=w).sample()
        y = torch.bernoulli(0.2 + 0.6 * z)
        return y.sum()

    assert list(check(model).sites) == ["z", "y"]


def test_noise_stays_noise() -> None:
    net = nn.Linear(4, 4)

    def model(x: Tensor) -> Tensor:
        keep = torch.bernoulli(torch.full_like(x, 0.5))
        index = torch.multinomial(torch.ones(4), 2)
        h = F.dropout(net(x), 0.3) * keep + torch.randn_like(x) + torch.rand(4) + torch.normal(x, 1.0)
        return (h + F.gumbel_softmax(h, hard=True))[:, index].mean()

    assert not check(model, torch.ones(2, 4)).sites


@pytest.mark.parametrize("draw", [
    lambda p: torch.poisson(p), lambda p: torch.empty(3).bernoulli_(p), lambda p: torch._standard_gamma(p),
    lambda p: torch.binomial(torch.ones(3), p), lambda p: torch.multinomial(p, 2),
])  # fmt: skip
def test_other_random_functions_of_learned_parameters_are_refused(draw: Callable[[Tensor], Tensor]) -> None:
    w = weight(3)
    with pytest.raises(TraceError, match=r"test_tracer.py:\d+: .*[Dd]raw"):
        trace(lambda: draw(w.sigmoid()).float().sum())


@pytest.mark.parametrize("draw", [
    lambda p, g: torch.bernoulli(p, generator=g), lambda p, g: torch.rand(3, generator=g) * p,
    lambda p, g: torch.randn(3, generator=g) * p,
])  # fmt: skip
def test_a_generator_of_the_user_s_is_refused(draw: Callable[..., Tensor]) -> None:
    w, generator = weight(3), torch.Generator()
    with pytest.raises(TraceError, match=r"test_tracer.py:\d+: .*generator=.*manual_seed"):
        trace(lambda: draw(w.sigmoid(), generator).sum())


def test_lazy_modules_are_to_be_called_once() -> None:
    model = Model(lambda m, x: Bernoulli(logits=m.net(x)).sample().sum(), net=nn.LazyLinear(2))
    with pytest.raises(TraceError, match=r"net.weight has no shape yet: call the model once"):
        trace(model, (X,))
    model(X)
    assert len(trace(model, (X,)).sites) == 1


# -- modules -----------------------------------------------------------------------------------------------------------
def seeded(make: Callable[[], Any]) -> Any:
    torch.manual_seed(3)
    return make()


MODULES: dict[str, Callable[[], tuple[Callable[..., Any], tuple[Any, ...]]]] = {
    "batch_norm_dropout": lambda: (
        nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Dropout(0.4), nn.Linear(4, 1), Mean()), (X,)
    ),
    "conv": lambda: (
        nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.MaxPool2d(2), nn.ConvTranspose2d(3, 2, 2), Mean()),
        (torch.rand(2, 1, 8, 8),),
    ),
    "gru": lambda: (
        Model(lambda m, x: draw(m.net(x)[0]), net=nn.GRU(4, 3, 2, batch_first=True)), (torch.rand(2, 5, 4),)
    ),
    "lstm": lambda: (Model(lambda m, x: draw(m.net(x)[1][0]), net=nn.LSTM(4, 3)), (torch.rand(5, 2, 4),)),
    "gru_cell": lambda: (Model(unroll, cell=nn.GRUCell(3, 4), out=nn.Linear(4, 3)), (torch.rand(2, 4),)),
    "attention": lambda: (
        Model(lambda m, x: draw(m.net(x, x, x)[0]), net=nn.MultiheadAttention(4, 2, dropout=0.1, batch_first=True)),
        (torch.rand(2, 5, 4),),
    ),
    "transformer": lambda: (
        Model(lambda m, x: draw(m.net(x)), net=nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)),
        (torch.rand(2, 5, 4),),
    ),
    "embedding": lambda: (
        Model(lambda m, i: draw(m.net(Categorical(logits=m.net(i)).sample())), net=nn.Embedding(7, 7)),
        (torch.tensor([1, 3]),),
    ),
    "embedding_bag": lambda: (
        Model(lambda m, i: draw(m.net(i)), net=nn.EmbeddingBag(7, 3)), (torch.tensor([[1, 3], [2, 2]]),)
    ),
    "weight_norm": lambda: (
        nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(6, 4)), Mean()), (X,)
    ),
    "spectral_norm": lambda: (
        nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(6, 4)), Mean()), (X,)
    ),
    "old_spectral_norm": lambda: (nn.Sequential(nn.utils.spectral_norm(nn.Linear(6, 4)), Mean()), (X,)),
    "tied": lambda: (tied(), (X,)),
    "layer_norm": lambda: (nn.Sequential(nn.LayerNorm(6), nn.GELU(), nn.GroupNorm(2, 6), Mean()), (X,)),
    "parameter_list": lambda: (
        Model(lambda m: draw(m.ws[0] + m.table["b"]), ws=nn.ParameterList([weight(3)]),
              table=nn.ParameterDict({"b": weight(3)})), ()
    ),
}  # fmt: skip


class Mean(nn.Module):
    def forward(self, h: Tensor) -> Tensor:
        return draw(h)


def draw(h: Tensor) -> Tensor:
    z = Normal(h, 1.0).rsample()
    return (z**2).mean()


def unroll(m: Any, h: Tensor) -> Tensor:
    total = torch.zeros(())
    for _ in range(4):
        q = Bernoulli(logits=m.out(h))
        z = q.sample()
        h = m.cell(z, h)
        total = total + q.log_prob(z).sum() + h.mean()
    return total


def tied() -> nn.Module:
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), Mean())
    model[2].weight = model[0].weight
    return model


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_modules(name: str, mode: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model, args = seeded(MODULES[name])
        assert isinstance(model, nn.Module)
        model.train(mode == "train")
        check(model, *args)


def test_names_of_an_unrolled_loop() -> None:
    model, args = seeded(MODULES["gru_cell"])
    assert list(trace(model, args).sites) == ["z", "z_1", "z_2", "z_3"]


# -- programs ----------------------------------------------------------------------------------------------------------
def test_structures_in_and_out() -> None:
    w = weight(3)

    def model(batch: dict[str, Any], scale: float, *rest: Tensor, mask: Tensor, flag: bool = True) -> Any:
        h = (w * batch["x"][0] + batch["x"][1] * scale) * mask + rest[0]
        return h.mean(), {"h": [h, (None, "text", 3)], "w": w, "mask": mask, "flag": flag}

    x = torch.ones(3)
    graph = check(model, {"x": (x, x * 2)}, 0.5, x, mask=x * 3, flag=False)
    assert [(node.path, node.position) for node in graph.of(ir.Input)] == [
        ("batch.x.0", 0), ("batch.x.1", 1), ("rest.0", 2), ("mask", 3),
    ]  # fmt: skip


GLOBAL = weight(3)
FACTOR = 2.0


def test_closures_globals_partials_and_bound_methods() -> None:
    import functools

    net, theta, table = nn.Linear(3, 3), weight(3), {"lr": [weight(3)]}

    def helper(h: Tensor) -> Tensor:
        return h * GLOBAL * FACTOR

    def model(x: Tensor, *, extra: Tensor) -> Tensor:
        return helper(net(x) * theta + table["lr"][0] + extra).mean()

    partial = functools.partial(model, extra=theta)
    graph = check(partial, torch.ones(3))
    assert {"GLOBAL", "theta", "table.lr.0", "net.weight", "net.bias"} >= set(graph.tensors)
    assert all(node.role == "parameter" for node in graph.of(ir.Param))

    class Trainer:
        def __init__(self) -> None:
            self.net = nn.Linear(3, 3)

        def loss(self, x: Tensor) -> Tensor:
            return self.net(x).mean()

    assert set(check(Trainer().loss, torch.ones(3)).tensors) == {"net.weight", "net.bias"}


def test_roles_of_captured_tensors() -> None:
    norm, shift = nn.BatchNorm1d(3), torch.ones(3)
    graph = check(Model(lambda m, x: (m.norm(x) + shift).mean(), norm=norm), torch.rand(4, 3))
    roles = {node.path: node.role for node in graph.of(ir.Param)}
    assert roles["norm.weight"] == "parameter" and roles["norm.running_mean"] == "buffer"
    assert [role for path, role in roles.items() if "shift" in path] == ["constant"]


class Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return (x > 0).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0] * ctx.scale, None


straight = Straight.apply


def test_custom_functions_keep_their_backward() -> None:
    w = weight(4)
    graph = check(lambda: (Straight.apply(w, 2.0) * w + straight(w, 3.0)).sum())  # type: ignore[no-untyped-call]
    assert sum(node.op_name.endswith("apply") for node in graph.of(ir.Op)) == 2


def test_no_grad_means_detach() -> None:
    w, v = weight(3), weight(3)

    def model(x: Tensor) -> Tensor:
        with torch.no_grad():
            baseline = (w * x).exp()
            z = Bernoulli(logits=v).sample()
        return (w * baseline).sum() + (v.detach() * w * z).sum() + (w.data * v).sum()

    graph = check(model, torch.ones(3))
    assert graph["z"].data  # type: ignore[attr-defined]


def test_first_trace_under_no_grad_is_the_same() -> None:
    model = VAE()
    with torch.no_grad():
        quiet = trace(model, (X,))
    assert [node.name for node in quiet] == [node.name for node in trace(model, (X,))]
    assert not quiet["z"].data  # type: ignore[attr-defined]


def test_in_place_writes() -> None:
    w = weight(3, 4)

    def model(x: Tensor) -> Tensor:
        y = torch.zeros(3, 4)
        y[0] = w[0] * x
        y[:, 1] += w[:, 0]
        y.view(-1).mul_(2.0)
        y.masked_fill_(x > 0.5, 1.0)
        literal = torch.tensor([1.0, 2.0])
        literal[0] = 5.0
        torch.add(y.detach(), x, out=torch.empty(3, 4))
        return (y * w).sum() * literal.sum()

    for _ in range(2):
        check(model, torch.rand(4))


def test_tensor_code_of_all_kinds() -> None:
    w = weight(4, 4)

    def model(x: Tensor) -> Tensor:
        z = Categorical(logits=w).sample()
        h = torch.where(w > 0, w, x).round() + w.clamp(-1, 1) + F.one_hot(z, 4)
        best = w.argmax(-1)
        return (h.cumsum(0) + w.sort(-1).values + w[best].flip(0) + w.max(-1, keepdim=True)[0]).mean() + torch.einsum(
            "ij,ij->", w, w
        )

    check(model, torch.rand(4))


def test_checkpoint_dissolves() -> None:
    net = nn.Linear(4, 4)
    check(lambda x: checkpoint(lambda h: net(h).relu(), x, use_reentrant=False).mean(), torch.rand(2, 4))


def test_gradients_inside_the_model() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Tanh())

    def model(x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
        return (slope**2).mean()

    check(model, torch.rand(2, 4))


@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_autocast_regions(dtype: torch.dtype) -> None:
    net = nn.Linear(4, 4)

    def model(x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=dtype):
            h = torch.einsum("bi,ij->bj", net(x).relu(), net.weight) @ net.weight
            wide = F.mse_loss(h, torch.ones_like(h))
        return (net(h.float()) ** 2).mean() + wide

    graph = check(model, torch.rand(2, 4), rtol=1e-2)  # autocast casts each weight once, and sums its gradient in bf16
    assert any(node.tensor.dtype == dtype for node in graph.of(ir.Op) if isinstance(node.type, ir.TensorType))


# -- primitives --------------------------------------------------------------------------------------------------------
def test_primitives() -> None:
    w = weight(2, 3)

    @opaque(shape=lambda z: z.shape[:-1], batch_dims=1)
    def score(z: Tensor) -> Tensor:
        return torch.from_numpy((z.numpy() > 0.5).sum(-1).astype("float32"))

    @opaque(shape=(lambda a, k: (k,), lambda a, k: a.shape), dtype=(torch.int64, torch.float32), pure=False)
    def step(a: Tensor, k: int) -> tuple[Tensor, Tensor]:
        return torch.arange(k), a.detach() * 2

    def model(reward: Tensor, logged: Tensor) -> Tensor:
        z = sample(Bernoulli(logits=w), "code", estimator="score_function")
        act = sample(Categorical(logits=w), value=logged)
        first, second = step(w, k=3)
        extra = cost(depends(reward, on=act, dims=("tied",)), "reward")
        return cost(score(z), "score").mean() + extra.mean() + first.sum() + second.mean()

    graph = check(model, torch.ones(2), torch.tensor([0, 2]))
    assert list(graph.sites) == ["code", "act"] and set(graph.costs) == {"reward", "score"}
    code, act = graph.of(ir.Sample)
    assert code.requested == "score_function" and act.value is not None
    assert [(node.batch_dims, node.pure) for node in graph.of(ir.Opaque)] == [(0, False), (1, True)]
    assert graph.of(ir.Depends)[0].on == "act"


def test_a_cost_that_is_lost() -> None:
    w = weight(3)

    def model() -> Tensor:
        cost(w.sum(), "lost")
        return w.mean()

    with pytest.raises(TraceError, match=r"test_tracer.py:\d+: the cost 'lost' never reaches the objective"):
        trace(model)


# -- names -------------------------------------------------------------------------------------------------------------
def test_sites_are_named_after_variables() -> None:
    w = weight(3)

    class Named(nn.Module):
        def forward(self) -> Tensor:
            q = Normal(w, 1.0)
            self.state = q.rsample()
            a, b = q.sample(), q.sample().float()
            c: Tensor = (
                q
                .sample()
                .view(-1)
            )  # fmt: skip
            ds = [q.sample() for _ in range(2)]
            table = {}
            table["k"] = q.sample()
            if (e := q.sample()) is not None:
                f = draw_by_helper(q)
            return (q.sample() + self.state + a + b + c + ds[0] + ds[1] + table["k"] + e + f).sum()

    with pytest.warns(StateWarning, match="sets state"):
        names = list(trace(Named()).sites)
    assert names == ["state", "a", "b", "c", "ds", "ds_1", "table", "e", "f", "site_0"]


def draw_by_helper(q: Distribution) -> Tensor:
    return q.sample()


def test_explicit_names() -> None:
    w = weight(3)

    def model(names: tuple[str, ...]) -> Tensor:
        z = Bernoulli(logits=w).sample()
        total = z.sum()
        for name in names:
            total = total + sample(Bernoulli(logits=w), name).sum()
        return total

    assert list(trace(model, (("a", "z"),)).sites) == ["z_1", "a", "z"]
    with pytest.raises(TraceError, match=r"two sites are named 'a'.*\n?.*f\"a_\{t\}\""):
        trace(model, (("a", "a"),))


# -- refusals ----------------------------------------------------------------------------------------------------------
W = weight(3)


def refused_if(x: Tensor) -> Tensor:
    z = Bernoulli(logits=W).sample()
    if z.sum() > 1:
        return W.sum()
    return W.mean()


def refused_while(x: Tensor) -> Tensor:
    z = Normal(W, 1.0).rsample()
    while (z > 3).any():
        z = z / 2
    return z.sum()


def refused_assert(x: Tensor) -> Tensor:
    z = Normal(W, 1.0).rsample()
    assert torch.isfinite(z).all()
    return z.sum()


def refused_numbers(read: Callable[[Tensor], Any]) -> Callable[[Tensor], Tensor]:
    def model(x: Tensor) -> Tensor:
        z = Bernoulli(logits=W).sample()
        return W.sum() * torch.as_tensor(read(z.sum()))

    return model


def refused_mask(x: Tensor) -> Tensor:
    z = Bernoulli(logits=W).sample()
    return W[z > 0].sum()


def refused_nonzero(x: Tensor) -> Tensor:
    return W[torch.nonzero(x)].sum()


def refused_vmap(x: Tensor) -> Tensor:
    return torch.vmap(lambda a: a * W)(x).sum()


def refused_hook(x: Tensor) -> Tensor:
    h = W * 2
    h.register_hook(lambda g: g * 2)
    return h.sum()


def refused_backward(x: Tensor) -> Tensor:
    (W * 2).sum().backward()
    return W.sum()


def refused_write(x: Tensor) -> Tensor:
    h = W * 2
    with torch.no_grad():
        h.clamp_(min=0)
    return h.sum()


def refused_new_tensor(x: Tensor) -> Tensor:
    z = Bernoulli(logits=W).sample()
    return W.sum() * torch.tensor([z[0], z[1]]).sum()


def refused_cond(x: Tensor) -> Tensor:
    return torch.cond(x.sum() > 0, lambda a: a * W, lambda a: a - W, (x,)).sum()


REFUSED: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "if": (refused_if, "torch.where"),
    "while": (refused_while, "torch.where"),
    "assert": (refused_assert, "assert"),
    "item": (refused_numbers(lambda z: z.item()), "opaque"),
    "int": (refused_numbers(lambda z: int(z)), "opaque"),
    "float": (refused_numbers(lambda z: float(z)), "opaque"),
    "tolist": (refused_numbers(lambda z: z.tolist()), "opaque"),
    "numpy": (refused_numbers(lambda z: z.numpy()), "opaque"),
    "range": (refused_numbers(lambda z: len(range(z))), "opaque"),
    "mask": (refused_mask, "torch.where"),
    "nonzero": (refused_nonzero, "torch.where"),
    "vmap": (refused_vmap, "torch.func"),
    "cond": (refused_cond, "torch.where"),
    "hook": (refused_hook, "hook"),
    "backward": (refused_backward, "autograd.grad"),
    "no_grad_write": (refused_write, "no_grad"),
    "tensor_of_tensors": (refused_new_tensor, "torch.stack"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_place_and_way_out(name: str) -> None:
    model, way_out = REFUSED[name]
    with pytest.raises(TraceError, match=rf"(?s)test_tracer.py:\d+: .*{way_out}"):
        trace(model, (torch.ones(2, 3),))
    assert "__getattribute__" not in vars(Distribution)
    check(VAE(), X)  # nothing of the failed trace is left


@pytest.mark.parametrize("result", [
    lambda w: w, lambda w: None, lambda w: {"cost": w.sum()}, lambda w: (), lambda w: 3.0, lambda w: w.sum().long(),
])  # fmt: skip
def test_objectives(result: Callable[[Tensor], Any]) -> None:
    w = weight(3)
    with pytest.raises(TraceError, match="objective"):
        trace(lambda: result(w))


def test_outputs_that_hold_tensors() -> None:
    w = weight(3)
    with pytest.raises(TraceError, match="returned a Normal, which holds tensors"):
        trace(lambda: (w.sum(), Normal(w, 1.0)))


class Pair(NamedTuple):
    loss: Tensor
    rest: Tensor


def test_containers_that_hold_tensors() -> None:
    w = weight(3)
    with pytest.raises(TraceError, match="returned a set, which holds tensors"):
        trace(lambda: (w.sum(), {w}))
    with pytest.raises(TraceError, match="returned a UserDict, which holds tensors"):
        trace(lambda: (w.sum(), UserDict(rest=w)))
    with pytest.raises(TraceError, match="an? .*int64 tensor"):
        trace(lambda: (w > 0).sum())


def test_named_tuples_and_ordered_dicts() -> None:
    w = weight(3)
    assert type(check(lambda: Pair(w.sum(), w)).outputs) is Pair
    assert type(check(lambda: OrderedDict(loss=w.sum(), rest=w)).outputs) is OrderedDict


def test_parts_under_torch_compile_run_as_they_are() -> None:
    net = torch.compile(nn.Linear(3, 3), backend="eager")
    graph = trace(lambda x: net(x).mean(), (torch.ones(2, 3),))
    assert [node.op_name for node in graph.of(ir.Op)] == ["linear", "mean"]


def test_script_modules_are_refused() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        net = torch.jit.script(nn.Linear(3, 3))
    with pytest.raises(TraceError, match="net is a TorchScript module"):
        trace(lambda: net(torch.ones(2, 3)).mean())


def test_literals_may_be_read() -> None:
    w = weight(3)
    check(lambda: w.sum() * torch.tensor(2.0).item() * int(torch.tensor(3)))


# -- state and threads -------------------------------------------------------------------------------------------------
class Running(nn.Module):
    average: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("average", torch.zeros(3))
        self.w = weight(3)
        self.log: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        h = self.w * x
        self.average = 0.9 * self.average + 0.1 * h.detach()
        return (h - self.average).sum()


def test_buffers_that_are_replaced_are_updated() -> None:
    check(Running(), torch.ones(3))


def test_state_in_python_is_put_back() -> None:
    class Logging(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = weight(3)
            self.log: list[Tensor] = []
            self.calls = 0

        def forward(self) -> Tensor:
            z = Normal(self.w, 1.0).rsample()
            self.log.append(z)
            self.calls += 1
            self.last = z
            return z.sum()

    model = Logging()
    with pytest.warns(StateWarning) as caught:
        trace(model)
    assert {str(w.message).split()[3] for w in caught} >= {"calls", "last"}
    assert model.log == [] and model.calls == 0 and not hasattr(model, "last")


def test_state_that_is_read_and_replaced_is_refused() -> None:
    class Stateful(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w, self.h = weight(3), torch.zeros(3)

        def forward(self) -> Tensor:
            self.h = self.h + self.w
            return self.h.sum()

    model = Stateful()
    with pytest.raises(TraceError, match="reads h and then sets it.*buffer"):
        trace(model)
    assert type(model.h) is Tensor


def test_two_threads() -> None:
    errors: list[BaseException] = []
    checked = threading.Event()

    def traces() -> None:
        try:
            for _ in range(3):
                trace(VAE(), (X,))
        except BaseException as error:
            errors.append(error)

    def bystander() -> None:
        try:
            while not checked.is_set():
                with pytest.raises(ValueError, match="scale"):
                    Normal(0.0, -1.0, validate_args=True)  # torch.compile turns the default off
                assert type(Straight.apply(torch.ones(2), 1.0)) is Tensor  # type: ignore[no-untyped-call]
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=traces) for _ in range(2)]
    other = threading.Thread(target=bystander)
    for thread in [*threads, other]:
        thread.start()
    for thread in threads:
        thread.join()
    checked.set()
    other.join()
    assert not errors
    assert "apply" not in vars(torch.autograd.function._SingleLevelFunction)


@pytest.mark.parametrize(
    "look_up",
    [
        lambda t, i, j: t[i],
        lambda t, i, j: t[i, j],
        lambda t, i, j: t[i, 1:],
        lambda t, i, j: t[:, i],
        lambda t, i, j: t[..., i],
        lambda t, i, j: t[None, i, ..., j],
        lambda t, i, j: t[i, torch.tensor([0, 1])],
        lambda t, i, j: t[0, :, j],
    ],
)
def test_integer_scalars_look_up_tables(look_up: Any) -> None:
    table = torch.arange(24.0).reshape(3, 4, 2)

    def model(i: Tensor, j: Tensor) -> Tensor:
        return look_up(table, i, j).sum()

    i, j = torch.tensor(1), torch.tensor(1)
    graph = trace(model, (i, j))
    torch.testing.assert_close(evaluate(graph, (i, j)), model(i, j))

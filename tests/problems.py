"""Small programs with finite support, in float64: what `scg.exact` can sum, and every estimator must agree with.

Each is a function that returns a `Problem`, fresh and the same every time. At most four bits: a test sums over the
draws of up to three copies.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.distributions import (
    Bernoulli,
    Binomial,
    Categorical,
    Distribution,
    Independent,
    OneHotCategorical,
    constraints,
    kl_divergence,
)

import scg.primitives as primitives


@dataclass(frozen=True)
class Problem:
    """A model and one or more calls of it, in order."""

    model: Callable[..., Any]
    calls: tuple[tuple[Any, ...], ...] = ((),)
    """Arguments of each call."""
    before: Callable[[int], None] = lambda call: None
    """Run before each call, with its index: an annealing schedule."""
    estimators: dict[str, str] = field(default_factory=dict)
    """Estimators the problem is about; the rest of its sites take any."""
    bits: int = 3
    """log2 of the number of outcomes, rounded up: what a test multiplies by the number of copies."""


class TwoPoint(Distribution):
    """``loc - scale`` or ``loc + scale``, each with probability 1/2: a reparameterised law with finite noise."""

    arg_constraints: ClassVar[dict[str, Any]] = {"loc": constraints.real, "scale": constraints.positive}
    support = constraints.real
    has_rsample = True

    def __init__(self, loc: Tensor, scale: Tensor, validate_args: bool | None = None) -> None:
        self.loc, self.scale = torch.broadcast_tensors(loc, scale)
        super().__init__(self.loc.shape, validate_args=validate_args)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        shape = self._extended_shape(sample_shape)
        sign = 2 * torch.bernoulli(torch.full(shape, 0.5, dtype=self.loc.dtype)) - 1
        return self.loc + self.scale * sign


def _vector(*values: float) -> nn.Parameter:
    return nn.Parameter(torch.tensor(values, dtype=torch.float64))


def _tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


# -- the shape of the graph ---------------------------------------------------------------------------------------
class _Chain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w, self.c = _vector(0.4, -0.7, 0.9), _vector(1.3, -0.5, 0.8)

    def forward(self) -> Tensor:
        a = Bernoulli(logits=self.w[0]).sample()
        b = Bernoulli(logits=self.w[1] + self.c[0] * a).sample()
        c = Bernoulli(logits=self.w[2] + self.c[1] * b).sample()
        return (a - 0.3) ** 2 + 2 * (b - 0.8) ** 2 * self.c[2] + torch.exp(c)


def chain() -> Problem:
    """Each site feeds the next; a cost each, so that the last site must not be charged for the first cost."""
    return Problem(_Chain())


class _Diamond(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w, self.c = _vector(0.2, 0.5, -0.4), _vector(1.1, -0.9)

    def forward(self) -> Tensor:
        top = Bernoulli(logits=self.w[0]).sample()
        left = Bernoulli(logits=self.w[1] + self.c[0] * top).sample()
        right = Bernoulli(logits=self.w[2] + self.c[1] * top).sample()
        return (left + 2 * right - top - 0.7) ** 2


def diamond() -> Problem:
    """Two paths from one site meet again in one cost."""
    return Problem(_Diamond())


class _DeadSite(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = _vector(0.3, -1.2)

    def forward(self) -> tuple[Tensor, Tensor]:
        unused = Bernoulli(logits=self.w[0]).sample()
        z = Bernoulli(logits=self.w[1]).sample()
        return (z - 0.25) ** 2, unused


def dead_site() -> Problem:
    """A site that no cost sees: its parameter has gradient zero, its value is still an output."""
    return Problem(_DeadSite(), bits=2)


class _SomeCosts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w, self.free = _vector(0.3, -0.6), _vector(0.5)

    def forward(self) -> Tensor:
        z = Bernoulli(logits=self.w[0]).sample()
        y = Bernoulli(logits=self.w[1]).sample()
        return 3 * z + (z - 2 * y) ** 2 + 5 * torch.sin(y) + (self.free**2).sum()


def some_costs() -> Problem:
    """Costs of one site alone, of both, and of none."""
    return Problem(_SomeCosts(), bits=2)


class _Upstream(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w, self.net = _vector(0.3, 0.8), _vector(0.9)

    def forward(self, x: Tensor) -> Tensor:
        before = ((self.net * x - 1) ** 2).sum()
        z = Bernoulli(logits=self.w[0] + before).sample()
        between = 4 * z * self.net.sum()
        y = Bernoulli(logits=self.w[1] * z).sample()
        return before + between + (y - 0.4) ** 2


def upstream_costs() -> Problem:
    """Costs computed before a site is drawn, one of which is also its parameter."""
    return Problem(_Upstream(), ((_tensor(0.5, 1.5),),), bits=2)


class _UnrolledLoop(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w, self.u = _vector(0.6), _vector(-0.8, 0.3)

    def forward(self) -> Tensor:
        h, loss = self.u[1], torch.zeros((), dtype=torch.float64)
        for t in range(3):
            z = Bernoulli(logits=self.w[0] * h).sample()
            h = torch.tanh(self.u[0] * h + z)
            loss = loss + (h - 0.2 * t) ** 2
        return loss


def unrolled_loop() -> Problem:
    """A state carried through three steps with a cost each: reward-to-go."""
    return Problem(_UnrolledLoop())


# -- dims ---------------------------------------------------------------------------------------------------------
class _TiedBatch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enc, self.dec = _vector(0.7, -0.4), _vector(1.2, 0.1)

    def forward(self, x: Tensor) -> Tensor:
        z = Bernoulli(logits=self.enc[0] * x + self.enc[1]).sample()  # [B]
        return ((self.dec[0] * z + self.dec[1] - x) ** 2).mean()


def tied_batch() -> Problem:
    """One latent an example, the loss a mean: example i's cost teaches example i's latent only."""
    return Problem(_TiedBatch(), ((_tensor(0.5, -1.0, 2.0),),))


class _FlattenedDims(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([[0.3, -0.5], [0.8, 0.1]], dtype=torch.float64))

    def forward(self) -> Tensor:
        z = Bernoulli(logits=self.w).sample()  # [2, 2]
        flat = z.t().reshape(4)
        pair = flat[:3:2] * flat[1::2]  # [2]
        return pair.sum() + (flat * _tensor(1.0, -2.0, 3.0, 0.5)).sum() + (z.sum(1) - 1.5).pow(2).sum()


def flattened_dims() -> Problem:
    """Two dims transposed and merged before the costs."""
    return Problem(_FlattenedDims(), bits=4)


class _MixedBatch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = _vector(0.3, -0.5, 1.0)

    def forward(self) -> Tensor:
        z = Bernoulli(logits=self.w).sample()
        centred = z - z.mean(0)
        return (centred**2 * _tensor(1.0, 2.0, 4.0)).mean() + 0.5 * z.roll(1).dot(_tensor(1.0, -1.0, 2.0))


def mixed_batch() -> Problem:
    """An operation that mixes the batch, and one that moves it."""
    return Problem(_MixedBatch())


class _OwnDraws(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = _vector(0.4)

    def forward(self) -> Tensor:
        z = Bernoulli(logits=self.w).sample((3,))  # [3, 1]
        return ((z - 0.4) ** 2).mean() + (z.mean() - 0.6).abs()


def own_draws() -> Problem:
    """A site with draws of its own."""
    return Problem(_OwnDraws())


# -- families -----------------------------------------------------------------------------------------------------
class _Index(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w, self.table = _vector(0.2, -0.3, 0.5), _vector(1.0, -2.0, 0.7)

    def forward(self) -> Tensor:
        z = Categorical(logits=self.w).sample((2,))  # [2]
        return (self.table[z] ** 2 * _tensor(1.0, 3.0)).sum()


def integer_index() -> Problem:
    """A Categorical's integer draw looks up a learned table."""
    return Problem(_Index(), bits=4)


class _OneHot(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w, self.v = _vector(0.2, -0.3, 0.5), _vector(1.0, -2.0, 0.7)

    def forward(self, x: Tensor) -> Tensor:
        z = OneHotCategorical(logits=self.w * x[:, None]).sample()  # [B | 3]
        return ((z @ self.v - x) ** 2).mean()


def one_hot() -> Problem:
    """A site with an event dim."""
    return Problem(_OneHot(), ((_tensor(1.0, -0.5),),), bits=4)


class _Binomial(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = _vector(0.2, -0.6)

    def forward(self) -> Tensor:
        n = Binomial(3, logits=self.w[0]).sample()
        z = Bernoulli(logits=self.w[1] * n).sample()
        return (n - 1.2) ** 2 * (1 + z)


def binomial() -> Problem:
    """More than two outcomes, and a count as another site's parameter."""
    return Problem(_Binomial())


class _Elbo(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enc, self.dec, self.prior = _vector(0.4, -0.8), _vector(1.5, -1.0), _vector(0.1, 0.2)

    def forward(self, x: Tensor) -> Tensor:
        q = Independent(Bernoulli(logits=self.enc * x[:, None]), 1)
        z = q.sample()  # [B | 2]
        p = Independent(Bernoulli(logits=self.prior.expand_as(z)), 1)
        nll = -Bernoulli(logits=z @ self.dec).log_prob((x > 0).to(x.dtype))
        return (nll + q.log_prob(z) - p.log_prob(z)).mean()


def independent_elbo() -> Problem:
    """An ELBO with ``Independent``: the site's own log-density is a cost."""
    return Problem(_Elbo(), ((_tensor(0.7, -1.1),),), bits=4)


class _ClosedFormKl(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enc, self.dec = _vector(0.4, -0.8, 0.3), _vector(1.5, -1.0, 0.6)

    def forward(self) -> Tensor:
        q = Bernoulli(logits=self.enc)
        z = q.sample()
        kl = kl_divergence(q, Bernoulli(probs=0.5 * torch.ones_like(z))).sum()
        return -Bernoulli(logits=(z * self.dec).sum()).log_prob(_tensor(1.0)[0]) + kl


def closed_form_kl() -> Problem:
    """A KL in closed form: no site influences it."""
    return Problem(_ClosedFormKl())


class _SharedLogits(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = _vector(0.3)

    def forward(self) -> Tensor:
        q = Bernoulli(logits=self.w[0])
        a = q.sample()
        b = q.sample()
        return (a - b) ** 2 + 3 * a - 0.2 * b + self.w[0] ** 2 * b


def shared_logits() -> Problem:
    """Two draws of one distribution object are two sites, and its logits are in a cost as well."""
    return Problem(_SharedLogits(), bits=2)


class _Functions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w, self.v = _vector(0.3, -0.2), _vector(0.4, 0.1, -0.9)

    def forward(self) -> Tensor:
        z = torch.bernoulli(torch.sigmoid(self.w))
        k = torch.multinomial(torch.softmax(self.v + z.sum(), 0), 1)
        return ((z - 0.3) ** 2).sum() * (1 + k[0])


def random_functions() -> Problem:
    """``torch.bernoulli`` and ``torch.multinomial`` of parameters are sites."""
    return Problem(_Functions(), bits=4)


# -- costs --------------------------------------------------------------------------------------------------------
class _NotDifferentiable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = _vector(0.3, -0.2, 0.6)

    def forward(self) -> Tensor:
        z = Bernoulli(logits=self.w).sample()
        return (z.sum() > 1.5).to(z.dtype) * 2 + torch.round(0.7 * z.sum()) - z.argmax().to(z.dtype)


def not_differentiable() -> Problem:
    """Comparison, rounding and argmax of a draw."""
    return Problem(_NotDifferentiable())


@primitives.opaque(shape=lambda z: z.shape[:-1], batch_dims=1)
def _metric(z: Tensor) -> Tensor:
    return torch.from_numpy((z.numpy() * [1.0, 2.0]).sum(-1) ** 2)


class _OpaqueCost(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([[0.3, -0.2], [0.6, 0.1]], dtype=torch.float64))

    def forward(self) -> dict[str, Tensor]:
        z = primitives.sample(Bernoulli(logits=self.w), "code")
        reward = primitives.cost(_metric(z), "reward")  # [2]
        return {"loss": reward.mean(), "code": z}


def opaque_cost() -> Problem:
    """A reward computed by numpy, in a dict output, with a name."""
    return Problem(_OpaqueCost(), bits=4)


class _ReportedCosts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w, self.v = _vector(0.3, -0.2), _vector(0.6, 0.1)

    def forward(self) -> dict[str, Tensor]:
        q = Bernoulli(logits=self.w)
        z = q.sample()
        nll = primitives.cost(-Bernoulli(logits=self.v * z).log_prob(1 - z).sum(-1), "nll")
        kl = primitives.cost((q.log_prob(z) - Bernoulli(logits=self.v).log_prob(z)).sum(-1), "kl")
        return {"loss": nll + kl, "nll": 2 * nll, "kl": -kl}


def reported_costs() -> Problem:
    """Named costs that split further, returned beside the loss as well."""
    return Problem(_ReportedCosts(), bits=2)


class _Detached(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w, self.c = _vector(0.3, -0.2), _vector(0.8)

    def forward(self) -> Tensor:
        z = Bernoulli(logits=self.w).sample()
        with torch.no_grad():
            data = Bernoulli(logits=self.c[0] + z[0]).sample()
        return (z.sum() - 0.7).detach() ** 2 + self.c[0] * (data - z[1]) ** 2


def detached() -> Problem:
    """A detached reward still follows from the action; a draw under ``no_grad`` is data, and carries influence."""
    return Problem(_Detached())


class _SampledMask(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w, self.m = _vector(0.3, -0.2), _vector(0.5, -0.5)

    def forward(self) -> Tensor:
        mask = Bernoulli(logits=self.m).sample()
        z = Bernoulli(logits=self.w).sample()
        return (mask * (z - 0.3) ** 2).sum() / 2


def sampled_mask() -> Problem:
    """The weight of a cost is itself a draw."""
    return Problem(_SampledMask(), bits=4)


class _LearnedCoefficient(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w, self.log_weight = _vector(0.3, -0.2), _vector(0.1, -0.4)

    def forward(self) -> Tensor:
        z = Bernoulli(logits=self.w).sample()
        return (torch.exp(self.log_weight) * (z - 0.3) ** 2).sum() - self.log_weight.sum()


def learned_coefficient() -> Problem:
    """The weight of a cost is learned: it has a gradient of its own, and weighs the learning signal."""
    return Problem(_LearnedCoefficient(), bits=2)


# -- from call to call --------------------------------------------------------------------------------------------
class _Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = _vector(0.3, -0.2, 0.6)

    def forward(self, mask: Tensor) -> Tensor:
        z = Bernoulli(logits=self.w).sample()
        return ((z - 0.3) ** 2 * mask).sum() / mask.sum()


def changing_mask() -> Problem:
    """The weights are an input: what the first call saw must not be frozen."""
    return Problem(_Masked(), ((_tensor(1.0, 0.0, 1.0),), (_tensor(0.0, 1.0, 1.0),)))


class _Annealed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w, self.beta = _vector(0.3, -0.2), 0.1

    def forward(self) -> Tensor:
        q = Bernoulli(logits=self.w)
        z = q.sample()
        return ((z - 0.3) ** 2).sum() + self.beta * q.log_prob(z).sum()


def annealed_beta() -> Problem:
    """A plain attribute of the module changes between calls."""
    model = _Annealed()

    def anneal(call: int) -> None:
        model.beta = 0.1 + call

    return Problem(model, ((), ()), before=anneal, bits=2)


# -- estimators side by side --------------------------------------------------------------------------------------
class _TwoLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w, self.c = _vector(0.4, -0.7), _vector(1.3, 0.6)

    def forward(self) -> Tensor:
        top = Bernoulli(logits=self.w[0]).sample()
        bottom = Bernoulli(logits=self.w[1] + self.c[0] * top).sample()
        return (bottom - 0.3) ** 2 * (1 + top) + self.c[1] * top


def score_below_enumerated() -> Problem:
    """The rows of the enumerated site weigh the terms of the score site below it."""
    return Problem(_TwoLayers(), estimators={"top": "enumerate", "bottom": "score_function"}, bits=2)


def score_above_enumerated() -> Problem:
    """The score site's signal is an expectation, and its gradient runs through the probabilities as well."""
    return Problem(_TwoLayers(), estimators={"top": "score_function", "bottom": "enumerate"}, bits=2)


def enumerated_jointly() -> Problem:
    """Two enumerated sites in one chain."""
    return Problem(_TwoLayers(), estimators={"*": "enumerate"}, bits=2)


class _ReparamAbove(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mu, self.log_sigma, self.w = _vector(0.4), _vector(-0.3), _vector(0.7, -0.9)

    def forward(self) -> Tensor:
        e = TwoPoint(self.mu[0], self.log_sigma.exp()[0]).rsample()
        top = Bernoulli(logits=self.w[0] * e).sample()
        bottom = Bernoulli(logits=self.w[1] * e + top).sample()
        return (e + top - 2 * bottom) ** 2


def reparam_above_both() -> Problem:
    """A pathwise gradient through the parameters of an enumerated site and of a score site."""
    estimators = {"e": "reparam", "top": "enumerate", "bottom": "score_function"}
    return Problem(_ReparamAbove(), estimators=estimators, bits=3)


def closure() -> Problem:
    """A function over parameters and a module of its caller."""
    theta, net = _vector(0.3, -0.4), nn.Linear(2, 1, dtype=torch.float64)
    with torch.no_grad():
        net.weight.copy_(torch.tensor([[0.5, -1.0]]))
        net.bias.fill_(0.2)

    def loss(x: Tensor) -> Tensor:
        z = Bernoulli(logits=theta * x).sample()
        return (net(z).squeeze(-1) ** 2).mean()

    return Problem(loss, ((_tensor(1.0, 0.5),),), bits=2)


PROBLEMS: dict[str, Callable[[], Problem]] = {
    problem.__name__: problem
    for problem in (
        chain,
        diamond,
        dead_site,
        some_costs,
        upstream_costs,
        unrolled_loop,
        tied_batch,
        flattened_dims,
        mixed_batch,
        own_draws,
        integer_index,
        one_hot,
        binomial,
        independent_elbo,
        closed_form_kl,
        shared_logits,
        random_functions,
        not_differentiable,
        opaque_cost,
        reported_costs,
        detached,
        sampled_mask,
        learned_coefficient,
        changing_mask,
        annealed_beta,
        score_below_enumerated,
        score_above_enumerated,
        enumerated_jointly,
        reparam_above_both,
        closure,
    )
}

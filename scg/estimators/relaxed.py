r"""Relaxed draws of Bernoulli and one-hot distributions: noise on the logits, made hard or soft.

.. math:: x = \ell + \epsilon, \quad b = H(x), \quad s = \sigma_\tau(x)

With Gumbel noise H is the one-hot of the largest and :math:`\sigma_\tau` the softmax of :math:`x / \tau`; of two
categories only the difference matters: logistic noise, the step at zero, the sigmoid.
"""

from __future__ import annotations

from typing import ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Bernoulli, Categorical, Distribution, OneHotCategorical

from scg.estimators.base import YES, PathwiseEstimator, SiteInfo, Support
from scg.estimators.extremes import finite

Discrete = Bernoulli | OneHotCategorical
"""What can be relaxed."""


class Relaxation(PathwiseEstimator):
    """The draw is, or is differentiated as, a continuous stand-in: the gradient is biased."""

    unbiased: ClassVar[bool] = False
    one_hot: ClassVar[bool] = True

    @classmethod
    def supports(cls, site: SiteInfo) -> Support:
        if site.replayed:
            return Support(False, "a replayed outcome has no path back to its parameters")
        if site.family == "Categorical":
            return Support(False, site.why_no_one_hot)
        if not issubclass(site.template.cls, Discrete):
            return Support(False, f"{site.family} has no relaxation here: Bernoulli and OneHotCategorical have")
        if site.pathwise_break:
            return Support(False, site.pathwise_break)
        return YES

    def draw(self, dist: Distribution, shape: torch.Size) -> Tensor:
        assert isinstance(dist, Discrete)
        return self.relax(dist, shape).to(dist.logits.dtype)

    def relax(self, dist: Discrete, shape: torch.Size) -> Tensor:
        """The stand-in for draws of ``dist``, at whatever precision.  ``[*shape | *B | *E]``"""
        raise NotImplementedError


def check_temperature(name: str, temperature: float | Tensor) -> None:
    """Raises ValueError for what is no temperature: it must be positive, one number, and not learned."""
    if isinstance(temperature, Tensor):
        if temperature.numel() != 1 or not temperature.is_floating_point() or temperature.requires_grad:
            raise ValueError(f"{name}: a temperature tensor must hold one floating number and ask for no gradient")
    elif not temperature > 0:
        raise ValueError(f"{name}: temperature={temperature} must be positive")


class Noise(Protocol):
    """How the logits of one family are perturbed. Tensors are ``[*shape | *B]``, of one-hot families ``[…, C]``."""

    def sample(self, logits: Tensor, shape: torch.Size) -> Tensor:
        """Outcomes of the distribution with these logits, ``shape`` in front."""

    def perturb(self, logits: Tensor, shape: torch.Size) -> Tensor:
        """``logits`` plus noise of ``shape``, differentiable in the logits."""

    def given(self, logits: Tensor, hard: Tensor, copies: tuple[int, ...] = ()) -> Tensor:
        """Perturbed logits given what they are rounded to, differentiable in the logits.  ``[*copies, *hard]``"""

    def hard(self, perturbed: Tensor) -> Tensor:
        """The outcome: a draw of the distribution itself."""

    def soft(self, perturbed: Tensor) -> Tensor:
        """The relaxed outcome of perturbed logits that are divided by the temperature already."""

    def tangent(self, soft: Tensor, logits: Tensor) -> Tensor:
        r""":math:`J(s)\,\ell` with the Jacobian :math:`J(s) = \mathrm{diag}(s) - s s^\top` of the relaxation at s."""

    def heun_tangent(self, middle: Tensor, soft: Tensor, logits: Tensor) -> Tensor:
        """``2 tangent(middle) - tangent(soft) / 2``."""

    def mean_tangent(self, soft: Tensor, logits: Tensor) -> Tensor:
        """The mean of `tangent` over the first dim of ``soft``."""


class _Binary:
    """Logistic noise on the logit of a Bernoulli."""

    def sample(self, logits: Tensor, shape: torch.Size) -> Tensor:
        return outcomes(Bernoulli(logits=logits, validate_args=False), shape)

    def perturb(self, logits: Tensor, shape: torch.Size) -> Tensor:
        return logits + _logistic(logits, shape)

    def given(self, logits: Tensor, hard: Tensor, copies: tuple[int, ...] = ()) -> Tensor:
        # the logistic law cut at zero, inverted without ever forming a probability: exact at logits of +-1e4
        sign = 2 * hard - 1
        noise = _logistic(logits, torch.Size([*copies, *hard.shape]))
        return sign * F.softplus(noise + F.softplus(sign * logits))

    def hard(self, perturbed: Tensor) -> Tensor:
        return (perturbed > 0).to(perturbed.dtype)

    def soft(self, perturbed: Tensor) -> Tensor:
        return torch.sigmoid(perturbed)

    def tangent(self, soft: Tensor, logits: Tensor) -> Tensor:
        return soft * (1 - soft) * finite(logits)

    def heun_tangent(self, middle: Tensor, soft: Tensor, logits: Tensor) -> Tensor:
        return (2 * middle * (1 - middle) - soft * (1 - soft) / 2) * finite(logits)

    def mean_tangent(self, soft: Tensor, logits: Tensor) -> Tensor:
        return (soft * (1 - soft)).mean(0) * finite(logits)  # the copies have no gradient: averaged first


class _OneHot:
    """Gumbel noise on the logits of a one-hot categorical."""

    def sample(self, logits: Tensor, shape: torch.Size) -> Tensor:
        index = outcomes(Categorical(logits=logits, validate_args=False), shape)
        return F.one_hot(index, logits.shape[-1]).to(logits.dtype)

    def perturb(self, logits: Tensor, shape: torch.Size) -> Tensor:
        return logits - torch.log(_exponential(logits, shape))

    def given(self, logits: Tensor, hard: Tensor, copies: tuple[int, ...] = ()) -> Tensor:
        # Maddison, Tarlow and Minka 2014: the largest is Gumbel, the others are cut there
        log_e = torch.log(_exponential(logits, torch.Size([*copies, *hard.shape])))
        top = (hard * log_e).sum(-1, keepdim=True)  # of the chosen category; logits are normalised
        return -torch.where(hard > 0, top, torch.logaddexp(log_e - finite(logits), top))

    def hard(self, perturbed: Tensor) -> Tensor:
        return torch.zeros_like(perturbed).scatter(-1, perturbed.argmax(-1, keepdim=True), 1.0)

    def soft(self, perturbed: Tensor) -> Tensor:
        return torch.softmax(perturbed, -1)

    def tangent(self, soft: Tensor, logits: Tensor) -> Tensor:
        logits = finite(logits)
        return soft * (logits - (soft * logits).sum(-1, keepdim=True))

    def heun_tangent(self, middle: Tensor, soft: Tensor, logits: Tensor) -> Tensor:
        return 2 * self.tangent(middle, logits) - self.tangent(soft, logits) / 2

    def mean_tangent(self, soft: Tensor, logits: Tensor) -> Tensor:
        return self.tangent(soft, logits).mean(0)


def noise_of(dist: Discrete) -> Noise:
    """The noise that belongs to the family of ``dist``."""
    return _Binary() if isinstance(dist, Bernoulli) else _OneHot()


def logits_of(dist: Discrete) -> Tensor:
    """Log odds of a Bernoulli, normalised log probabilities of a one-hot; float32 at least, for the noise's sake."""
    logits: Tensor = dist.logits
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


def outcomes(dist: Distribution, shape: torch.Size) -> Tensor:
    """Detached draws of the distribution itself.  ``[*shape | *B | *E]``"""
    return dist.sample(shape).detach()


def straight_through(hard: Tensor, soft: Tensor) -> Tensor:
    """The value of ``hard``, the derivative of ``soft``."""
    return hard + (soft - soft.detach()).to(hard.dtype)


def full_shape(dist: Discrete, shape: torch.Size) -> torch.Size:
    """``[*shape | *B | *E]``"""
    return torch.Size([*shape, *dist.batch_shape, *dist.event_shape])


def _uniform(like: Tensor, shape: torch.Size) -> Tensor:
    drawn = torch.rand(shape, dtype=like.dtype, device=like.device)
    return drawn.clamp(min=torch.finfo(like.dtype).tiny)  # zero would be infinite noise


def _logistic(like: Tensor, shape: torch.Size) -> Tensor:
    u = _uniform(like, shape)
    return torch.log(u) - torch.log1p(-u)


def _exponential(like: Tensor, shape: torch.Size) -> Tensor:
    return -torch.log1p(-_uniform(like, shape))  # finest near zero, where the Gumbel noise is largest

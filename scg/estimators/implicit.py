r"""A draw as a differentiable function of its distribution's parameters, from its value alone.

.. math:: \nabla_\theta z = -\nabla_\theta F_\theta(z) / p_\theta(z)

(Figurnov, Mohamed and Mnih 2018); of location and scale simply :math:`z = \mu + \sigma \epsilon`.
"""

from __future__ import annotations

from torch import Tensor
from torch.distributions import Cauchy, Distribution, Exponential, Gumbel, Laplace, LogNormal, Normal, Weibull

WITH_CDF = (Normal, Laplace, Exponential, Cauchy, Gumbel, LogNormal, Weibull)
"""Families whose distribution function has a derivative in PyTorch."""


def reparameterized(dist: Distribution, value: Tensor) -> Tensor:
    """``value``, with its derivative in the parameters of ``dist``.  ``[*B]``"""
    if isinstance(dist, (Normal, Laplace, Cauchy, Gumbel)):
        noise = ((value - dist.loc) / dist.scale).detach()
        return dist.loc + dist.scale * noise
    below = dist.cdf(value)
    return value - (below - below.detach()) / dist.log_prob(value).detach().exp()

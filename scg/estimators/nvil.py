"""NVIL: an input-dependent baseline, centred, and the signal divided by its standard deviation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from scg.estimators.base import SiteContext
from scg.estimators.learned import Centred, InputDependent
from scg.estimators.score_function import ScoreFunction


@dataclass(frozen=True)
class NVIL(ScoreFunction):
    r"""The score function with a learned, centred baseline and normalised variance.

    .. math:: \hat g = \frac{Q - b_\psi(x) - c}{\max(1, \sigma)} \nabla_\theta \log p_\theta(z)

    Mnih and Gregor 2014, section 2.3. :math:`c` and :math:`\sigma` are the mean and standard deviation of
    :math:`Q - b_\psi` over earlier steps. Biased in its length: it is the gradient over :math:`\max(1, \sigma)`, each
    site with its own. Without that, take ``score_function`` with ``baseline=InputDependent()``, which is unbiased. One
    evaluation.

    Args:
        baseline: an `InputDependent`.
    """

    baseline: Any = InputDependent()

    name: ClassVar[str] = "nvil"
    unbiased: ClassVar[bool] = False
    orders: ClassVar[int] = 1
    bounds: ClassVar[bool] = False
    reference: ClassVar[str] = "Mnih and Gregor 2014"
    formula: ClassVar[str] = r"\frac{Q - b_\psi - c}{\max(1, \sigma)}\, \nabla_\theta \log p_\theta(z)"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.baseline, InputDependent):
            raise ValueError(f"nvil: baseline={self.baseline!r} must be an InputDependent")

    def term(self, context: SiteContext) -> Tensor:
        assert isinstance(context.state, Centred)
        scale = context.state.scale()  # of earlier steps: read before the moments move
        return context.score_times(self.baseline.advantage(context) / scale)

"""scg: a graph-IR compiler for stochastic computation graphs on PyTorch.

>>> import torch, scg
>>> from torch.distributions import Bernoulli
>>> theta = torch.nn.Parameter(torch.zeros(3))
>>> def loss(): return ((Bernoulli(logits=theta).sample() - 0.499) ** 2).mean()
>>> compiled = scg.compile(loss)
>>> compiled().backward()
>>> compiled.graph.sites["site_0"].estimator
'enumerate'
"""

from importlib import import_module
from typing import TYPE_CHECKING

from scg.diagnostics import gradient_samples
from scg.errors import (
    BiasWarning,
    EstimatorError,
    LoweringError,
    RetraceWarning,
    ScgError,
    TraceError,
    VerifyError,
)
from scg.estimators import ESTIMATORS
from scg.exact import exact
from scg.ir import Graph
from scg.pipeline import CompiledModule, compile, trace
from scg.primitives import cost, depends, logmarginal, multisample, opaque, sample

if TYPE_CHECKING:
    from scg.measure import (
        Comparison,
        GradientCheck,
        Monitor,
        Tuned,
        VarianceBudget,
        autotune,
        compare,
        gradcheck,
        variance_budget,
    )

__version__ = "0.1.0"

__all__ = [
    "ESTIMATORS",
    "BiasWarning",
    "Comparison",
    "CompiledModule",
    "EstimatorError",
    "GradientCheck",
    "Graph",
    "LoweringError",
    "Monitor",
    "RetraceWarning",
    "ScgError",
    "TraceError",
    "Tuned",
    "VarianceBudget",
    "VerifyError",
    "autotune",
    "compare",
    "compile",
    "cost",
    "depends",
    "exact",
    "gradcheck",
    "gradient_samples",
    "logmarginal",
    "multisample",
    "opaque",
    "sample",
    "trace",
    "variance_budget",
]


def __getattr__(name: str) -> object:
    """What measures is imported when it is first used: training does without it."""
    if name in __all__:
        return getattr(import_module("scg.measure"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

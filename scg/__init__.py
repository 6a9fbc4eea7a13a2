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
from scg.pipeline import CompiledModule, compile, trace
from scg.primitives import cost, depends, logmarginal, multisample, opaque, sample

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

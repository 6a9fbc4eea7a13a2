"""Measuring estimators: is it right (`gradcheck`), which is best (`compare`), choose for me (`autotune`),
where the variance is (`variance_budget`), how it goes (`Monitor`)."""

from scg.measure.budget import VarianceBudget, variance_budget
from scg.measure.check import GradientCheck, gradcheck
from scg.measure.comparison import Comparison, compare
from scg.measure.monitor import Monitor
from scg.measure.tuning import Tuned, autotune

__all__ = [
    "Comparison",
    "GradientCheck",
    "Monitor",
    "Tuned",
    "VarianceBudget",
    "autotune",
    "compare",
    "gradcheck",
    "variance_budget",
]

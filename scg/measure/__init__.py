"""Measuring estimators: is it right (`gradcheck`), which is best (`compare`), choose for me (`autotune`)."""

from scg.measure.check import GradientCheck, gradcheck
from scg.measure.comparison import Comparison, compare
from scg.measure.tuning import Tuned, autotune

__all__ = ["Comparison", "GradientCheck", "Tuned", "autotune", "compare", "gradcheck"]

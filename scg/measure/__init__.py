"""Measuring estimators: is it right (`gradcheck`)."""

from scg.measure.check import GradientCheck, gradcheck

__all__ = ["GradientCheck", "gradcheck"]

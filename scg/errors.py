"""Every error a user can cause, by the phase that found it."""

from __future__ import annotations


class ScgError(Exception):
    """Base of all errors raised by scg; its text says what, where (``file.py:line``) and what to do."""


class TraceError(ScgError):
    """The user's function cannot be captured, or computes something no gradient estimator can see."""


class EstimatorError(ScgError):
    """An estimator was asked for that does not exist or does not fit its site."""


class VerifyError(ScgError):
    """A pass left an invalid graph: a fault of scg, not of the user's."""


class LoweringError(ScgError):
    """A valid graph holds an operation that a backend cannot emit."""


class BiasWarning(UserWarning):
    """An estimate is biased, or looks as if the user had corrected for the estimator by hand."""


class RetraceWarning(UserWarning):
    """A plain Python value keeps changing, so that the model is traced again and again."""


class StateWarning(UserWarning):
    """A model changes Python state when it is called; a compiled call cannot."""

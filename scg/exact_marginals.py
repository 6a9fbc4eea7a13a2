"""Marginal likelihoods of a program that is replayed over every outcome: ``-log sum_z p(z) exp(-value(z))``.

The value of the n-th call of `scg.logmarginal` is the same in all runs that agree on what it does not sum over. It is
known once every run up to that call has been made: one walk over the program for each call, then the last one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Seen(Exception):
    """The run has told what it is made for."""


class Marginals:
    """The values of all calls of one program, found in program order."""

    def __init__(self) -> None:
        self.known: list[dict[Any, Tensor]] = []
        """Of each call, by the outcomes of the draws that are not summed."""
        self.incomplete = True
        self._terms: dict[Any, dict[Any, Tensor]] = {}

    def value(self, call: int, given: Any, summed: Any, log_weight: Tensor, value: Tensor) -> Tensor:
        """The marginal, where it is known.

        Args:
            call: which call of the run.
            given: outcomes of the draws that are not summed.
            summed: outcomes of those that are.
            log_weight: ``log p(summed) - value``, ``[*B]``.
            value: at this outcome.

        Raises:
            Seen: this is the first call that is not known yet.
        """
        if call < len(self.known):
            return self.known[call][given].to(value.dtype)
        self._terms.setdefault(given, {})[summed] = log_weight
        raise Seen

    def take(self) -> None:
        """A walk is done: the next call is known, or there is none."""
        self.incomplete = bool(self._terms)
        if self._terms:
            self.known.append(
                {given: -torch.logsumexp(torch.stack(list(rows.values())), 0) for given, rows in self._terms.items()}
            )
            self._terms = {}

"""Unknown names: the near miss and everything known."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def near_miss(kind: str, name: object, known: Iterable[str]) -> str:
    """An error text for an unknown name.

    >>> near_miss("estimator", "score_functoin", ["reparam", "score_function"])
    "unknown estimator 'score_functoin'; did you mean 'score_function'? known: reparam, score_function"
    """
    names = list(known)
    close = difflib.get_close_matches(str(name), names, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ";"
    return f"unknown {kind} {name!r}{hint} known: {', '.join(names)}"

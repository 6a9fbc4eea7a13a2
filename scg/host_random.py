"""Random numbers that are not PyTorch's, drawn while a model is traced: the program would hold the ones it met.

if random.random() < 0.5:        the same branch at every call
"""

from __future__ import annotations

import pickle
import random
import sys
from collections.abc import Callable, Iterable, Iterator
from types import FrameType
from typing import Any

from scg.tracer_frames import outer_loc

_BOUND = {"builtin_function_or_method", "cython_function_or_method", "method"}
"""Types of functions that are bound to what draws."""


class HostRandom:
    """Watches the generators of ``random`` and NumPy, and those among some objects."""

    def __init__(self, objects: Iterable[Any]) -> None:
        found = {id(generator): generator for generator in _generators(objects)}
        self._generators = list(found.values())
        self._before = self._states()

    def _states(self) -> list[Any]:
        return [_state(generator) for generator in self._generators]

    def place_of_draw(self, run: Callable[[], object]) -> str | None:
        """The user's line that draws in ``run``; None where no generator has moved, or another thread moved it.

        Args:
            run: what was done since; it is done again to find the place, which costs time only where there is one.

        Returns:
            An empty string where the line is not found: NumPy's generators move unseen.
        """
        states = zip(self._generators, self._before, self._states(), strict=True)
        moved = [(generator, before) for generator, before, now in states if before != now]
        if not moved:
            return None
        place: str | None = None
        for generator, before in moved:
            if isinstance(generator, random.Random):
                generator.setstate(before)  # it must draw again: half of the normal numbers are kept for the next call
            else:
                place = ""
        sources = {id(generator) for generator, _ in moved}

        def profile(frame: FrameType, event: str, called: Any) -> None:
            nonlocal place
            if not place and event == "c_call" and id(getattr(called, "__self__", None)) in sources:
                place = outer_loc(frame)

        others = sys.getprofile()
        sys.setprofile(profile)
        try:
            run()
        finally:
            sys.setprofile(others)
        return place


def _generators(objects: Iterable[Any]) -> Iterator[Any]:
    yield random.random.__self__  # type: ignore[attr-defined]
    if (numpy := sys.modules.get("numpy.random")) is not None:
        yield numpy.random_sample.__self__
    for item in objects:
        holder = getattr(item, "__self__", None) if type(item).__name__ in _BOUND else item
        numpys = str(type(holder).__module__).startswith("numpy.random") and hasattr(holder, "standard_normal")
        if numpys or isinstance(holder, random.Random) and not isinstance(holder, random.SystemRandom):
            yield holder


def _state(generator: Any) -> Any:
    if isinstance(generator, random.Random):
        return generator.getstate()
    bits = getattr(generator, "bit_generator", None)
    return pickle.dumps(generator.get_state(legacy=False) if bits is None else bits.state)

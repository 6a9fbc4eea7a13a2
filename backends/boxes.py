"""A picture before anything is drawn: boxes and arrows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["site", "cost", "block", "opaque", "value", "anchor"]
"""An anchor is not seen: it only holds a place."""
Style = Literal["title", "plain", "small", "accent", "credit", "warn", "strong"]
Line = tuple[tuple[str, Style], ...]
"""One line of a label: pieces of text, each with its style."""
Mark = Literal["", "new", "changed", "gone"]
"""What a pass did to a node: made it, changed it, or is about to drop it."""


@dataclass(frozen=True)
class Box:
    """One shape of the picture; ``id`` is ours, so that no name of the user's can break a format."""

    id: str
    kind: Kind
    lines: tuple[Line, ...]
    tooltip: str
    members: tuple[str, ...]
    """The IR nodes it stands for."""
    cluster: tuple[str, ...] = ()
    """Path of nested frames it is drawn in: modules, a repeated step, a stage between passes."""
    count: int = 1
    """Of repeated structure, how many boxes it stands for."""
    mark: Mark = ""
    share: float | None = None
    """Its share of the gradient's variance, where that was measured."""

    @property
    def title(self) -> str:
        return "".join(text for text, _ in self.lines[0]) if self.lines else ""


@dataclass(frozen=True)
class Arrow:
    """An edge; a credit arrow points from a cost to the site it teaches, a dropped one from a cost that does not."""

    tail: str
    head: str
    kind: Literal["data", "credit", "dropped"]
    tooltip: str
    label: str = ""
    again: bool = False
    """From one repetition to the next."""
    share: float | None = None


@dataclass(frozen=True)
class Picture:
    """All that is drawn."""

    title: str
    caption: str
    boxes: tuple[Box, ...]
    arrows: tuple[Arrow, ...]
    sideways: bool = False
    """Drawn from left to right."""
    columns: bool = False
    """The outermost frames stand side by side, in the order of their first boxes."""

    @property
    def folded(self) -> bool:
        return any(box.count > 1 for box in self.boxes)

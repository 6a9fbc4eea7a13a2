"""Which of a few nodes stand upstream of each node: one sweep for all of them."""

from __future__ import annotations

from collections.abc import Iterable

from scg.ir import Graph


class Reach:
    """Data edges from some nodes, as bit sets: one bit a source.

    Args:
        graph: any.
        sources: names of the nodes to follow.
    """

    def __init__(self, graph: Graph, sources: Iterable[str]) -> None:
        self._bits = {name: 1 << i for i, name in enumerate(sources)}
        self._above: dict[str, int] = {}
        for node in graph:
            above = self._bits.get(node.name, 0)
            for ref in node.inputs:
                above |= self._above[ref]
            self._above[node.name] = above

    def above(self, nodes: Iterable[str]) -> set[str]:
        """The sources that any of ``nodes`` is, or is computed from."""
        above = 0
        for node in nodes:
            above |= self._above[node]
        return {name for name, bit in self._bits.items() if above & bit}

"""In-place writes, made functional."""

from scg.ir import Graph


def functionalize(graph: Graph) -> Graph:
    return graph

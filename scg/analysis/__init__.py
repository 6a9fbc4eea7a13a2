"""What the passes need to know of a graph: influence and smoothness."""

from scg.analysis.influence import Influence, Relation, influence

__all__ = ["Influence", "Relation", "influence"]

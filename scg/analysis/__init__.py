"""What the passes need to know of a graph: influence and smoothness."""

from scg.analysis.influence import Influence, Relation, influence
from scg.analysis.smoothness import Break, Fault, Smoothness, smoothness, unseen_gradients

__all__ = [
    "Break",
    "Fault",
    "Influence",
    "Relation",
    "Smoothness",
    "influence",
    "smoothness",
    "unseen_gradients",
]

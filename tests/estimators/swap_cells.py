"""The simplex cut into cells on which every draw of ARSM is constant: its noise as finitely many points.

ARSM's estimate is linear in the Dirichlet noise on each cell, so that the centroid of a cell stands for all of it. The
cells of three categories are polygons between the lines :math:`\\pi_a / \\pi_b = p_i / p_k`.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scg.backends.recorder import record_call
from scg.estimators.arsm import ARSM
from tests.estimators.finite_noise import choose

MOST = 16
"""Cells that one category is drawn in, at most."""


def _drawn(pi: np.ndarray[Any, Any], p: np.ndarray[Any, Any]) -> tuple[int, ...]:
    """What is drawn from the noise, and from it with each pair swapped."""
    orders = [list(range(len(p)))]
    for a, b in itertools.combinations(range(len(p)), 2):
        swapped = list(range(len(p)))
        swapped[a], swapped[b] = b, a
        orders.append(swapped)
    return tuple(int(np.argmin(pi[order] / p)) for order in orders)


def _cut(polygon: np.ndarray[Any, Any], line: np.ndarray[Any, Any]) -> list[np.ndarray[Any, Any]]:
    """The parts of a convex polygon ``[V, 3]`` on both sides of ``line @ point == 0``."""
    side = polygon @ line
    sides: tuple[list[Any], list[Any]] = ([], [])
    for i in range(len(polygon)):
        j = (i + 1) % len(polygon)
        for part, sign in zip(sides, (1, -1), strict=True):
            if sign * side[i] >= 0:
                part.append(polygon[i])
        if side[i] * side[j] < 0:
            crossing = polygon[i] + (polygon[j] - polygon[i]) * side[i] / (side[i] - side[j])
            for part in sides:
                part.append(crossing)
    return [np.array(part) for part in sides if len(part) >= 3]


def _area_and_centroid(polygon: np.ndarray[Any, Any]) -> tuple[float, np.ndarray[Any, Any]]:
    """As a share of the simplex, whose area is half the square root of three."""
    area, weighted = 0.0, np.zeros(3)
    for i in range(1, len(polygon) - 1):
        corner = polygon[[0, i, i + 1]]
        piece = float(np.linalg.norm(np.cross(corner[1] - corner[0], corner[2] - corner[0]))) / np.sqrt(3)
        area, weighted = area + piece, weighted + piece * corner.mean(0)
    return area, weighted / area if area > 0 else weighted


@functools.cache
def cells(p: tuple[float, ...]) -> dict[tuple[int, ...], tuple[float, Any]]:
    """Probability and mean noise of each combination of draws, for three categories."""
    probabilities = np.array(p)
    polygons = [np.eye(3)]
    ratios = {p[i] / p[k] for i, k in itertools.permutations(range(3), 2)} | {1.0}
    for (a, b), ratio in itertools.product(itertools.combinations(range(3), 2), ratios):
        line = np.zeros(3)
        line[a], line[b] = 1.0, -ratio
        polygons = [part for polygon in polygons for part in _cut(polygon, line)]
    found: dict[tuple[int, ...], tuple[float, Any]] = {}
    for polygon in polygons:
        area, centroid = _area_and_centroid(polygon)
        if area > 1e-14:
            drawn = _drawn(centroid, probabilities)
            before, sum_ = found.get(drawn, (0.0, np.zeros(3)))
            found[drawn] = (before + area, sum_ + area * centroid)
    return {drawn: (area, sum_ / area) for drawn, (area, sum_) in found.items()}


def _points(p: Tensor, category: int, nodes: int) -> list[tuple[float, Any]]:
    """Weights and points of the noise that leads to ``category``."""
    if len(p) == 3:
        table = cells(tuple(p.tolist()))
        return [(area, point) for drawn, (area, point) in table.items() if drawn[0] == category]
    x, w = np.polynomial.legendre.leggauss(nodes)
    first, second = p.tolist()
    edges = np.array([0.0, min(first, second), max(first, second), 1.0])
    found = []
    for low, high in itertools.pairwise(edges):
        for at, weight in zip(x, w, strict=True):
            share = low + (high - low) * (at + 1) / 2
            if (share / first < (1 - share) / second) == (category == 0):
                found.append((weight * (high - low) / 2, np.array([share, 1 - share])))
    return found


@dataclass(frozen=True)
class _Cells:
    """The points of all elements: weights ``[*N, MOST]`` and noise ``[*N, MOST, C]`` side by side."""

    nodes: int
    __name__ = "cells"

    def fake(self, log_p: Tensor, category: Tensor) -> Tensor:
        return log_p.new_empty([*category.shape, MOST, log_p.shape[-1] + 1])

    def __call__(self, log_p: Tensor, category: Tensor) -> Tensor:
        p = log_p.exp().expand([*category.shape, log_p.shape[-1]]).reshape(-1, log_p.shape[-1])
        found = torch.zeros([len(p), MOST, p.shape[-1] + 1], dtype=p.dtype)
        for row, (each, drawn) in enumerate(zip(p, category.reshape(-1).tolist(), strict=True)):
            for at, (weight, point) in enumerate(_points(each, drawn, self.nodes)):
                found[row, at] = torch.tensor([weight, *point])
        return found.reshape([*category.shape, MOST, p.shape[-1] + 1])


@dataclass(frozen=True)
class FiniteARSM(ARSM):
    """`ARSM` of two or three categories with its noise on the cells' points."""

    nodes: int = 1
    """Of two categories, a cell: 1 is exact for the estimate, 2 for its square."""

    def noise(self, log_p: Tensor, category: Tensor) -> Tensor:
        table = record_call(_Cells(self.nodes), log_p, category)
        weight, points = table[..., 0], table[..., 1:]
        place = choose(weight / weight.sum(-1, keepdim=True))
        shape = [*place.shape, 1, points.shape[-1]]
        return points.gather(-2, place.unsqueeze(-1).unsqueeze(-1).expand(shape)).squeeze(-2)

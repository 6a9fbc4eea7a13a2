"""Sequences of sites drawn without replacement: stochastic beam search.

Every row of the beam proposes the outcomes of the next element; of all their perturbed log probabilities the ``k``
largest survive. Perturbations of the children are drawn given that their maximum is that of their parent, so that the
rows are at every length what a race among all sequences of that length would have given (Kool, van Hoof and Welling
2019, "Stochastic beams and where to find them", algorithm 1).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

IMPOSSIBLE = -1e6
"""Log probability of an impossible outcome: below that of any sequence, finite, so that differences are defined."""

_JOINT = 64
"""Elements of one site are taken together as long as they have no more joint outcomes than this."""


@dataclass(frozen=True)
class Beam:
    """The sequences that survive, the most perturbed first, and what is known of all others."""

    log_p: Tensor
    """Of each sequence so far, `IMPOSSIBLE` for a row there was no sequence for.  ``[*N, k]``"""
    perturbed: Tensor
    """Its Gumbel-perturbed log probability, the largest among all that begin with it.  ``[*N, k]``"""
    rest: Tensor
    """Log probability of everything pruned: summed as it is pruned, it does not cancel.  ``[*N]``"""
    threshold: Tensor
    """Largest perturbed log probability among everything pruned.  ``[*N]``"""


class BeamSearch:
    """The steps of the search; `survivors` is the only one that draws."""

    def survivors(self, beam: Beam | None, children: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
        """The ``k`` children that survive.

        Args:
            beam: their parents; None at the root.
            children: log probabilities of the children, ``[*N, rows, S]``, with ``rows * S`` no less than ``k``.
            k: how many.

        Returns:
            Places among the flattened children and their perturbed log probabilities, both ``[*N, k]`` and in falling
            order, and the largest of the others' ``[*N]``.
        """
        perturbed = children + gumbel(children)
        if beam is not None:
            perturbed = with_maximum(perturbed, beam.perturbed.unsqueeze(-1))
        flat = perturbed.flatten(-2)
        found = flat.topk(min(k + 1, flat.shape[-1]), -1)
        none_left = torch.full_like(found.values[..., 0], -torch.inf)
        threshold = found.values[..., k] if found.values.shape[-1] > k else none_left
        return found.indices[..., :k], found.values[..., :k], threshold

    def extend(self, beam: Beam | None, log_p: Tensor, k: int) -> tuple[Beam, Tensor]:
        """Goes on by one element.

        Args:
            beam: the sequences so far; None at the root.
            log_p: of each outcome given each of them, ``[*N, rows, S]``.
            k: how many survive.

        Returns:
            The beam, and the places of its rows among the flattened children ``[*N, k]``: ``row * S + outcome``.
        """
        children = log_p.clamp_min(IMPOSSIBLE)
        if beam is not None:
            children = children + beam.log_p.unsqueeze(-1)
        rows, outcomes = children.shape[-2:]
        if rows * outcomes < k:  # at the root: fewer sequences than rows
            missing = -(-k // outcomes) - rows
            none = torch.full_like(children, IMPOSSIBLE).expand([*children.shape[:-2], missing, outcomes])
            children = torch.cat([children, none], -2)
        place, perturbed, threshold = self.survivors(beam, children, k)
        flat = children.flatten(-2)
        pruned = flat.scatter(-1, place, -torch.inf).logsumexp(-1)
        if beam is not None:
            pruned, threshold = torch.logaddexp(pruned, beam.rest), torch.maximum(threshold, beam.threshold)
        grown = Beam(flat.gather(-1, place), perturbed, pruned, threshold)
        return grown, torch.where(place < rows * outcomes, place, 0)

    def extend_by(self, beam: Beam | None, log_p: Tensor, k: int) -> tuple[Beam, Tensor, Tensor | None]:
        """Goes on by the ``L`` independent elements of one site.

        Args:
            beam: the sequences so far; None at the root.
            log_p: ``[*N, rows, L, S]``.
            k: how many survive.

        Returns:
            The beam, the outcome of each element ``[*N, k, L]``, and the parents ``[*N, k]`` (None at the root).
        """
        length, support = log_p.shape[-2:]
        together = 1
        while support ** (together + 1) <= _JOINT and together < length:
            together += 1
        parents: Tensor | None = None
        digits: Tensor | None = None
        start = beam
        for first in range(0, length, together):
            size = min(together, length - first)
            part = log_p[..., first : first + size, :]
            if parents is not None:  # rows of the parameters go with the rows of the beam
                rows = parents if log_p.shape[-3] > 1 else torch.zeros_like(parents)
                part = part.gather(-3, rows[..., None, None].expand([*rows.shape, size, support]))
            joint = part[..., 0, :]
            for other in range(1, size):
                joint = (joint.unsqueeze(-1) + part[..., other, None, :]).flatten(-2)
            if beam is not None and joint.shape[-2] == 1:
                joint = joint.expand([*joint.shape[:-2], beam.log_p.shape[-1], joint.shape[-1]])
            beam, place = self.extend(beam, joint, k)
            row, outcome = place // support**size, place % support**size
            new = torch.stack(
                [outcome // support ** (size - 1 - i) % support for i in range(size)], -1
            )  # [*N, k, size]
            if digits is None:
                digits, parents = new, row
            else:
                assert parents is not None
                before = digits.gather(-2, row.unsqueeze(-1).expand([*row.shape, digits.shape[-1]]))
                digits, parents = torch.cat([before, new], -1), parents.gather(-1, row)
        assert beam is not None and digits is not None
        return beam, digits, None if start is None else parents


def gumbel(like: Tensor) -> Tensor:
    """Standard Gumbel noise of the shape of ``like``."""
    uniform = torch.rand_like(like).clamp_min(torch.finfo(like.dtype).tiny)
    return -torch.log(-torch.log1p(-uniform))


def with_maximum(perturbed: Tensor, maximum: Tensor) -> Tensor:
    r"""Gumbel variables shifted to have the given maximum over the last dim, as if drawn given it.

    .. math::
        v = T - G + \log(1 - e^{G - Z}), \qquad
        \tilde G = T - \max(0, v) - \log(1 + e^{-|v|}), \qquad Z = \max G

    Kool, van Hoof and Welling 2019, appendix B.3: no cancellation.
    """
    gap = perturbed - perturbed.amax(-1, keepdim=True)
    v = maximum - perturbed + torch.log1p(-gap.exp())
    return maximum - v.clamp_min(0.0) - torch.log1p(torch.exp(-v.abs()))

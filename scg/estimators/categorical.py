"""What the estimators of a categorical site share: its log probabilities and its draw, whether index or one-hot."""

from __future__ import annotations

from typing import TypeGuard

import torch
from torch import Tensor
from torch.distributions import Categorical, Distribution, OneHotCategorical

from scg.estimators.base import SiteContext, SiteInfo, Support

FLOOR = -1e3
"""Log probability of an impossible category: it is never drawn, and differences of two stay defined."""


def is_categorical(dist: Distribution) -> TypeGuard[Categorical | OneHotCategorical]:
    """Whether it draws one of finitely many categories."""
    return isinstance(dist, Categorical | OneHotCategorical)


def categorical(site: SiteInfo) -> Support:
    """Whether the site draws one of finitely many categories."""
    known = issubclass(site.template.cls, (Categorical, OneHotCategorical))
    return Support(known, "" if known else f"{site.family} is not Categorical or OneHotCategorical")


def log_probabilities(dist: Distribution) -> Tensor:
    """Of all categories, with gradient, at least in float32 and never below `FLOOR`.  ``[*batch, C]``"""
    assert is_categorical(dist)
    log_p: Tensor = dist.logits
    return log_p.to(torch.promote_types(log_p.dtype, torch.float32)).clamp_min(FLOOR)


def log_prob_of_support(dist: Distribution, support: Tensor, dims: int) -> Tensor:
    """Log probabilities of all outcomes, detached.

    Args:
        dist: of batch shape up to broadcasting to ``dims`` dims.
        support: its outcomes in their order, ``[S, *event]``.
        dims: as many of size 1 stand between the outcomes and the event.

    Returns:
        ``[S, *batch]``, of as many dims.
    """
    if type(dist) in (Categorical, OneHotCategorical):  # no need to look them up one by one
        logits: Tensor = dist.logits  # type: ignore[attr-defined]
        first = logits.detach().movedim(-1, 0)
        return first.reshape([len(first), *[1] * (dims + 1 - first.dim()), *first.shape[1:]])
    return dist.log_prob(support.reshape([len(support), *[1] * dims, *support.shape[1:]])).detach()


def drawn_category(context: SiteContext) -> Tensor:
    """The index of the draw.  ``[*dims | *elements]``"""
    value = context.value
    return value.argmax(-1) if context.site.event_ndim else value.long()

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


def drawn_category(context: SiteContext) -> Tensor:
    """The index of the draw.  ``[*dims | *elements]``"""
    value = context.value
    return value.argmax(-1) if context.site.event_ndim else value.long()

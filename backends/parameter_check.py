"""Run-time checks of distribution parameters, for ``debug=True``."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributions.constraints import Constraint


class ParameterCheck:
    """With ``debug=True``: a leaf that raises at run time and names the site."""

    effect = True

    def __init__(self, site: str, loc: str, family: str, param: str, constraint: Constraint | None) -> None:
        self.site, self.loc, self.family, self.param, self.constraint = site, loc, family, param, constraint
        self.__name__ = self.__qualname__ = f"check_{site}"
        self.__module__ = __name__

    def fake(self, value: Tensor) -> Tensor:
        return value.detach()

    def __call__(self, value: Tensor) -> Tensor:
        ok = torch.isfinite(value) if value.is_floating_point() else torch.ones_like(value, dtype=torch.bool)
        if self.constraint is not None and bool(ok.all()):
            ok = self.constraint.check(value)
        if not bool(ok.all()):
            bad = value.detach().flatten()[:4].tolist()
            raise ValueError(
                f"site {self.site!r} ({self.loc}): parameter {self.param} of {self.family}, of shape "
                f"{list(value.shape)}, is not {self.constraint or 'finite'} everywhere; it begins {bad}"
            )
        return value.detach()

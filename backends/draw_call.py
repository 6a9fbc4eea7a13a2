"""A draw that cannot be dissolved into tensor calls (a rejection loop), as one leaf of the generated program."""

from __future__ import annotations

from torch import Size, Tensor

from scg.template import Template

LOOPS = {"VonMises"}
"""Families that draw by a Python loop over the values drawn."""


class DrawCall:
    """Draws ``[*shape | *prefix | *B | *E]`` from the distribution rebuilt from its parameters."""

    __module__ = __name__
    repeatable = False

    def __init__(self, template: Template, prefix: tuple[int, ...], carries: tuple[bool, ...], shape: Size) -> None:
        self.template, self.prefix, self.carries, self.shape = template, prefix, carries, shape
        self.__name__ = self.__qualname__ = f"draw_{template.family}"

    def fake(self, *params: Tensor) -> Tensor:
        like = next(param for param in params if param.is_floating_point())
        return like.new_empty([*self.shape, *self.prefix, *self.template.batch_shape, *self.template.event_shape])

    def __call__(self, *params: Tensor) -> Tensor:
        dist = self.template.rebuild([p.detach() for p in params], prefix=self.prefix, carries=self.carries)
        drawn: Tensor = dist.sample(self.shape)
        return drawn

"""A distribution object taken apart into a template (class and constants) and its parameter tensors.

The state is read from the instance, not from the constructor's arguments, so that every subclass works and nothing is
normalised twice::

    template, params = flatten(Independent(Normal(loc, scale), 1))   # names: base_dist.loc, base_dist.scale
    template.rebuild(params)                                         # the same distribution, argument checks off
    template.rebuild([loc_K, scale], prefix=(K,))                    # loc_K: [K | *B, *E]; batch shape [K, *B]
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, Transform
from torch.distributions.constraints import Constraint
from torch.distributions.transforms import _InverseTransform
from torch.distributions.utils import lazy_property

_EVENT_DIMS = {
    "_unbroadcasted_scale_tril": 2,
    "_unbroadcasted_cov_factor": 2,
    "_unbroadcasted_cov_diag": 1,
    "_capacitance_tril": 2,
}
"""Event dims of tensors that built-in distributions keep beside their named parameters."""


@dataclass(frozen=True)
class _Slot:
    """Stands for the tensor with this index."""

    index: int


@dataclass(frozen=True)
class _Sequence:
    cls: type
    items: tuple[Any, ...]


@dataclass(frozen=True)
class _Mapping:
    cls: type
    items: tuple[tuple[Any, Any], ...]


@dataclass(frozen=True)
class _Object:
    """An instance of ``cls`` by its ``__dict__``."""

    cls: type
    state: tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class Template:
    """Everything of a distribution object but its tensors."""

    cls: type[Distribution]
    family: str
    """Class name; of ``Independent``, its base's."""
    batch_shape: tuple[int, ...]
    event_shape: tuple[int, ...]
    names: tuple[str, ...]
    """One a slot: ``logits``, ``base_dist.loc``."""
    event_dims: tuple[int, ...]
    """Per slot: how many of its trailing dims are event dims."""
    constraints: tuple[Constraint | None, ...]
    """Per slot: what its values must satisfy, where the class says so without looking at other parameters."""
    ranks: tuple[int, ...]
    """Per slot: rank without any sample dims."""
    has_rsample: bool
    has_enumerate_support: bool
    base: Template | None = None
    """Of an ``Independent``: the template of its base, with the same slots."""
    reinterpreted: int = 0
    """Of an ``Independent``: how many batch dims of its base are event dims."""
    state: Any = field(default=None, repr=False)
    """Nested constants and slots, for `rebuild`."""

    @property
    def component(self) -> type[Distribution] | None:
        """Of a ``MixtureSameFamily``: the class of its components."""
        found = dict(self.state.state).get("_component_distribution")
        return None if found is None else found.cls

    @property
    def has_transform_slots(self) -> bool:
        """Whether a transform of the draw reads a tensor, be it one that is also named elsewhere."""
        return any(key == "transforms" and _has_slot(item) for key, item in _entries(self.state))

    def rebuild(
        self, params: Sequence[Tensor], prefix: Sequence[int] = (), carries: Sequence[bool] | None = None
    ) -> Distribution:
        """The distribution with these tensors, without argument checks.

        Args:
            params: One tensor a slot, of shape ``[*prefix, *slot]`` if it carries the prefix, else ``[*slot]``.
            prefix: Sizes of sample dims to put in front of the batch shape.
            carries: Per slot, whether its tensor has the prefix dims; by default those of a higher rank than traced.

        Returns:
            A distribution of batch shape ``[*prefix, *batch_shape]``.
        """
        if carries is None:
            carries = [bool(prefix) and p.ndim > rank for p, rank in zip(params, self.ranks, strict=True)]
        batch = len(self.batch_shape)
        leaves = [
            _pad(param, len(prefix), batch + event) if carried else param
            for param, carried, event in zip(params, carries, self.event_dims, strict=True)
        ]
        built = _build(self.state, leaves, tuple(prefix))
        assert isinstance(built, Distribution)
        return built


def flatten(dist: Distribution) -> tuple[Template, list[Tensor]]:
    """Takes ``dist`` apart: its template, and one tensor a slot in the template's order."""
    reader = _Reader(dist)
    state = reader.read(dist, "", "", dist, in_transform=False)
    base = flatten(dist.base_dist)[0] if isinstance(dist, Independent) else None
    template = Template(
        cls=type(dist),
        family=type(dist).__name__ if base is None else base.family,
        batch_shape=tuple(dist.batch_shape),
        event_shape=tuple(dist.event_shape),
        names=tuple(reader.names),
        event_dims=tuple(reader.event_dims),
        constraints=tuple(reader.constraints),
        ranks=tuple(t.ndim for t in reader.tensors),
        has_rsample=bool(dist.has_rsample),
        has_enumerate_support=bool(dist.has_enumerate_support),
        base=base,
        reinterpreted=dist.reinterpreted_batch_ndims if isinstance(dist, Independent) else 0,
        state=state,
    )
    return template, reader.tensors


class _Reader:
    """One walk over a distribution's state; collects the tensors and what is known of each."""

    def __init__(self, root: Distribution) -> None:
        self.root = root
        self.tensors: list[Tensor] = []
        self.names: list[str] = []
        self.event_dims: list[int] = []
        self.constraints: list[Constraint | None] = []
        self._index: dict[int, int] = {}

    def read(self, value: Any, path: str, key: str, owner: Distribution, in_transform: bool) -> Any:
        if isinstance(value, Tensor):
            return _Slot(self._slot(value, path, key, owner, in_transform))
        if isinstance(value, Distribution):
            return self._object(value, path, _own_state(value), value, in_transform=False)
        if isinstance(value, Transform):
            return self._object(value, path, _transform_state(value), owner, in_transform=True)
        if isinstance(value, nn.Module):
            return self._object(value, path, dict(vars(value)), owner, in_transform=True)
        if isinstance(value, torch.Size):
            return value
        if isinstance(value, (list, tuple)):
            items = (self.read(v, _join(path, i), key, owner, in_transform) for i, v in enumerate(value))
            return _Sequence(type(value), tuple(items))
        if isinstance(value, dict):
            pairs = ((k, self.read(v, _join(path, k), str(k), owner, in_transform)) for k, v in value.items())
            return _Mapping(type(value), tuple(pairs))
        return value

    def _object(self, value: Any, path: str, state: dict[str, Any], owner: Distribution, in_transform: bool) -> _Object:
        items = ((k, self.read(v, _join(path, k), k, owner, in_transform)) for k, v in state.items())
        return _Object(type(value), tuple(items))

    def _slot(self, tensor: Tensor, path: str, key: str, owner: Distribution, in_transform: bool) -> int:
        if id(tensor) not in self._index:  # by identity: Bernoulli's `_param` is its `logits`
            self._index[id(tensor)] = len(self.tensors)
            self.tensors.append(tensor)
            self.names.append(path)
            constraint = None if in_transform else _constraint(owner, key)
            self.constraints.append(constraint)
            own = len(owner.event_shape) if in_transform else _event_dim(tensor, key, owner, constraint)
            rank = len(owner.batch_shape) + own  # of the slot, written out with all its batch dims
            self.event_dims.append(max(rank - len(self.root.batch_shape), 0))
        return self._index[id(tensor)]


def _entries(spec: Any) -> Iterator[tuple[Any, Any]]:
    """Every ``(key, value)`` of the objects and dicts in a state, at any depth."""
    if isinstance(spec, _Object):
        own: tuple[tuple[Any, Any], ...] = spec.state
    else:
        own = spec.items if isinstance(spec, _Mapping) else ()
    for key, value in own:
        yield key, value
        yield from _entries(value)
    for item in spec.items if isinstance(spec, _Sequence) else ():
        yield from _entries(item)


def _has_slot(spec: Any) -> bool:
    if isinstance(spec, _Sequence):
        return any(map(_has_slot, spec.items))
    return isinstance(spec, _Slot) or any(_has_slot(value) for _, value in _entries(spec))


def _constraint(owner: Distribution, key: str) -> Constraint | None:
    """What the class says of a parameter by itself; a bound that is another parameter is no part of a template."""
    constraint: Constraint | None = owner.arg_constraints.get(key)
    bounded_by_tensor = constraint is not None and any(isinstance(bound, Tensor) for bound in vars(constraint).values())
    return None if bounded_by_tensor else constraint


def _event_dim(tensor: Tensor, key: str, owner: Distribution, constraint: Constraint | None) -> int:
    """How many trailing dims of a parameter are event dims of the distribution that owns it."""
    if key == "temperature":  # of a relaxed categorical: divides scores that have the event dim
        return len(owner.event_shape)
    if key in _EVENT_DIMS:
        return _EVENT_DIMS[key]
    if constraint is not None:
        try:
            return constraint.event_dim
        except NotImplementedError:
            return 0
    return max(tensor.ndim - len(owner.batch_shape), 0)


def _own_state(dist: Distribution) -> dict[str, Any]:
    """The instance's attributes without the lazy properties that were computed after construction."""
    state: dict[str, Any] = {}
    constructed = False
    for key, value in vars(dist).items():
        cached = constructed and isinstance(_class_attribute(type(dist), key), lazy_property)
        if not cached and key != "_validate_args":
            state[key] = value
        constructed = constructed or key == "_batch_shape"
    state["_validate_args"] = False
    return state


def _transform_state(transform: Transform) -> dict[str, Any]:
    """The instance's attributes without its links to its inverse and to the last value it computed."""
    state = dict(vars(transform))
    if not isinstance(transform, _InverseTransform):  # of which it is the content
        state["_inv"] = None
    if "_cached_x_y" in state:
        state["_cached_x_y"] = (None, None)
    return state


def _class_attribute(cls: type, name: str) -> Any:
    """The attribute as the class defines it, without calling descriptors."""
    return next((vars(base)[name] for base in cls.__mro__ if name in vars(base)), None)


def _join(path: str, key: Any) -> str:
    return f"{path}.{key}" if path else str(key)


def _pad(param: Tensor, prefix: int, rank: int) -> Tensor:
    """``[*prefix, *slot]`` with 1s after the prefix, so that the slot has its full rank."""
    missing = rank - (param.ndim - prefix)
    return param.reshape(*param.shape[:prefix], *(1,) * missing, *param.shape[prefix:]) if missing > 0 else param


def _build(spec: Any, leaves: Sequence[Tensor], prefix: tuple[int, ...]) -> Any:
    if isinstance(spec, _Slot):
        return leaves[spec.index]
    if isinstance(spec, _Sequence):
        items = (_build(item, leaves, prefix) for item in spec.items)
        return spec.cls(*items) if hasattr(spec.cls, "_fields") else spec.cls(items)
    if isinstance(spec, _Mapping):
        return spec.cls((key, _build(item, leaves, prefix)) for key, item in spec.items)
    if isinstance(spec, _Object):
        built: Any = object.__new__(spec.cls)
        state = {key: _build(item, leaves, prefix) for key, item in spec.state}
        if issubclass(spec.cls, Distribution):
            state["_batch_shape"] = torch.Size((*prefix, *state["_batch_shape"]))
        vars(built).update(state)
        return built
    return spec

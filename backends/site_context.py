"""What an estimator sees of its site while the surrogate is built."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor
from torch.distributions import Bernoulli, Distribution

from scg.backends import runtime
from scg.backends.cuts import Below, causal_dim, cut_below
from scg.backends.hindsight import hindsight
from scg.backends.recorder import compile_time, record_call, record_constant
from scg.backends.reruns import as_drawn, rerun
from scg.backends.sample_dims import Batched
from scg.backends.single_changes import changed_signal
from scg.estimators.base import Hindsight, Rerun, RowEstimator, SiteInfo
from scg.ir import Input, LogProb, Sample

if TYPE_CHECKING:
    from scg.backends.lowering import Interpreter


class Context:
    """The backend's `SiteContext`."""

    def __init__(
        self, interpreter: Interpreter, site: Sample, dims: tuple[str, ...], signal: Tensor, scale: float = 1.0
    ) -> None:
        self._of, self._site, self.dims, self.scale = interpreter, site, dims, scale
        self.run, self.memo = interpreter, interpreter.memo
        template = interpreter.dist_node(site.dist).template
        support = interpreter.supports.get(site.name)
        self.joined = interpreter.joined[site.name]
        if support is not None:
            with compile_time():
                support = support.to(device=site.tensor.device, dtype=site.tensor.dtype)
        self.site = SiteInfo(
            site.name, template, site.tensor.shape, site.tensor.event_ndim, support, joined=self.joined
        )
        self.dist = interpreter.distribution(site.dist, dims, [1] * len(site.sample_shape))
        drawn = interpreter.dims.align(interpreter.env[site.name], dims)
        self.value = drawn.detach() if drawn.requires_grad else drawn
        self.signal = signal.detach() if signal.requires_grad else signal
        self.extra = tuple(interpreter.dims.align(part, dims) for part in interpreter.extras.get(site.name, ()))
        kinds = [interpreter.dims[name].kind for name in dims]
        self.iid = tuple(i for i, kind in enumerate(kinds) if kind == "iid")
        self.row_axis = dims.index(site.row_dim) if isinstance(site.estimator, RowEstimator) else None
        self.state = interpreter.states.get(site.name)
        self.training = interpreter.training and interpreter.learning
        self.surrogate: Tensor | None = None

    @functools.cached_property
    def unit(self) -> Tensor | None:
        return self._of.signals.unit(self._site, self.scale)

    @functools.cached_property
    def log_prob(self) -> Tensor:
        found = self._of.log_prob(self._site.dist, self._of.env[self._site.name], self._site.name)
        return self._of.dims.align(found, self.dims)

    def score_times(self, multiplier: Tensor) -> Tensor:
        multiplier = multiplier.detach()
        bits = None if self._reads_log_prob else self._bits
        score = self.log_prob if bits is None else self.value
        lead = len(self.dims)
        flat = [axis for axis in range(lead, score.dim()) if multiplier.shape[axis] == 1 and score.shape[axis] > 1]
        if bits is None:
            return multiplier * (score.sum(flat, keepdim=True) if flat else score)
        term = (multiplier * (score - bits.mean)).detach() * bits.logits
        return term.sum(flat, keepdim=True) if flat else term

    def score_mix(self, outcomes: Tensor, weights: Tensor, of_draw: Tensor | None = None) -> Tensor:
        weights = weights.detach()
        if bits := self._bits:
            score, change = self.value - bits.mean, outcomes - self.value
            score = score if of_draw is None else score * of_draw.detach()
            if len(outcomes) == 1:
                return torch.addcmul(score, weights, change).squeeze(0) * bits.logits
            return (score + (weights * change).sum(0)).detach() * bits.logits
        score = self.log_prob if of_draw is None else self.log_prob * of_draw.detach()
        others = torch.where(weights != 0, self.log_prob_of(outcomes) - self.log_prob, 0.0)  # an impossible one: -inf
        return score + (weights * others).sum(0)

    def log_odds(self, outcomes: Tensor) -> Tensor:
        if bits := self._bits:
            return (outcomes - self.value) * bits.logits.detach()
        return (self.log_prob_of(outcomes) - self.log_prob).detach()

    @functools.cached_property
    def _bits(self) -> Bits | None:
        """Of bits given by their logits: whose score is ``z - mean`` in these, with no log density to be computed.

        A term's value does not count, and in the plain program nothing but its first derivative does.
        """
        template = self.site.template
        if template.cls is not Bernoulli or template.names != ("logits",) or self._of.order > 1 or self._of.rerunning:
            return None
        (logits,) = self._params
        mean = Batched(torch.sigmoid(logits.tensor).detach(), logits.dims)  # that of the draw
        return Bits(self._placed(logits), self._placed(mean))

    @property
    def _reads_log_prob(self) -> bool:
        """Whether the program computes the draw's log density anyway."""
        nodes = self._of.graph.of(LogProb)
        return any(node.dist == self._site.dist and node.value == self._site.name for node in nodes)

    def log_prob_of(self, values: Tensor) -> Tensor:
        return self.dist.log_prob(values)

    def rerun(self, values: Tensor, *, differentiable: bool = False) -> Rerun:
        return rerun(self._of, self._site, self.dims, values if differentiable else values.detach(), differentiable)

    def at_draw(self) -> tuple[Tensor, Rerun]:
        drawn = self._of.env[self._site.name].tensor
        if self._of.is_variable(self._site) and self._of.dims.align(self._of.env[self._site.name], self.dims) is drawn:
            return drawn, as_drawn(self._of, self._site, self.dims)
        point = self.variable(self.value)
        return point, self.rerun(point.unsqueeze(0), differentiable=True)

    def change_one(self, outcomes: Tensor, rest: Tensor | None = None) -> Tensor:
        return changed_signal(self._of, self._site, self.dims, outcomes, rest)

    def hindsight(self, outcomes: Tensor) -> Hindsight:
        return hindsight(self._of, self._site, self.dims, outcomes)

    def variables(self) -> tuple[Distribution, list[Tensor], list[Tensor]]:
        fixed = self.parameters()
        free = {slot: self.variable(tensor) for slot, tensor in fixed.items()}
        return self.distribution(free), list(free.values()), list(fixed.values())

    def parameters(self) -> dict[int, Tensor]:
        template, prefix = self.site.template, self._prefix
        found = {}
        for slot, (param, event) in enumerate(zip(self._params, template.event_dims, strict=True)):
            if param.tensor.requires_grad:
                shape = param.shape[param.ndim - event :]
                found[slot] = self._placed(param).expand([*prefix, *template.batch_shape, *shape])
        return found

    def distribution(self, parameters: Mapping[int, Tensor]) -> Distribution:
        tensors = [parameters.get(slot, self._placed(param)) for slot, param in enumerate(self._params)]
        carries = [bool(param.dims) or slot in parameters for slot, param in enumerate(self._params)]
        return self.site.template.rebuild(tensors, prefix=self._prefix, carries=carries)

    @property
    def _params(self) -> list[Batched]:
        return self._of.params[self._site.dist]

    @property
    def _prefix(self) -> tuple[int, ...]:
        return (*self._of.dims.sizes(self.dims), *self._site.sample_shape)

    def _placed(self, param: Batched) -> Tensor:
        if not param.dims:
            return param.tensor
        lead = self._of._lead(param, self.dims)
        return param.tensor.reshape([*lead, *[1] * len(self._site.sample_shape), *param.shape])

    def add(self, surrogate: Tensor) -> None:
        """Adds a scalar to the surrogate, in the units of the signal: the pathwise part of a control variate."""
        self.surrogate = surrogate if self.surrogate is None else self.surrogate + surrogate

    def constant(self, make: Callable[[], Tensor]) -> Tensor:
        return record_constant(make)

    def variable(self, value: Tensor) -> Tensor:
        return record_call(VARIABLE, value)  # type: ignore[no-any-return]

    def read(self, names: tuple[str, ...] | None) -> list[Tensor]:
        inputs = {node.path: node.name for node in self._of.graph.of(Input)}  # a draw may be called as an input is
        return self.read_nodes([*inputs.values()] if names is None else [inputs.get(name, name) for name in names])

    def read_nodes(self, names: Collection[str]) -> list[Tensor]:
        found = []
        for node in self._of.graph:
            if node.name in names:
                if node.name not in self._of.env:  # an input that the model itself does not read
                    self._of.evaluate(node)
                value: Batched = self._of.env[node.name]
                found.append(self._of.dims.align(value, self.dims).detach())
        return found

    def next_sites(self) -> list[Below]:
        found = []
        for site, edge in cut_below(self._of, self._site):
            context = self._of.context_of(site)
            assert context is not None
            found.append(Below(context, site.estimator.predictor, self, edge))
        return found

    def causal_dim(self) -> int | None:
        return causal_dim(self._of, self._site)

    def gradient(self, scalar: Tensor, wrt: Tensor, *, differentiable: bool = False) -> Tensor:
        return record_call(InputGradient(differentiable), scalar, wrt)  # type: ignore[no-any-return]

    def gradients(self, scalar: Tensor, wrt: Sequence[Tensor], *, differentiable: bool = False) -> Sequence[Tensor]:
        if len(wrt) == 1:
            return [self.gradient(scalar, wrt[0], differentiable=differentiable)]
        return record_call(InputGradients(differentiable), scalar, [*wrt])  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Bits:
    """The parameters of Bernoulli draws, ``[*dims | *elements]`` up to broadcasting."""

    logits: Tensor
    mean: Tensor
    """Detached."""


class Variable:
    """The value of a tensor as an independent variable; a leaf of the generated code."""

    __name__ = __qualname__ = "variable"
    __module__ = __name__
    repeatable: ClassVar[bool] = False  # a tensor that stands in two slots is two variables

    def __call__(self, value: Tensor) -> Tensor:
        return runtime.variable(value)


VARIABLE = Variable()  # one for all: programs that differ in their batch size alone have equal leaves


class InputGradient:
    """The gradient of a scalar in one tensor; a leaf of the generated code."""

    __name__ = __qualname__ = "input_gradient"
    __module__ = __name__

    def __init__(self, differentiable: bool) -> None:
        self.differentiable = differentiable

    def fake(self, scalar: Tensor, wrt: Tensor) -> Tensor:
        found = wrt * 0.0 + scalar * 0.0  # of the right shape, and differentiable in both
        return found if self.differentiable else found.detach()

    def __call__(self, scalar: Tensor, wrt: Tensor) -> Tensor:
        return runtime.input_gradient(scalar, wrt, self.differentiable)


class InputGradients:
    """The gradients of a scalar in several tensors; a leaf of the generated code."""

    __name__ = __qualname__ = "input_gradients"
    __module__ = __name__

    def __init__(self, differentiable: bool) -> None:
        self.differentiable = differentiable

    def fake(self, scalar: Tensor, wrt: Sequence[Tensor]) -> list[Tensor]:
        return [InputGradient(self.differentiable).fake(scalar, item) for item in wrt]

    def __call__(self, scalar: Tensor, wrt: Sequence[Tensor]) -> list[Tensor]:
        return runtime.input_gradients(scalar, wrt, self.differentiable)

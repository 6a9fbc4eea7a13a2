"""Torch's own samples of its operations, in all spellings: batched equal to a loop, influence by perturbation.

They come with torch's test suite, which needs the package ``expecttest``.
"""

from __future__ import annotations

import itertools
import random
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

from scg.analysis import influence
from scg.operations import is_impure, is_random
from tests.analysis.examples import Example, example
from tests.analysis.tools import allowed, nudge, run
from tests.backends.test_batching import _agree, _choices

pytest.importorskip("expecttest")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    found = pytest.importorskip("torch.testing._internal.common_methods_invocations", exc_type=ImportError)

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

SAMPLES, ELEMENTS, LARGEST = 6, 8, 600
"""Samples of an operation, elements perturbed of a tensor, elements of the largest tensor (empty ones are left out)."""

BY_VALUE = set(
    """_unique2 argwhere masked_select nonzero nonzero_numpy repeat_interleave.self_Tensor unique_consecutive unique_dim
    tensor_split.tensor_indices_or_sections""".split()
)
"""Their result has another shape for other values: refused when traced."""
ODD = {
    "segment_reduce": "its lengths must sum to a size",
    "embedding_bag": "its offsets must rise from 0",
    "histogramdd": "its result holds a list",
    "to_sparse": "no dense tensor",
}
"""Operations left out, and why."""
INFOS: dict[str, list[Any]] = {}
for info in found.op_db:
    if torch.float64 in info.dtypes and not info.name.startswith(("sparse.", "jiterator_")):
        INFOS.setdefault(info.name, []).append(info)


class _Calls(fx.Interpreter):
    """Runs a graph and notes each call of an operator, with the values it was called with."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.noted: list[tuple[Any, Any, Any]] = []

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if isinstance(target, torch._ops.OpOverload):
            self.noted.append((target, *tree_map_only(Tensor, torch.clone, (args, dict(kwargs)))))
        return super().call_function(target, args, kwargs)


def _calls(info: Any) -> Iterator[tuple[Any, Any, Any]]:
    samples = list(itertools.islice(info.sample_inputs("cpu", torch.float64), 200))
    for sample in random.Random(0).sample(samples, min(SAMPLES, len(samples))):
        flat, spec = tree_flatten(((sample.input, *sample.args), sample.kwargs))
        places = [i for i, item in enumerate(flat) if isinstance(item, Tensor)]

        def call(*tensors: Tensor) -> Any:
            given = dict(zip(places, tensors, strict=True))  # noqa: B023
            args, kwargs = tree_unflatten([given.get(i, item) for i, item in enumerate(flat)], spec)  # noqa: B023
            return info.op(*args, **kwargs)

        tensors = [flat[i].clone() for i in places]
        try:
            traced = make_fx(call, pre_dispatch=True, _allow_non_fake_inputs=True)(*tensors)
        except RuntimeError:  # it needs the value of a tensor
            continue
        calls = _Calls(traced)
        calls.run(*(flat[i].clone() for i in places))
        yield from calls.noted


def _examples(name: str) -> Iterator[Example]:
    for target, args, kwargs in itertools.chain.from_iterable(map(_calls, INFOS[name])):
        tensors = [item for item in tree_leaves((args, kwargs)) if isinstance(item, Tensor)]
        schema = target._schema
        packet = schema.name.partition("::")[2]
        left_out = packet in ODD or packet in BY_VALUE or f"{packet}.{schema.overload_name}" in BY_VALUE
        if left_out or "empty" in packet or schema.is_mutable or not all(0 < t.numel() <= LARGEST for t in tensors):
            continue
        indexed = any(not (t.is_floating_point() or t.is_complex()) for t in tensors)
        for known in (False, True)[: 1 + indexed]:
            case = example(target, args, kwargs, known=known)
            if case.inputs and not is_random(case.op) and not is_impure(case.op):
                yield case


def _missed(case: Example) -> list[str]:
    """Dependences that the analysis does not allow."""
    relations = influence(case.graph, list(case.inputs))
    constants = {node.name: case.graph.tensors[node.path] for node in case.graph if node.kind == "param"}  # type: ignore[attr-defined]

    def outputs(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        out = run(case.op, {**inputs, **constants})
        items = {"y": out} if isinstance(out, Tensor) else {f"y{i}": item for i, item in enumerate(out)}
        return {name: item for name, item in items.items() if isinstance(item, Tensor)}

    base, missed = outputs(case.inputs), []
    for source, x in case.inputs.items():
        places = random.Random(0).sample(range(x.numel()), min(ELEMENTS, x.numel()))
        for name, before in base.items():
            if not before.numel():
                continue
            may = allowed(relations, name, source, tuple(before.shape), tuple(x.shape)).reshape(*before.shape, -1)
            for at, amount in itertools.product(places, (0.05, -1.3)):
                try:
                    after = outputs({**case.inputs, source: nudge(x, at, amount)})[name]
                except (RuntimeError, IndexError):
                    continue  # not a value that it takes
                same = torch.isclose(after, before, rtol=1e-10, atol=1e-12, equal_nan=True)
                if bool((~same & ~may[..., at]).any()):
                    missed.append(f"%{name} depends on {source}[{at}]")
    return missed


@pytest.mark.parametrize("name", sorted(INFOS))
def test_torch_samples(name: str) -> None:
    for case in _examples(name):
        try:
            assert not _missed(case)
            for carried in _choices(list(case.inputs)):
                _agree(case, carried)
        except Exception as error:
            error.add_note(f"{case.op} on {[tuple(x.shape) for x in case.inputs.values()]}")
            raise

"""What a model reaches is found by the user's names, and a change of it is noticed."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Normal

from scg.capture import captured, restored
from scg.primitives import opaque

BETA = 0.5
TABLE = {"temperature": [1.0, 2.0]}
SHIFT = torch.ones(3)


class Settings:
    rate = 0.1

    def __init__(self) -> None:
        self.depth = 2


class Net(nn.Module):
    scale = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.enc = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.1))
        self.norm = nn.BatchNorm1d(3)
        self.beta = 0.1
        self.sizes: list[Any] = [3, [4, 5]]
        self.names = {"a": "relu"}
        self.settings = Settings()
        self.other = SimpleNamespace(flag=True)
        self.act: Callable[[Tensor], Tensor] = torch.relu
        self.mask = torch.ones(3)
        self.prior = Normal(torch.zeros(3), 1.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.helper(self.act(self.enc(x)))

    def helper(self, h: Tensor) -> Tensor:
        return (h * BETA * TABLE["temperature"][0] + SHIFT).sum()


def test_names() -> None:
    net = Net()
    found = captured(net)
    parameters = {**dict(net.named_parameters()), **dict(net.named_buffers())}
    assert {name: found.tensors[name] for name in parameters}.keys() == parameters.keys()
    assert all(found.tensors[name] is tensor for name, tensor in parameters.items())
    assert found.tensors["SHIFT"] is SHIFT and found.tensors["mask"] is net.mask and "prior.loc" in found.tensors
    assert {"", "enc", "enc.0", "norm"} <= set(found.modules)


def test_functions() -> None:
    theta, net = nn.Parameter(torch.zeros(3)), nn.Linear(3, 3)

    def inner(x: Tensor, w: Tensor = SHIFT) -> Tensor:
        return x * theta + w

    def model(x: Tensor) -> Tensor:
        return (lambda y: net(inner(y)))(x)

    found = captured(functools.partial(model, x=theta))
    assert found.tensors["inner.theta"] is theta or found.tensors["x"] is theta
    assert found.modules["net"] is net and found.tensors["net.weight"] is net.weight
    assert SHIFT in [t for t in found.tensors.values() if t is SHIFT]


CHANGES: dict[str, Callable[[Net, Any], Any]] = {
    "attribute": lambda net, patch: setattr(net, "beta", 0.2),
    "type of an attribute": lambda net, patch: setattr(net, "scale", 1),
    "new attribute": lambda net, patch: setattr(net, "gamma", 0.2),
    "list": lambda net, patch: net.sizes.append(3),
    "nested list": lambda net, patch: net.sizes[1].__setitem__(0, 7),
    "dict": lambda net, patch: net.names.__setitem__("a", "gelu"),
    "object": lambda net, patch: setattr(net.settings, "depth", 3),
    "class": lambda net, patch: patch.setattr(Settings, "rate", 0.2),
    "class of the module": lambda net, patch: patch.setattr(Net, "scale", 2.0),
    "namespace": lambda net, patch: setattr(net.other, "flag", False),
    "function": lambda net, patch: setattr(net, "act", torch.tanh),
    "global": lambda net, patch: patch.setitem(globals(), "BETA", 0.6),
    "global table": lambda net, patch: patch.setitem(TABLE, "temperature", [3.0]),
    "global tensor": lambda net, patch: patch.setitem(globals(), "SHIFT", torch.zeros(3)),
    "tensor": lambda net, patch: setattr(net, "mask", torch.zeros(3)),
    "number where a tensor was": lambda net, patch: setattr(net, "mask", 1.0),
    "tensor where a number was": lambda net, patch: setattr(net, "beta", torch.ones(2)),
    "mode": lambda net, patch: net.enc[1].eval(),
    "dropout rate": lambda net, patch: setattr(net.enc[1], "p", 0.5),
    "requires_grad": lambda net, patch: net.enc[0].weight.requires_grad_(False),
    "sub-module": lambda net, patch: net.enc.__setitem__(0, nn.Linear(3, 3)),
    "parameter": lambda net, patch: setattr(net.enc[0], "weight", nn.Parameter(torch.zeros(3, 3))),
    "buffer": lambda net, patch: setattr(net.norm, "running_mean", torch.ones(3)),
    "hook": lambda net, patch: net.enc.register_forward_hook(lambda *a: None),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changes_are_noticed(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    net = Net()
    found = captured(net)
    assert found.unchanged() and captured(net).values == found.values
    CHANGES[change](net, monkeypatch)
    assert not found.unchanged()
    assert captured(net).unchanged()


def test_training_changes_nothing() -> None:
    net = Net()
    found = captured(net)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    net(torch.rand(4, 3)).backward()
    optimizer.step()
    net.load_state_dict(net.state_dict())
    assert found.unchanged()


def test_cells_and_defaults() -> None:
    rate, box = 0.1, [1]

    def model(x: Tensor, k: float = 2.0) -> Tensor:
        return x * rate * box[0] * k

    found = captured(model)
    rate = 0.2
    assert not found.unchanged()
    found = captured(model)
    box[0] = 2
    assert not found.unchanged()
    found = captured(model)
    model.__defaults__ = (3.0,)
    assert not captured(model).values == found.values


def test_what_an_opaque_function_reads_is_its_own() -> None:
    state = {"steps": 0}

    @opaque(pure=False)
    def step(x: Tensor) -> Tensor:
        state["steps"] += 1
        return x

    found = captured(lambda x: step(x).sum())
    step(torch.ones(2))
    assert found.unchanged()


def test_cycles_and_large_containers() -> None:
    loop: list[Any] = [1.0]
    loop.append(loop)
    data = [torch.zeros(1)] * 10_000
    found = captured(lambda i: data[i] * loop[0])
    assert found.unchanged() and not found.tensors
    data.append(torch.ones(1))
    assert not found.unchanged()


def test_restored() -> None:
    net = Net()
    with pytest.raises(RuntimeError, match="inside"):
        with restored(captured(net)) as changes:
            net.beta = 1.0
            net.fresh = torch.ones(1)
            net.sizes.append(9)
            net.norm.running_mean = torch.ones(3)
            assert {change.name for change in changes()} == {"beta", "fresh", "sizes.2", "norm.running_mean"}
            assert [change.name for change in changes() if change.is_buffer] == ["norm.running_mean"]
            raise RuntimeError("inside")
    assert net.beta == 0.1 and not hasattr(net, "fresh") and net.sizes == [3, [4, 5]]
    assert torch.equal(net.norm.running_mean, torch.zeros(3))  # type: ignore[arg-type]

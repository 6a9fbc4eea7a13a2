"""The modules, parameters and tensors that a plain function closes over, as one ``nn.Module``."""

from __future__ import annotations

from torch import Tensor, nn

from scg.capture import Captured


def held(found: Captured) -> nn.Module:
    """A module that holds what a function reads: of a method of a module that module itself."""
    return found.modules[""] if "" in found.modules else Holder(found)


class Holder(nn.Module):
    """Registers what was captured under its user's path, so that ``state_dict``, ``.to`` and copies reach it."""

    def __init__(self, found: Captured | None = None) -> None:
        super().__init__()
        if found is None:
            return
        covered: list[str] = []
        for path, module in found.modules.items():
            if not any(path.startswith(f"{outer}.") for outer in covered):
                self._owner(path).add_module(path.rpartition(".")[2], module)
                covered.append(path)
        for path, tensor in found.tensors.items():
            if not any(path.startswith(f"{outer}.") for outer in covered):
                self._register(path, tensor)

    def _owner(self, path: str) -> nn.Module:
        owner: nn.Module = self
        for part in path.split(".")[:-1]:
            if part not in owner._modules:
                owner.add_module(part, Holder())
            owner = owner.get_submodule(part)
        return owner

    def _register(self, path: str, tensor: Tensor) -> None:
        owner, key = self._owner(path), path.rpartition(".")[2]
        if isinstance(tensor, nn.Parameter):
            owner.register_parameter(key, tensor)
        else:
            owner.register_buffer(key, tensor, persistent=False)

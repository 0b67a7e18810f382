"""Weights as a model's own code initialises them, the same in every layout, cut as soon as they are made.

Random numbers are seeded per tensor by its name.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from merak_like.runtime.tensor_parallel.shards import Shards

Initialiser = Callable[[nn.Module], None]
"""Fills the parameters and buffers of a module, those of its inner modules too where they are its own business."""


def moved(tensor: Tensor, device: torch.device, data: Tensor) -> Tensor:
    """These numbers on the device, and what else the tensor is."""
    if data.device != device:
        data = torch.empty_like(data, device=device) if device.type == "meta" or data.is_meta else data.to(device)
    return nn.Parameter(data, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else data


class Place:
    """Where a tensor is registered, under one name or several."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self._slots: list[tuple[dict[str, Any], str]] = []

    def add(self, name: str, registry: dict[str, Any], key: str) -> None:
        self.names.append(name)
        self._slots.append((registry, key))

    def get(self) -> Tensor:
        registry, key = self._slots[0]
        return registry[key]

    def put(self, tensor: Tensor) -> None:
        for registry, key in self._slots:
            registry[key] = tensor

    def inside(self, path: str) -> bool:
        """Whether a module has it, itself or in an inner one."""
        return not path or any(name.startswith(f"{path}.") for name in self.names)


def places_of(model: nn.Module, first: Mapping[str, str]) -> dict[str, Place]:
    """Of all tensors, by name; tied ones by their ``first``."""
    found: dict[str, Place] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for registry in (module._parameters, module._buffers):
            for key, tensor in registry.items():
                if tensor is not None:
                    full = f"{path}.{key}" if path else key
                    found.setdefault(first.get(full, full), Place()).add(full, registry, key)
    return found


def initialised(
    model: nn.Module, empty: set[str], places: Mapping[str, Place], device: torch.device, seed: int,
    initialise: Initialiser, shards: Shards,
) -> None:  # fmt: skip
    """Initialise empty tensors and cut them. So that no more than one module's own are there whole, those of one module
    have memory at a time, and all modules around it are initialised, by which nothing happens to the rest."""
    owners: dict[str, set[str]] = {}
    for name in empty:
        owners.setdefault(places[name].names[0].rpartition(".")[0], set()).add(name)
    groups, made = list(owners.values()) if shards.layouts else [empty], dict[str, Tensor]()
    while groups:
        group = groups.pop()
        blank = {name: places[name].get() for name in group}
        for name, tensor in blank.items():
            places[name].put(moved(tensor, device, torch.empty_like(tensor, device=device)))
        try:
            _initialise(model, group, places, seed, initialise)
            for name in group:
                whole = places[name].get()
                made[name] = moved(whole, device, shards.cut(name, whole.detach())) if shards.layouts else whole
        except RuntimeError as error:  # one tensor is made of another, which has no data now
            if group == empty or isinstance(error, torch.OutOfMemoryError):
                raise
            groups, made = [empty], {}
        finally:
            for name, tensor in blank.items():
                places[name].put(tensor)
    for name, tensor in made.items():
        places[name].put(tensor)


def _paths(name: str) -> Iterable[str]:
    """Of all modules around a tensor."""
    while name:
        name = name.rpartition(".")[0]
        yield name


def reset_parameters(module: nn.Module) -> None:
    """How torch's own layers initialise themselves."""
    reset = getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)
    if callable(reset):
        reset()


def _initialise(
    model: nn.Module, empty: set[str], places: Mapping[str, Place], seed: int, initialise: Initialiser
) -> None:
    """Inner modules first: an attention that scales its own output projection has the last word, as in a real build."""
    tensors = {name: place.get() for name, place in places.items()}
    names = {id(tensor): name for name, tensor in tensors.items()}
    given = {name: t for name, t in tensors.items() if name not in empty and not t.is_meta}
    versions = {name: tensors[name]._version for name in empty}
    own = {module: path for path, module in model.named_modules()}
    around = {model.get_submodule(path) for name in empty for full in places[name].names for path in _paths(full)}
    there = [module for module in own if module in around]
    inner_first = sorted(there, key=lambda module: own[module].count(".") + bool(own[module]), reverse=True)
    with torch.random.fork_rng(), torch.no_grad():
        for module in inner_first:
            data = {name: t.clone() for name, t in given.items() if places[name].inside(own[module])}
            with Streams(f"{seed}/{own[module]}", names):
                initialise(module)
            for name, tensor in data.items():
                given[name].copy_(tensor)
    missed = sorted(name for name, version in versions.items() if places[name].get()._version == version)
    if missed:
        raise ValueError(
            f"nothing initialises {missed[:5]} of {type(model).__name__}, which is on the meta device: give the module "
            "that owns them a reset_parameters(), build the model on the CPU, or pass weights=, a folder of safetensors"
        )


class Streams(TorchFunctionMode):
    """Random numbers for each tensor by its name, so that tensors that are on other ranks need not be drawn here."""

    def __init__(self, seed: str, names: Mapping[int, str]) -> None:
        super().__init__()
        self.seed, self.names = seed, names
        self.now, self.turns = "", 0
        self._begin()

    def _begin(self) -> None:
        digest = hashlib.sha256(f"{self.seed}/{self.now}/{self.turns}".encode()).digest()
        torch.manual_seed(int.from_bytes(digest[:8], "big") >> 1)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        told = (self.names.get(id(item)) for item in (*args, *(kwargs or {}).values()) if isinstance(item, Tensor))
        name = next(filter(None, told), self.now)
        if name != self.now:
            self.now, self.turns = name, self.turns + 1
            self._begin()
        return func(*args, **(kwargs or {}))

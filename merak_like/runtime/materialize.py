"""Give a rank its own weights, and only those: from the user's model, its own initialisation, or safetensors.

Initialisation is seeded per tensor by its name, so every layout starts from the same weights.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from merak_like.partitioner.plan import Plan
from merak_like.runtime.tensor_parallel.shards import WHOLE, Shards

Initialiser = Callable[[nn.Module], None]
"""Fills the parameters and buffers of a module, those of its inner modules too where they are its own business."""


def materialize(
    model: nn.Module,
    plan: Plan,
    stages: Collection[int],
    device: torch.device,
    *,
    seed: int,
    initialise: Initialiser | None = None,
    weights: str | Path | None = None,
    shards: Shards = WHOLE,
) -> dict[str, nn.Parameter]:
    """Put the tensors of some stages on the device, all else on meta, in place; the stages' parameters by name.

    With ``shards`` each tensor becomes this rank's part of it. From ``weights`` only that part is read; to initialise
    one the whole of it is made, so that all ranks draw the same numbers, and then cut.

    Tensors that have data keep it. Tensors on meta are read from ``weights`` (a safetensors file or a folder of them)
    or initialised as the model itself would. Raises ValueError for a tensor that neither can fill, and, before anything
    is changed, for one that an earlier engine gave up: to initialise it again would quietly forget what it was.
    """
    keep = {name for stage in stages for name in (*plan.stages[stage].params, *plan.stages[stage].buffers)}
    first = {alias: names[0] for names in plan.ties for alias in names}
    if weights is None:
        _refuse_given_up(model, keep, first)
    saved = {first.get(n, n) for n in model.state_dict()} & keep if weights is not None else set[str]()
    empty = _place(model, keep, first, device, shards, saved)
    if weights is not None:
        there = {n: t for n, t in _named(model) if first.get(n, n) in saved}
        empty -= {first.get(name, name) for name in _read(model, there, Path(weights), first, shards)}
    if empty:  # with a checkpoint too: buffers that are not saved are computed, as when the model is built
        _initialise(model, empty, seed, initialise or reset_parameters)
        _cut(model, empty, first, shards)
    return {name: p for name, p in model.named_parameters() if name in keep}


GIVEN_UP = "_merak_given_up"
"""Marks a tensor on meta whose data is, or will be, on another rank."""


def _refuse_given_up(model: nn.Module, keep: Collection[str], first: Mapping[str, str]) -> None:
    lost = sorted({n for n, t in _named(model) if first.get(n, n) in keep and t.is_meta and hasattr(t, GIVEN_UP)})
    if lost:
        raise ValueError(
            f"an earlier engine gave {lost[:3]} ({len(lost)} tensors) of this {type(model).__name__} to another rank: "
            "build the model again, or save it from that engine and pass weights=, the folder it was saved to"
        )


def _named(model: nn.Module) -> Iterable[tuple[str, Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _place(
    model: nn.Module, keep: Collection[str], first: Mapping[str, str], device: torch.device, shards: Shards,
    read: Collection[str],
) -> set[str]:  # fmt: skip
    """Move or drop every tensor; the names (first ones) of those that have memory but no data yet. Ties stay ties.

    What has data, and what is to be ``read``, gets the size of this rank's part.
    """
    made: dict[str, Tensor] = {}
    empty: set[str] = set()
    for path, module in model.named_modules():
        for registry in (module._parameters, module._buffers):
            for key, tensor in registry.items():
                if tensor is None:
                    continue
                full = f"{path}.{key}" if path else key
                name = first.get(full, full)
                if name not in made:
                    where = device if name in keep else torch.device("meta")
                    if tensor.is_meta and name in keep:
                        empty.add(name)
                    here = name in keep and (name in read or not tensor.is_meta)
                    made[name] = _moved(tensor, where, shards.cut(name, tensor.detach()) if here else tensor.detach())
                    if name not in keep:
                        setattr(made[name], GIVEN_UP, True)
                registry[key] = made[name]  # type: ignore[assignment]
    return empty


def _moved(tensor: Tensor, device: torch.device, data: Tensor) -> Tensor:
    """These numbers on the device, and what else the tensor is."""
    if data.device != device:
        data = torch.empty_like(data, device=device) if device.type == "meta" or data.is_meta else data.to(device)
    return nn.Parameter(data, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else data


def _cut(model: nn.Module, names: Collection[str], first: Mapping[str, str], shards: Shards) -> None:
    """Put this rank's part in the place of whole tensors. Ties stay ties."""
    made: dict[str, Tensor] = {}
    for path, module in model.named_modules():
        for registry in (module._parameters, module._buffers):
            for key, tensor in registry.items():
                name = first.get(full := f"{path}.{key}" if path else key, full)
                if tensor is not None and name in names and name in shards.layouts:
                    if name not in made:
                        made[name] = _moved(tensor, tensor.device, shards.cut(name, tensor.detach()))
                    registry[key] = made[name]  # type: ignore[assignment]


def reset_parameters(module: nn.Module) -> None:
    """How torch's own layers initialise themselves."""
    reset = getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)
    if callable(reset):
        reset()


def _initialise(model: nn.Module, empty: set[str], seed: int, initialise: Initialiser) -> None:
    """Inner modules first: an attention that scales its own output projection has the last word, as in a real build."""
    names: dict[int, str] = {}
    for name, tensor in _named(model):
        if name in empty or id(tensor) not in names:
            names[id(tensor)] = name
    versions = {name: tensor._version for name, tensor in _named(model) if name in empty}
    own = {module: path for path, module in model.named_modules()}
    inner_first = sorted(own, key=lambda module: own[module].count(".") + bool(own[module]), reverse=True)
    with torch.random.fork_rng(), torch.no_grad():
        for module in inner_first:
            held = {names[id(tensor)]: tensor for _, tensor in _named(module)}
            if not empty & held.keys():
                continue
            data = {name: t.clone() for name, t in held.items() if name not in empty and not t.is_meta}
            with Streams(f"{seed}/{own[module]}", names):
                initialise(module)
            for name, tensor in data.items():
                held[name].copy_(tensor)
    missed = sorted(name for name, tensor in _named(model) if name in versions and tensor._version == versions[name])
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


def _read(
    model: nn.Module, wanted: Mapping[str, Tensor], path: Path, first: Mapping[str, str], shards: Shards
) -> set[str]:
    """Read this rank's part of the wanted tensors, and no others, from safetensors files; the names of those there.

    A tied tensor may be there under any of its names.
    """
    from safetensors import safe_open

    index = _index(path)
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    read: set[str] = set()
    for name, tensor in wanted.items():
        known = next((n for n in (name, name.removeprefix(prefix), prefix + name) if n in index), None)
        if known is None:
            continue
        with safe_open(index[known], "pt") as file, torch.no_grad():
            found, own = file.get_slice(known), first.get(name, name)
            expected = shards.whole_shape(own, tensor.shape)
            if tuple(found.get_shape()) != expected:
                raise ValueError(f"{name} has shape {expected}, in {index[known]} {tuple(found.get_shape())}")
            if own in shards.layouts:
                shards.read(own, found, tensor)
            else:
                tensor.copy_(file.get_tensor(known))
        read.add(name)
    there = {first.get(name, name) for name in read}
    missing = sorted({first.get(name, name) for name in wanted} - there)
    if missing:
        raise ValueError(f"{path} has no {missing[:5]} ({len(missing)} missing): is it the checkpoint of this model?")
    return read


def _index(path: Path) -> dict[str, Path]:
    """Which file holds each tensor."""
    from safetensors import safe_open

    listing = path / "model.safetensors.index.json"
    if listing.is_file():
        return {name: path / file for name, file in json.loads(listing.read_text())["weight_map"].items()}
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{path} is no safetensors file and has none: give a checkpoint folder of save_pretrained")
    found: dict[str, Path] = {}
    for file in files:
        with safe_open(file, "pt") as opened:
            found.update(dict.fromkeys(opened.keys(), file))
    return found

"""Give a rank its own weights, and only those: from the user's model, its own initialisation, or safetensors.

Initialisation is seeded per module by the module's path, so every layout starts from the same weights.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from merak_like.partitioner.plan import Plan

Initialiser = Callable[[nn.Module], None]
"""Fills the parameters and buffers that a module itself owns."""


def materialize(
    model: nn.Module,
    plan: Plan,
    stage: int,
    device: torch.device,
    *,
    seed: int,
    initialise: Initialiser | None = None,
    weights: str | Path | None = None,
) -> dict[str, nn.Parameter]:
    """Put one stage's tensors on the device and everything else on meta, in place; the stage's parameters by name.

    Tensors that have data keep it. Tensors on meta are read from ``weights`` (a safetensors file or a folder of them)
    or initialised as the model itself would. Raises ValueError for a tensor that neither can fill.
    """
    keep = {*plan.stages[stage].params, *plan.stages[stage].buffers}
    first = {alias: names[0] for names in plan.ties for alias in names}
    empty = _place(model, keep, first, device)
    if weights is not None:
        _read(model, {n: t for n, t in _named(model) if first.get(n, n) in keep}, Path(weights), first)
    elif empty:
        _initialise(model, empty, seed, initialise or reset_parameters)
    return {name: p for name, p in model.named_parameters() if name in keep}


def _named(model: nn.Module) -> Iterable[tuple[str, Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _place(model: nn.Module, keep: Collection[str], first: Mapping[str, str], device: torch.device) -> set[str]:
    """Move or drop every tensor; the names (first ones) of those that have memory but no data yet. Ties stay ties."""
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
                    made[name] = _moved(tensor, where)
                registry[key] = made[name]  # type: ignore[assignment]
    return empty


def _moved(tensor: Tensor, device: torch.device) -> Tensor:
    data = tensor.detach()
    if data.device != device:
        data = torch.empty_like(data, device=device) if device.type == "meta" or data.is_meta else data.to(device)
    return nn.Parameter(data, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else data


def reset_parameters(module: nn.Module) -> None:
    """How torch's own layers initialise themselves."""
    reset = getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)
    if callable(reset):
        reset()


def _initialise(model: nn.Module, empty: Collection[str], seed: int, initialise: Initialiser) -> None:
    versions = {name: tensor._version for name, tensor in _named(model) if name in empty}
    with torch.random.fork_rng(), torch.no_grad():
        for path, module in model.named_modules():
            own = [*module._parameters.values(), *module._buffers.values()]
            if any(t is not None and not t.is_meta for t in own):
                digest = hashlib.sha256(f"{seed}/{path}".encode()).digest()
                torch.manual_seed(int.from_bytes(digest[:8], "big") >> 1)
                initialise(module)
    missed = sorted(name for name, tensor in _named(model) if name in versions and tensor._version == versions[name])
    if missed:
        raise ValueError(
            f"nothing initialises {missed[:5]} of {type(model).__name__}, which is on the meta device: give the module "
            "that owns them a reset_parameters(), build the model on the CPU, or pass weights=, a folder of safetensors"
        )


def _read(model: nn.Module, wanted: Mapping[str, Tensor], path: Path, first: Mapping[str, str]) -> None:
    """Read the wanted tensors, and no others, from safetensors files."""
    from safetensors import safe_open

    index = _index(path)
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    missing: list[str] = []
    for name, tensor in wanted.items():
        known = next((n for n in (name, name.removeprefix(prefix), prefix + name) if n in index), None)
        if known is None:
            if not tensor.is_meta and first.get(name, name) == name and name in dict(model.state_dict()):
                missing.append(name)
            continue
        with safe_open(index[known], "pt") as file, torch.no_grad():
            found = file.get_tensor(known)
            if found.shape != tensor.shape:
                raise ValueError(f"{name} has shape {tuple(tensor.shape)}, in {index[known]} {tuple(found.shape)}")
            tensor.copy_(found)
    if missing:
        raise ValueError(f"{path} has no {missing[:5]} ({len(missing)} missing): is it the checkpoint of this model?")


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

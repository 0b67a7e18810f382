"""Give a rank its own weights, and only those: from the user's model, its own initialisation, or safetensors.

Initialisation is seeded per tensor by its name, so every layout starts from the same weights.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from merak_like.partitioner.plan import Plan
from merak_like.runtime.initialising import Initialiser, initialised, moved, places_of, reset_parameters
from merak_like.runtime.tensor_parallel.shards import WHOLE, Shards


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
    one the whole of it is made, so that all ranks draw the same numbers, and then cut: one module's own at a time.

    Tensors that have data keep it. Tensors on meta are read from ``weights`` (a safetensors file or a folder of them)
    or initialised as the model itself would. Raises ValueError for a tensor that neither can fill, and, before anything
    is changed, for one that an earlier engine gave up: to initialise it again would quietly forget what it was.
    """
    keep = {name for stage in stages for name in (*plan.stages[stage].params, *plan.stages[stage].buffers)}
    return fill(model, keep, plan.ties, device, seed=seed, initialise=initialise, weights=weights, shards=shards)


def fill(
    model: nn.Module,
    keep: Collection[str],
    ties: Iterable[tuple[str, ...]],
    device: torch.device,
    *,
    seed: int,
    initialise: Initialiser | None = None,
    weights: str | Path | None = None,
    given: bool = True,
    shards: Shards = WHOLE,
) -> dict[str, nn.Parameter]:
    """As ``materialize``, for tensors named (first names) instead of stages of a plan.

    With ``given`` false a tensor that has data already is not read from ``weights``.
    """
    keep = set(keep)
    first = {alias: names[0] for names in ties for alias in names}
    if weights is None:
        _refuse_given_up(model, keep, first)
    saved = {first.get(n, n) for n in model.state_dict()} & keep if weights is not None else set[str]()
    empty = _place(model, keep, first, device, shards, saved)
    if weights is not None:
        named = [(n, t) for n, t in _named(model) if first.get(n, n) in saved]
        wanted = {n: t for n, t in named if given or first.get(n, n) in empty}
        empty -= {first.get(name, name) for name in _read(model, wanted, Path(weights), first, shards)}
    if empty:  # with a checkpoint too: buffers that are not saved are computed, as when the model is built
        initialised(model, empty, places_of(model, first), device, seed, initialise or reset_parameters, shards)
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
    """Move or drop every tensor; the names (first ones) of those that have no data yet. Ties stay ties.

    What has data, and what is to be ``read``, gets memory and the size of this rank's part.
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
                    if tensor.is_meta and name in keep:
                        empty.add(name)
                    here = name in keep and (name in read or not tensor.is_meta)
                    where = device if here else torch.device("meta")
                    made[name] = moved(tensor, where, shards.cut(name, tensor.detach()) if here else tensor.detach())
                    if name not in keep:
                        setattr(made[name], GIVEN_UP, True)
                registry[key] = made[name]  # type: ignore[assignment]
    return empty


def read(model: nn.Module, wanted: Mapping[str, Tensor], weights: str | Path) -> None:
    """Read some tensors of a model, by name, in place. Raises ValueError where the checkpoint lacks one."""
    _read(model, wanted, Path(weights), {}, WHOLE)


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

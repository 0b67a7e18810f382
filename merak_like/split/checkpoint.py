"""Checkpoints that no crash can spoil: tensors in safetensors, all else in JSON, both in a folder that appears whole.

    folder/step-50/   state.safetensors  state.json  manifest.json (sizes and sha256 of the other two)

A folder is written under another name, synced and renamed; what does not fit its manifest is passed over, and said so.
The newest ``KEEP`` are kept.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

KEEP = 3
FILES = ("state.safetensors", "state.json")
LONGEST_HEADER = 2**24


@dataclass(frozen=True)
class State:
    """What was saved: tensors by name, and plain facts."""

    tensors: Mapping[str, Tensor]
    facts: Mapping[str, Any]


def save(folder: Path, step: int, state: State, *, keep: int = KEEP) -> Path:
    """Write one checkpoint and drop the oldest beyond ``keep``; it is there, synced, when this returns."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    final, draft = folder / f"step-{step}", folder / f".step-{step}.{os.getpid()}"
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir()
    save_file({name: t.detach().cpu().contiguous().clone() for name, t in state.tensors.items()}, draft / FILES[0])
    (draft / FILES[1]).write_text(json.dumps(dict(state.facts), sort_keys=True), encoding="utf-8")
    manifest = {name: {"bytes": (draft / name).stat().st_size, "sha256": _digest(draft / name)} for name in FILES}
    (draft / "manifest.json").write_text(json.dumps(manifest, sort_keys=True), encoding="utf-8")
    for path in (*draft.iterdir(), draft):
        _sync(path)
    if final.exists():
        shutil.rmtree(final)
    draft.rename(final)
    _sync(folder)
    for old in steps(folder)[:-keep]:
        shutil.rmtree(folder / f"step-{old}", ignore_errors=True)
    return final


def steps(folder: Path) -> list[int]:
    """Steps there are checkpoints of, oldest first; whether they are whole is found out when they are read."""
    names = (path.name.removeprefix("step-") for path in folder.glob("step-*"))
    return sorted(int(name) for name in names if name.isdigit())


def whole(folder: Path) -> list[int]:
    """The steps whose checkpoints fit their manifests, oldest first."""
    return [step for step in steps(folder) if not damage(folder / f"step-{step}")]


def damage(path: Path) -> str:
    """What is wrong with one checkpoint; empty where nothing is."""
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        for name in FILES:
            if (path / name).stat().st_size != manifest[name]["bytes"]:
                return f"{name} has another size than the manifest says"
            if _digest(path / name) != manifest[name]["sha256"]:
                return f"{name} is damaged"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"it is not whole ({type(error).__name__})"
    return ""


def load(folder: Path, step: int) -> State:
    """Read one checkpoint. Raises ValueError for one that is not there or damaged."""
    from safetensors.torch import load_file

    path = folder / f"step-{step}"
    if wrong := damage(path):
        raise ValueError(f"the checkpoint {path} cannot be used: {wrong}")
    with (path / FILES[0]).open("rb") as file:
        if int.from_bytes(file.read(8), "little") > LONGEST_HEADER:
            raise ValueError(f"the checkpoint {path} has a header beyond all measure")
    return State(load_file(path / FILES[0]), json.loads((path / FILES[1]).read_text(encoding="utf-8")))


def optimizer_state(optimizer: torch.optim.Optimizer | None, names: Sequence[str]) -> State:
    """An optimizer's state: tensors under ``<parameter>/<key>``, the rest as facts; ``names`` are its parameters'."""
    if optimizer is None:
        return State({}, {})
    said = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    plain: dict[str, Any] = {}
    for index, entries in said["state"].items():
        for key, value in entries.items():
            (tensors if isinstance(value, Tensor) else plain)[f"{names[index]}/{key}"] = value
    groups = [{key: value for key, value in group.items() if key != "params"} for group in said["param_groups"]]
    return State(tensors, {"groups": groups, "plain": plain})


def load_optimizer(optimizer: torch.optim.Optimizer | None, names: Sequence[str], state: State) -> None:
    """Give an optimizer what ``optimizer_state`` took, as far as it has the parameters."""
    if optimizer is None:
        return
    place = {name: index for index, name in enumerate(names)}
    entries: dict[int, dict[str, Any]] = {}
    for name, value in (*state.tensors.items(), *state.facts["plain"].items()):
        parameter, _, key = name.rpartition("/")
        if not parameter:
            raise ValueError("the checkpoint is older than names of parameters in the optimizer's part: begin anew")
        if parameter in place:
            entries.setdefault(place[parameter], {})[key] = value
    own = [group["params"] for group in optimizer.state_dict()["param_groups"]]
    groups = [
        {k: tuple(v) if k == "betas" else v for k, v in group.items()} | {"params": params}
        for group, params in zip(state.facts["groups"], own, strict=True)
    ]
    optimizer.load_state_dict({"state": entries, "param_groups": groups})


def under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors under a prefix."""
    return {f"{prefix}{name}": tensor for name, tensor in tensors.items()}


def of(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under a prefix, without it."""
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

"""The weights of a checkpoint without its job: one process, no engine, no rank."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from merak_like.runtime.checkpoint.boxes import Held, parts, whole
from merak_like.runtime.checkpoint.folder import CheckpointError, Manifest, problem
from merak_like.runtime.checkpoint.planners import Saved


def weights_alone(path: Path, model: nn.Module, compute: torch.dtype | None = None) -> dict[str, Tensor]:
    """Every entry of the model's ``state_dict``, on the CPU, from a checkpoint in any layout.

    The model may be on the meta device and is not changed. ``compute`` is the dtype that floating tensors have in
    training (None: the model's own). Raises CheckpointError for a damaged file, ValueError for another model's.
    """
    for name, expected in sorted(Manifest.read(path).files.items()):
        if wrong := problem(path, name, expected):
            raise CheckpointError(wrong)
    saved = Saved(path)
    aliases: dict[int, list[str]] = {}
    own = model.state_dict(keep_vars=True)
    for name, tensor in own.items():
        aliases.setdefault(id(tensor), []).append(name)
    made: dict[str, Tensor] = {}
    wanted: list[Held] = []
    for names in aliases.values():
        tensor = own[names[0]]
        key = next((key for name in names if (key := f"model.{name}") in saved.entries), f"model.{names[0]}")
        dtype = saved.entries[key][1] if key in saved.entries else tensor.dtype
        room, shape = torch.empty(tensor.shape, dtype=dtype), tuple(tensor.shape)
        wanted.append(Held(key, shape, tuple(parts(room, shape, whole(shape)))))
        made.update(dict.fromkeys(names, room))
    saved.check(wanted)
    saved.read(wanted)
    cast = {id(t): t.to(compute or own[n].dtype) if t.is_floating_point() else t for n, t in made.items()}
    return {name: cast[id(tensor)] for name, tensor in made.items()}

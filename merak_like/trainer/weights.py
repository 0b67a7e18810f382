"""Weights alone, as ``from_pretrained`` has them: written as a folder, and read back by the ranks that need them."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from merak_like.runtime.engine import Engine
from merak_like.runtime.shared_rows import share


def save_weights(engine: Engine, folder: Path, extras: Sequence[Any] = ()) -> None:
    """Write the model to a folder that is there whole or not at all, or as it was. Every rank calls.

    ``extras``, such as a tokenizer, have a ``save_pretrained`` and are written beside the weights.
    """
    part = folder.with_name(f"{folder.name}.part")
    lead = engine.world.rank == 0
    if lead:
        shutil.rmtree(part, ignore_errors=True)
    engine.save_pretrained(part)
    if lead:
        for extra in extras:
            extra.save_pretrained(part)
        shutil.rmtree(folder, ignore_errors=True)
        part.rename(folder)
    engine.barrier()


@torch.no_grad()
def load_weights(engine: Engine, folder: Path) -> None:
    """Fill what this rank holds, or its part of it, from a folder of safetensors; only that is read. Every rank calls.

    The folder of a LoRA adapter has what was trained, under names without PEFT's name for the adapter. Raises
    ValueError, naming them, where tensors are missing; a tied one may be there under any of its names.
    """
    from safetensors import safe_open

    wanted = {name: tensor for name, tensor in engine.model.state_dict(keep_vars=True).items() if not tensor.is_meta}
    left: dict[int, list[str]] = {}
    replicas = engine.groups.replicas or engine.groups.sums.get(((), ()))
    adapter = (folder / "adapter_config.json").is_file()
    for name, tensor in wanted.items():
        if tensor.requires_grad or not adapter:
            left.setdefault(id(tensor), []).append(name)
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            there = set(file.keys())
            for key, aliases in list(left.items()):
                saved = [name.replace(".modules_to_save", "").replace(".default", "") for name in aliases if adapter]
                name = next((name for name in (*aliases, *saved) if name in there), None)
                if name is None:
                    continue
                into = wanted[aliases[0]]
                divided = next((alias for alias in aliases if alias in engine._shards.layouts), None)
                if isinstance(into, DTensor):
                    own, rows, _ = share(into, replicas)
                    own.copy_(file.get_slice(name)[rows])
                elif divided is None:
                    into.copy_(file.get_tensor(name))
                else:
                    engine._shards.read(divided, file.get_slice(name), into)
                del left[key]
    if left:
        missing = [aliases[0] for aliases in left.values()]
        raise ValueError(f"{folder} has no {missing[:5]} ({len(missing)} missing): is it a checkpoint of this model?")
    engine._update.adopt({name: p for name, p in engine._parameters.items() if not isinstance(p, DTensor)})

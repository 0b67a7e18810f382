"""Saving and finding what a run left: a folder ``step-N`` for each time.

The loop knows only the protocol. ``Weights`` writes what ``from_pretrained`` loads and the state of the loop, but not
the optimizer's: training cannot go on from it exactly, and is refused to.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from merak_like.runtime.engine import Engine

STATE = "trainer.json"


class Checkpointer(Protocol):
    """How a run's state gets to the disk and back. Every rank calls; a method returns when all may go on."""

    exact: bool
    """Whether training goes on from a checkpoint as if it had never stopped."""

    def save(self, folder: Path, engine: Engine, state: Mapping[str, Any]) -> None:
        """Write the engine's state and the loop's to a folder that is there whole or not at all."""
        ...

    def load(self, folder: Path, engine: Engine) -> Mapping[str, Any]:
        """Put a checkpoint's state into the engine; the loop's state."""
        ...

    def latest(self, folder: Path) -> Path | None:
        """The newest whole checkpoint in a folder."""
        ...


class Weights:
    """Weights and the loop's state, without the optimizer's."""

    exact = False

    def __init__(self, extras: Sequence[Any] = ()) -> None:
        """``extras``, such as a tokenizer, have a ``save_pretrained`` and are written beside the weights."""
        self.extras = extras

    def save(self, folder: Path, engine: Engine, state: Mapping[str, Any]) -> None:
        """Write ``folder`` under another name and rename it."""
        part = folder.with_name(f"{folder.name}.part")
        lead = engine.world.rank == 0
        if lead:
            shutil.rmtree(part, ignore_errors=True)
        engine.save_pretrained(part)
        if lead:
            for extra in self.extras:
                extra.save_pretrained(part)
            (part / STATE).write_text(json.dumps(state), encoding="utf-8")
            shutil.rmtree(folder, ignore_errors=True)
            part.rename(folder)
        engine.barrier()

    def load(self, folder: Path, engine: Engine) -> Mapping[str, Any]:
        """Copy the weights of this rank's stage into it."""
        load_weights(engine, folder)
        return json.loads((folder / STATE).read_text(encoding="utf-8"))

    def latest(self, folder: Path) -> Path | None:
        """The one with the most steps."""
        found = numbered(folder)
        return found[max(found)] if found else None


def numbered(folder: Path) -> dict[int, Path]:
    """The whole checkpoints of a folder by their step."""
    names = ((re.fullmatch(r"step-(\d+)", path.parent.name), path.parent) for path in folder.glob(f"step-*/{STATE}"))
    return {int(match[1]): path for match, path in names if match}


def set_aside(folder: Path, names: Sequence[str]) -> None:
    """Give what an earlier run left in a folder another name, so that two runs are not taken for one."""
    for name in names:
        old = folder / name
        if old.exists():
            free = next(n for n in range(1, 10**6) if not (folder / f"{old.stem}-{n}{old.suffix}").exists())
            old.rename(folder / f"{old.stem}-{free}{old.suffix}")


def forget(folder: Path, keep: int | None, best: int | None) -> None:
    """Delete all but the newest checkpoints and the best one."""
    found = numbered(folder)
    if keep is not None:
        for step in sorted(found)[:-keep]:
            if step != best:
                shutil.rmtree(found[step])


@torch.no_grad()
def load_weights(engine: Engine, folder: Path) -> None:
    """Fill what this rank holds, or its part of it, from a folder of safetensors; only that is read.

    The folder of a LoRA adapter has what was trained, under names without PEFT's name for the adapter. Raises
    ValueError, naming them, where tensors are missing; a tied one may be there under any of its names.
    """
    from safetensors import safe_open

    wanted = {name: tensor for name, tensor in engine.model.state_dict(keep_vars=True).items() if not tensor.is_meta}
    left: dict[int, list[str]] = {}
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
                if divided is None:
                    into.copy_(file.get_tensor(name))
                else:
                    engine._shards.read(divided, file.get_slice(name), into)
                del left[key]
    if left:
        missing = [aliases[0] for aliases in left.values()]
        raise ValueError(f"{folder} has no {missing[:5]} ({len(missing)} missing): is it a checkpoint of this model?")

"""How a job takes up what a checkpoint has, in whatever layout it was written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from merak_like.runtime.checkpoint.boxes import Held, Part
from merak_like.runtime.checkpoint.contents import VALUE, Contents
from merak_like.runtime.checkpoint.packing import set_random_states, unpack
from merak_like.runtime.checkpoint.planners import Saved
from merak_like.runtime.optimizer import Slot


class Restoring:
    """One rank's way back: check, read, adopt; each when all ranks are through with the one before."""

    def __init__(self, contents: Contents, saved: Saved, job: Mapping[str, Any]) -> None:
        self._contents, self._saved, self._job = contents, saved, job
        self._optimizer = contents.update.optimizer
        kinds, of = job["weights"]
        self._described = {name: unpack(kinds[index]) for name, index in of.items()}
        self._fresh: dict[nn.Parameter, dict[str, Any]] = {}

    def check(self) -> None:
        """Raise ValueError, before anything changes, unless this job can take the checkpoint up."""
        plan = self._contents.plan
        names = {name for stage in plan.stages for name in (*stage.params, *stage.buffers)}
        there = {key.removeprefix("model.") for key in self._saved.entries if key.startswith("model.")}
        if there != names:
            missing, strange = sorted(names - there), sorted(there - names)
            raise ValueError(
                f"the checkpoint is not of this {plan.model}: it lacks {missing[:3]} ({len(missing)}) and has "
                f"{strange[:3]} ({len(strange)}) that this model has not"
            )
        if self._job["seed"] != self._contents.seed:
            raise ValueError(
                f"the checkpoint's job drew its random numbers with seed={self._job['seed']}, this one has "
                f"seed={self._contents.seed}: pass seed={self._job['seed']} to go on exactly"
            )
        if self._optimizer is not None:
            mine = type(self._optimizer).__name__
            if self._job["optimizer"] != mine:
                raise ValueError(
                    f"the checkpoint has the state of {self._job['optimizer'] or 'no optimizer'}, this job trains with "
                    f"{mine}: use the same, or start from the weights alone with weights="
                )
            self._options()
        self._saved.check(self._wanted())

    @torch.no_grad()
    def read(self) -> None:
        """Read weights and buffers into their places, and the optimizer's state into places of its own."""
        self._saved.read(self._wanted())

    def adopt(self, rank: int) -> None:
        """Bring the weights into the model, and take up everything else."""
        update = self._contents.update
        update.publish()
        if self._optimizer is not None:
            self._optimizer.state.clear()
            self._optimizer.state.update({target: state for target, state in self._fresh.items() if state})
            for group, options in zip(self._optimizer.param_groups, self._options(), strict=True):
                group.update(options)
        update.guard.load_state_dict(self._job["guard"])
        self._contents.memories.adopt(self._saved.entries, lead=rank == 0)
        set_random_states(self._job["random"][rank % len(self._job["random"])])

    def _wanted(self) -> list[Held]:
        contents, entries = self._contents, self._saved.entries
        wanted = [contents.as_slot(f"model.{slot.name}", slot, slot.target) for slot in contents.update.slots]
        wanted += contents.memories.wanted(entries)
        for name, tensor in contents.others().items():
            one = contents.plain(name, tensor)
            wanted.append(one if one.key in entries else one._replace(key=f"model.{name}"))
        if self._optimizer is not None:
            for slot in contents.update.slots:
                wanted.extend(self._room(slot))
        return wanted

    def _room(self, slot: Slot) -> list[Held]:
        """Make the optimizer's state for a weight, empty; what to read into it."""
        kept: Mapping[str, tuple[Any, Any]] = self._described.get(slot.name, {"kept": {}})["kept"]
        state = self._fresh[slot.target] = {}
        wanted: list[Held] = []
        for key, (kind, where) in kept.items():
            if kind == VALUE:
                state[key] = where
                continue
            name = f"optimizer.{slot.name}.{key}"
            shape, dtype = self._saved.entries[name]
            device = slot.target.device if where else torch.device("cpu")
            made = state[key] = torch.empty(slot.target.shape if kind else shape, dtype=dtype, device=device)
            if kind:
                wanted.append(self._contents.as_slot(name, slot, made))
            else:
                wanted.append(Held(name, shape, (Part((0,) * made.dim(), made),)))
        return wanted

    def _options(self) -> list[dict[str, Any]]:
        """The options of the optimizer's groups. Raises ValueError where a group's weights come from different ones."""
        assert self._optimizer is not None
        name_of = {id(slot.target): slot.name for slot in self._contents.update.slots}
        found: list[dict[str, Any]] = []
        for number, group in enumerate(self._optimizer.param_groups):
            names = [name_of[id(target)] for target in group["params"] if id(target) in name_of]
            options = {name: self._described[name]["options"] for name in names if name in self._described}
            kinds = {repr(one): name for name, one in options.items()}
            if len(kinds) > 1:
                raise ValueError(
                    f"{' and '.join(list(kinds.values())[:2])} are in one group of the optimizer, in the checkpoint in "
                    "groups with different options: make the groups as that job did"
                )
            groups = self._job["groups"]
            other = unpack(groups[number]) if number < len(groups) else {}  # a group that has no weight on this rank
            found.append(next(iter(options.values()), other))
        return found

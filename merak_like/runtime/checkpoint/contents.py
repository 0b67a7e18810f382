"""What of a job goes into a checkpoint.

    model.NAME             the weight as the optimizer has it (in full precision), and every buffer
    replicas.DP.NAME       a buffer of another replica: batch norm's statistics differ
    optimizer.NAME.KEY     what the optimizer keeps for the weight
    memories. ...          what links remember of samples (memories.py)
    job.pt                 step, options of each weight's group, random states of each rank, the user's own state

Names are those of the user's model; nothing but memories depends on dp, pp or tp.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from merak_like.partitioner.plan import Plan
from merak_like.runtime.checkpoint.boxes import Box, Held, Part, Placement, Sizes, parts, whole
from merak_like.runtime.checkpoint.memories import Memories
from merak_like.runtime.checkpoint.packing import Pack, distinct, pack, pack_once, pack_state, random_states
from merak_like.runtime.collect import holders
from merak_like.runtime.groups import Groups
from merak_like.runtime.optimizer import Slot, Update
from merak_like.runtime.tensor_parallel.shards import WHOLE, Shards

VALUE = "value"
"""Marks what an optimizer keeps that is no tensor."""


@dataclass(frozen=True)
class Restored:
    """What a job goes on from."""

    path: Path
    step: int
    """Steps that were done."""
    state: Mapping[str, Any]
    """What was given to ``save`` as ``state``: values, and the states of objects."""
    damaged: tuple[str, ...] = ()
    """What is wrong with newer checkpoints that could not be used."""


@dataclass(frozen=True)
class Contents:
    """One rank's part of a job."""

    model: nn.Module
    plan: Plan
    groups: Groups
    update: Update
    seed: int
    trained: frozenset[str]
    """First names of the parameters of this rank's stages that are trained, by this rank or another."""
    shards: Shards = WHOLE
    links: object = None
    """Which may remember something."""

    @cached_property
    def memories(self) -> Memories:
        """What the links remember."""
        return Memories(self.links, self.plan, self.groups)

    def place(self, name: str, shape: Sizes) -> Placement:
        """Where this rank's tensor of that shape lies in the whole."""
        return placement_of(self.shards, name, shape)

    # --- tensors -------------------------------------------------------------------------------------------------

    def written(self) -> list[Held]:
        """The tensors that this rank writes. What several ranks hold is shared out among the replicas."""
        held = [one for slot in self.update.slots if self._writes(slot.name, slot) for one in self._of_slot(slot)]
        held += [self.plain(name, tensor) for name, tensor in self.others().items() if self._writes(name)]
        return held + self.memories.written()

    def _writes(self, name: str, slot: Slot | None = None) -> bool:
        coord = self.groups.coord
        if coord.tp and name not in self.shards.layouts:
            return False
        if slot is not None and slot.run is not None:
            return slot.counted
        on, number = self._held[name]
        return on == coord.pp and (name in self.buffers or number % self.plan.mesh.dp == coord.dp)

    @cached_property
    def _held(self) -> dict[str, tuple[int, int]]:
        """Name to the pipeline rank that answers for it, and its number among all."""
        return {name: (rank, number) for number, (name, rank) in enumerate(holders(self.plan).items())}

    @cached_property
    def buffers(self) -> frozenset[str]:
        """What changes in a forward."""
        return frozenset(name for stage in self.plan.stages for name in stage.buffers)

    def others(self) -> dict[str, Tensor]:
        """What the optimizer does not have: frozen parameters and buffers of this rank's stages."""
        own = {n for stage in self.plan.stages if stage.rank == self.groups.coord.pp
               for n in (*stage.params, *stage.buffers)}  # fmt: skip
        named = dict(self.model.named_parameters(remove_duplicate=False))
        named |= dict(self.model.named_buffers(remove_duplicate=False))
        return {name: named[name].detach() for name in sorted(own - self.trained) if name in named}

    def key(self, name: str) -> str:
        """Under which a tensor is kept that the optimizer does not have."""
        replica = self.groups.coord.dp
        return f"replicas.{replica}.{name}" if replica and name in self.buffers else f"model.{name}"

    def plain(self, name: str, tensor: Tensor) -> Held:
        shape = tuple(tensor.shape)
        placement = self.place(name, shape)
        return Held(self.key(name), placement.shape, tuple(parts(tensor, shape, placement)))

    def as_slot(self, key: str, slot: Slot, tensor: Tensor) -> Held:
        placement = self.place(slot.name, slot.shape)
        return Held(key, placement.shape, tuple(parts(tensor.detach(), slot.shape, placement, slot.run)))

    def _of_slot(self, slot: Slot) -> list[Held]:
        held = [self.as_slot(f"model.{slot.name}", slot, slot.target)]
        for key, value in self._kept(slot).items():
            if not isinstance(value, Tensor):
                continue
            name = f"optimizer.{slot.name}.{key}"
            if value.shape == slot.target.shape:
                held.append(self.as_slot(name, slot, value))
                continue
            placement = self.place(slot.name, slot.shape)
            if value.numel() > 1 and (slot.run is not None or placement != whole(slot.shape)):
                raise ValueError(
                    f"{type(self.update.optimizer).__name__} keeps {key} of shape {tuple(value.shape)} for a share of "
                    f"{slot.name}: what has not the shape of the weight cannot be saved from shares (tp, zero)"
                )
            if slot.run is None or slot.run[0] == 0:
                held.append(Held(name, tuple(value.shape), (Part((0,) * value.dim(), value),)))
        return held

    def _kept(self, slot: Slot) -> Mapping[str, Any]:
        optimizer = self.update.optimizer
        return optimizer.state.get(slot.target, {}) if optimizer is not None else {}

    # --- the rest ------------------------------------------------------------------------------------------------

    def facts(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """What this rank tells the one that writes ``job.pt``."""
        groups = self.update.optimizer.param_groups if self.update.optimizer is not None else []
        options = [{k: v for k, v in group.items() if k != "params"} for group in groups]
        of = {id(target): i for i, group in enumerate(groups) for target in group["params"]}
        packs: dict[str, Pack] = {}
        seen: dict[bytes, Pack] = {}
        for slot in self.update.slots:
            if id(slot.target) in of:
                described = {"options": options[of[id(slot.target)]], "kept": self._described(slot)}
                packs[slot.name] = pack_once(f"what the optimizer keeps for {slot.name}", described, seen)
        return {
            "optimizer": type(self.update.optimizer).__name__ if self.update.optimizer is not None else None,
            "groups": [pack("the options of the optimizer", one) for one in options],
            "weights": distinct(packs),
            "random": random_states(),
            "state": pack_state(state),
            "guard": self.update.guard.state_dict(),
            "seed": self.seed,
        }

    def _described(self, slot: Slot) -> dict[str, Any]:
        """For each key: a value, or whether a tensor is like the weight and whether it is on the weight's device."""
        return {
            key: (value.shape == slot.target.shape, value.device == slot.target.device)
            if isinstance(value, Tensor)
            else (VALUE, value)
            for key, value in self._kept(slot).items()
        }

    @staticmethod
    def joined(facts: Sequence[Mapping[str, Any]], step: int) -> dict[str, Any]:
        """``job.pt``, from what all ranks told."""
        packs: dict[str, Pack] = {}
        for one in facts:
            kinds, of = one["weights"]
            packs.update({name: kinds[index] for name, index in of.items()})
        return {
            "step": step,
            "optimizer": next((one["optimizer"] for one in facts if one["optimizer"]), None),
            "groups": max((one["groups"] for one in facts), key=len),
            "weights": distinct(packs),
            "random": [one["random"] for one in facts],
            "state": {key: data for one in reversed(facts) for key, data in one["state"].items()},
            "guard": facts[0]["guard"],
            "seed": facts[0]["seed"],
        }


def placement_of(shards: Shards, name: str, shape: Sizes) -> Placement:
    """Where a tensor-parallel rank's tensor lies in the whole."""
    if name not in shards.layouts:
        return whole(shape)
    blocks = tuple((_box(mine), _box(at).start) for mine, at in shards.blocks(name))
    return Placement(shards.whole_shape(name, shape), blocks)


def _box(slices: Sequence[slice]) -> Box:
    return Box(tuple(s.start for s in slices), tuple(s.stop - s.start for s in slices))

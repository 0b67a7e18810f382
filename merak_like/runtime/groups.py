"""From the mesh to process groups: the only caller of ``new_group``."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist

from merak_like.partitioner.mesh import Coord, Mesh
from merak_like.runtime.initialize import World

Group = Any
"""A process group of torch.distributed; None where this rank would be alone in it."""


@dataclass(frozen=True)
class Groups:
    """The groups this rank is in."""

    mesh: Mesh
    coord: Coord
    stage_rank: tuple[int, ...]
    """The pipeline rank that runs each stage."""
    dp: Group = None
    """The replicas of this stage."""
    up: Group = None
    """For transfers to a higher rank: NCCL orders a pair of ranks per communicator, so each direction has its own."""
    down: Group = None
    """For transfers to a lower rank."""
    shared: Mapping[tuple[int, ...], Group] = field(default_factory=dict[tuple[int, ...], Group])
    """Stages that hold the same parameters, over all replicas."""
    made: tuple[Group, ...] = ()

    def rank_of(self, stage: int) -> int:
        """The global rank that runs a stage of this replica."""
        return self.mesh.rank(Coord(self.coord.dp, self.stage_rank[stage], self.coord.tp))

    def towards(self, stage: int) -> Group:
        """The group for transfers to the rank of a stage."""
        return self.up if self.stage_rank[stage] > self.coord.pp else self.down

    def from_(self, stage: int) -> Group:
        """The group for transfers from the rank of a stage."""
        return self.down if self.stage_rank[stage] > self.coord.pp else self.up

    def close(self) -> None:
        """Give the groups back."""
        for group in self.made:
            dist.destroy_process_group(group)


def make_groups(mesh: Mesh, world: World, stage_rank: tuple[int, ...], shared: Collection[tuple[int, ...]]) -> Groups:
    """Make every group of the mesh, in the same order on every rank, and keep this rank's.

    ``stage_rank`` is the pipeline rank of each stage; ``shared`` are the sets of stages that hold the same parameters.
    """
    coord = mesh.coord(world.rank)
    made: list[Group] = []

    def group(ranks: list[int]) -> Group:
        if len(ranks) < 2:
            return None
        new = dist.new_group(ranks, timeout=world.timeout)
        if world.rank not in ranks:
            return None
        made.append(new)
        return new

    def replicas(pp: int, tp: int) -> list[int]:
        return [mesh.rank(Coord(dp, pp, tp)) for dp in range(mesh.dp)]

    own_dp = own_up = own_down = None
    for pp in range(mesh.pp):
        for tp in range(mesh.tp):
            found = group(replicas(pp, tp))
            own_dp = found or own_dp
    for dp in range(mesh.dp):
        for tp in range(mesh.tp):
            line = [mesh.rank(Coord(dp, pp, tp)) for pp in range(mesh.pp)]
            up, down = group(line), group(line)
            own_up, own_down = up or own_up, down or own_down
    own_shared: dict[tuple[int, ...], Group] = {}
    for stages in sorted(set(shared)):
        for tp in range(mesh.tp):
            found = group(sorted({rank for stage in stages for rank in replicas(stage_rank[stage], tp)}))
            if found is not None:
                own_shared[stages] = found
    return Groups(mesh, coord, stage_rank, own_dp, own_up, own_down, own_shared, tuple(made))


def files_group(world: World) -> Group:
    """All ranks once more, on the CPU: what they tell each other about files never gets between the training's tensors.

    The caller gives it back.
    """
    return dist.new_group(timeout=world.timeout, backend="gloo")

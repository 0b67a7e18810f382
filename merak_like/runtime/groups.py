"""From the mesh to process groups: the only caller of ``new_group``."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist

from merak_like.partitioner.mesh import Coord, Mesh
from merak_like.runtime.initialize import World

Group = Any
"""A process group of torch.distributed; None where this rank would be alone in it."""
Span = tuple[int, int]
"""(degree, repeat): tensor-parallel ranks that differ in ``tp // repeat % degree`` only."""
Sum = tuple[tuple[int, ...], tuple[Span, ...]]
"""Over which ranks a gradient is summed, replicas apart: these stages (none: the rank's own), these spans of tp."""


@dataclass(frozen=True)
class Groups:
    """The groups this rank is in."""

    mesh: Mesh
    coord: Coord
    stage_rank: tuple[int, ...]
    """The pipeline rank that runs each stage."""
    sums: Mapping[Sum, Group] = field(default_factory=dict["Sum", Group])
    """The ranks that hold the same parameters and add up their gradients."""
    tensor: Mapping[Span, Group] = field(default_factory=dict["Span", Group])
    """The tensor-parallel ranks of this stage and replica, or some of them."""
    up: Group = None
    """For transfers to a higher rank: NCCL orders a pair of ranks per communicator, so each direction has its own."""
    down: Group = None
    """For transfers to a lower rank."""
    replicas: Group = None
    """The ranks with this stage and shard, if it was asked for: then it is there for a rank alone, too."""
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


def make_groups(
    mesh: Mesh, world: World, stage_rank: tuple[int, ...], sums: Collection[Sum], spans: Collection[Span],
    *, replicas: bool = False,
) -> Groups:  # fmt: skip
    """Make every group of the mesh, in the same order on every rank, and keep this rank's.

    ``stage_rank`` is the pipeline rank of each stage; ``sums`` tells which gradients are added up over which ranks,
    ``spans`` which tensor-parallel ranks talk. ``replicas`` asks for a group that is never None.
    """
    coord = mesh.coord(world.rank)
    made: list[Group] = []

    def group(ranks: Collection[int], least: int = 2) -> Group:
        if len(ranks) < least:
            return None
        new = dist.new_group(sorted(ranks), timeout=world.timeout)
        if world.rank not in ranks:
            return None
        made.append(new)
        return new

    def each(sets: Iterable[frozenset[int]], least: int = 2) -> Group:
        """This rank's of disjoint sets of ranks."""
        found = [group(ranks, least) for ranks in dict.fromkeys(sets)]
        return next((one for one in found if one is not None), None)

    def line(at: Coord) -> frozenset[int]:
        return frozenset(mesh.rank(at._replace(pp=pp)) for pp in range(mesh.pp))

    def adding(at: Coord, stages: tuple[int, ...], over: tuple[Span, ...]) -> frozenset[int]:
        places = {stage_rank[stage] for stage in stages} or {at.pp}
        shards = spanned(at.tp, over)
        return frozenset(mesh.rank(Coord(dp, pp, tp)) for dp in range(mesh.dp) for pp in places for tp in shards)

    everywhere = [mesh.coord(rank) for rank in range(mesh.size)]
    # Sums go over all replicas and lines over all stages: the sets of the first ones are all there are, in order.
    one_replica, one_stage = ([at for at in everywhere if not at[axis]] for axis in (0, 1))
    own_sums = dict[Sum, Group]()
    for stages, over in sorted(set(sums)):
        concerned = [at for at in one_replica if not stages or at.pp in {stage_rank[s] for s in stages}]
        own_sums[stages, over] = each(adding(at, stages, over) for at in concerned)
    up = each(line(at) for at in one_stage)
    down = each(line(at) for at in one_stage)
    own_tensor = {
        span: each(frozenset(mesh.rank(at._replace(tp=tp)) for tp in spanned(at.tp, (span,))) for at in everywhere)
        for span in sorted(set(spans))
    }
    own_replicas = each((adding(at, (), ()) for at in one_replica), least=1) if replicas else None
    return Groups(mesh, coord, stage_rank, own_sums, own_tensor, up, down, own_replicas, tuple(made))


def spanned(tp: int, spans: Iterable[Span]) -> frozenset[int]:
    """The tensor-parallel ranks that one reaches along some spans."""
    found = {tp}
    for degree, repeat in spans:
        found = {t - (t // repeat % degree - i) * repeat for t in found for i in range(degree)}
    return frozenset(found)


def files_group(world: World, ranks: Collection[int] | None = None) -> Group:
    """All ranks once more, or some, on the CPU: what they tell each other never gets between the training's tensors.

    Every rank of the world calls it; one that is not in the group gets None. The caller gives it back.
    """
    found = dist.new_group(ranks and sorted(ranks), timeout=world.timeout, backend="gloo")
    return found if ranks is None or world.rank in ranks else None

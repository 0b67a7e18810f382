"""The dry run of a whole job: which ranks are run, and the proof from what they did."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from merak_like.partitioner.mesh import Coord
from merak_like.partitioner.plan import Plan
from merak_like.partitioner.tracer import LossFn
from merak_like.runtime.dry_run.alike import same, share_of
from merak_like.runtime.dry_run.proof import Proof, prove
from merak_like.runtime.dry_run.rank import Cast, Did

ALL = 64
"""Up to so many ranks, every rank is run."""
GROUPED = 32
"""Of other replicas, so many at most have a rank that makes its groups."""


def dry_run(
    plan: Plan, model: nn.Module, example: Any, loss_fn: LossFn | None = None, *, all_ranks: bool | None = None
) -> Proof:
    """Run a step of a plan at its full size in this process, and check what the ranks did against each other.

    ``example`` is a batch of at least one micro-batch. Of the first replica the first and the last rank of each
    tensor-parallel group are run, and if they do the same on their parts, those between make their groups only. Of the
    last replica the first and last rank are run; of others (up to ``GROUPED``) one makes its groups. ``all_ranks`` runs
    all of them, which is the default up to ``ALL``. No weight is allocated and nothing is sent.

    Raises ValueError where the plan is not one of this model and micro-batch, and for a process that is a rank already.
    """
    mesh = plan.mesh
    cast = Cast(plan, model, example, loss_fn)
    every = mesh.size <= ALL if all_ranks is None else all_ranks
    first = [rank for rank in range(mesh.size) if mesh.coord(rank).dp == 0]
    ends = {mesh.rank(Coord(mesh.dp - 1, pp, mesh.tp - 1 if pp else 0)) for pp in (0, mesh.pp - 1)} - set(first)
    inner = [rank for rank in first if 0 < mesh.coord(rank).tp < mesh.tp - 1]
    run = range(mesh.size) if every else [*(rank for rank in first if rank not in inner), *sorted(ends)]
    replicas = range(1, mesh.dp)[:: max(1, (mesh.dp - 2) // GROUPED + 1)]
    between = [] if every else [mesh.rank(Coord(dp, dp % mesh.pp, 0)) for dp in replicas]
    with cast():
        acted = {rank: cast.act(rank) for rank in run}
        alike: list[Did] = []
        for rank in () if every else inner:
            found = _alike(cast, acted, rank)
            if found is None:
                acted[rank] = cast.act(rank)
            else:
                alike.append(found)
    grouped = [cast.groups_of(rank) for rank in between if rank not in ends]
    return prove(mesh, list(acted.values()), grouped, alike)


def _alike(cast: Cast, acted: Mapping[int, Did], rank: int) -> Did | None:
    """What a rank between the first and last of its tensor-parallel group does; None if these do not do the same."""
    mesh = cast.plan.mesh
    first, last = (acted[mesh.rank(mesh.coord(rank)._replace(tp=tp))] for tp in (0, mesh.tp - 1))
    expected = share_of(mesh, first, last)
    if expected is None or not same(expected, last):
        return None
    return share_of(mesh, first, cast.groups_of(rank))

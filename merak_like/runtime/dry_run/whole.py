"""The dry run of a whole job: which ranks are run, and the proof from what they did."""

from __future__ import annotations

from typing import Any

from torch import nn

from merak_like.partitioner.mesh import Coord
from merak_like.partitioner.plan import Plan
from merak_like.partitioner.tracer import LossFn
from merak_like.runtime.dry_run.proof import Proof, prove
from merak_like.runtime.dry_run.rank import Cast

ALL = 64
"""Up to so many ranks, every rank is run."""
GROUPED = 32
"""Of other replicas, so many at most have a rank that makes its groups."""


def dry_run(
    plan: Plan, model: nn.Module, example: Any, loss_fn: LossFn | None = None, *, all_ranks: bool | None = None
) -> Proof:
    """Run a step of a plan at its full size in this process, and check what the ranks did against each other.

    ``example`` is a batch of at least one micro-batch. Every rank of the first replica is run, and of the last replica
    its first and last; of others (up to ``GROUPED``) one rank makes its groups. ``all_ranks`` runs all of them, which
    is the default up to ``ALL``. No weight is allocated and nothing is sent.

    Raises ValueError where the plan is not one of this model and micro-batch, and for a process that is a rank already.
    """
    mesh = plan.mesh
    cast = Cast(plan, model, example, loss_fn)
    every = mesh.size <= ALL if all_ranks is None else all_ranks
    first = [rank for rank in range(mesh.size) if mesh.coord(rank).dp == 0]
    ends = {mesh.rank(Coord(mesh.dp - 1, pp, mesh.tp - 1 if pp else 0)) for pp in (0, mesh.pp - 1)} - set(first)
    run = range(mesh.size) if every else [*first, *sorted(ends)]
    replicas = range(1, mesh.dp)[:: max(1, (mesh.dp - 2) // GROUPED + 1)]
    between = [] if every else [mesh.rank(Coord(dp, dp % mesh.pp, 0)) for dp in replicas]
    with cast():
        acted = [cast.act(rank) for rank in run]
    grouped = [cast.groups_of(rank) for rank in between if rank not in ends]
    return prove(mesh, acted, grouped)

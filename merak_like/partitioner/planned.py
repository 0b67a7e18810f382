"""What a plan says about time: its schedule, as the engine carries it out and the simulator times it."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from merak_like.partitioner.coding import Coding, coded
from merak_like.partitioner.hardware import PRESETS, Hardware
from merak_like.partitioner.placement import hop
from merak_like.partitioner.plan import Plan
from merak_like.partitioner.schedules import AUTO, AUTO_V, data_builder
from merak_like.partitioner.schedules.action import Action, Edges, Kind, Schedule, chain
from merak_like.partitioner.schedules.interleaved import interleaved
from merak_like.partitioner.simulator import Costs, StageCosts


def schedule_of(plan: Plan) -> Schedule:
    """The compute-only schedule of a plan: the orders it holds, or those its schedule's name stands for.

    Raises ValueError where the plan's stages do not fit its schedule.
    """
    recomputes = frozenset(stage.index for stage in plan.stages if stage.recompute)
    if plan.orders:
        orders = tuple(tuple(map(Action.parse, line.split())) for line in plan.orders)
        made = Schedule(len(plan.stages), plan.micro_batches, orders, plan.stage_rank)
    else:
        made = named_schedule(plan.schedule, plan.mesh.pp, plan.micro_batches, len(plan.stages) // plan.mesh.pp)
    if made.stage_rank != plan.stage_rank or made.ranks != plan.mesh.pp:
        raise ValueError(
            f"schedule {plan.schedule!r} runs {made.stages} stages on the ranks {made.stage_rank}, "
            f"but the plan has {len(plan.stages)} on {plan.stage_rank} of {plan.mesh.pp}: make the plan again"
        )
    return recomputing(made, recomputes)


def costs_of(plan: Plan) -> Costs:
    """The seconds of a plan's stages, and of the transfers between its ranks; bytes are not in the plan.

    Where neither the plan nor a preset says how fast the links are, transfers take no time.
    """
    nbytes: dict[tuple[int, int], int] = {}
    for crossing in plan.crossings:
        for target in crossing.targets:
            nbytes[crossing.source, target] = nbytes.get((crossing.source, target), 0) + crossing.nbytes
    hardware, mesh, rank = hardware_of(plan), plan.mesh, plan.stage_rank
    hops: dict[tuple[int, int], float] = {}
    for (source, target), size in nbytes.items():
        if hardware is not None and rank[source] != rank[target]:
            link = hop(mesh, hardware, rank[source], rank[target])
            hops[source, target] = coded(link, coding_in(plan), hardware).seconds(size)
    beside = calling(hops, len(plan.stages), hardware.message_seconds if hardware is not None else 0.0)
    stages = tuple(
        StageCosts(s.forward_seconds + more, max(s.backward_seconds - s.weight_seconds, 0.0) + more,
                   s.recompute_seconds, s.weight_seconds)
        for s, more in zip(plan.stages, beside, strict=True)
    )  # fmt: skip
    return Costs(stages, hops)


def calling(hops: Collection[tuple[int, int]], stages: int, seconds: float) -> list[float]:
    """What each stage's host spends around a pass on its transfers from or to other ranks, ``seconds`` on each."""
    return [seconds * sum(stage in ends for ends in hops) for stage in range(stages)]


def hardware_of(plan: Plan) -> Hardware | None:
    """The hardware that a plan was made for, by what it holds or by its name; None for one that is not known."""
    return plan.basis.hardware if plan.basis is not None else PRESETS.get(plan.hardware)


def coding_in(plan: Plan) -> Coding | None:
    """The codec between stages that a plan counts on, where it holds what it was made from."""
    return plan.basis.options.get("coding") if plan.basis is not None else None


def edges_of(plan: Plan) -> Edges:
    """The stages that a plan's values go between, and neighbours, which always wait for each other."""
    return frozenset((c.source, t) for c in plan.crossings for t in c.targets) | chain(len(plan.stages))


def named_schedule(name: str, ranks: int, micro_batches: int, chunks: int) -> Schedule:
    """The schedule of a name; ``chunks`` are the stages per rank of an interleaved one.

    Raises ValueError for a schedule nobody knows or that needs costs.
    """
    if name in (AUTO, AUTO_V):
        raise ValueError(f"schedule {name!r} is built for its costs, but the plan holds no orders: make the plan again")
    build = data_builder(name)
    return interleaved(ranks, micro_batches, chunks) if build is interleaved else build(ranks, micro_batches)


def recomputing(schedule: Schedule, stages: Collection[int]) -> Schedule:
    """The schedule where these stages, and no others, recompute: in an R where it has one, else inside their B."""
    orders = tuple(tuple(a for a in order if a.kind is not Kind.R or a.stage in stages) for order in schedule.orders)
    return replace(schedule, orders=orders, recomputes=frozenset(stages))

"""One schedule on one pipeline, simulated: what `merak simulate` compares and `merak timeline` draws.

Costs are those of a rank. A schedule that gives a rank several stages cuts them into equal parts.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from math import ceil, floor

from merak_like.partitioner.plan import Plan
from merak_like.partitioner.planned import costs_of, edges_of, named_schedule, recomputing, schedule_of
from merak_like.partitioner.schedules import AS_DATA, AUTO, AUTO_V
from merak_like.partitioner.schedules.action import Edges, Schedule, chain
from merak_like.partitioner.schedules.auto.build import Found, auto
from merak_like.partitioner.schedules.scp import LADDER
from merak_like.partitioner.schedules.v_shape import v_stage_rank
from merak_like.partitioner.simulator import Costs, StageCosts, Timeline, simulate

NAMES = (*AS_DATA, AUTO, AUTO_V)


@dataclass(frozen=True)
class Pipeline:
    """Ranks with costs: transfers along `edges`, memory as live micro-batches per rank."""

    costs: Costs
    micro_batches: int
    edges: Edges
    live: tuple[int, ...] | None = None
    recomputes: frozenset[int] | None = None
    """Ranks that recompute; by default where it costs something, and for `auto` and `auto-v` not in the last stage."""
    chunks: int = 2
    """Stages per rank of an interleaved schedule."""
    plan: Plan | None = None
    """Where it comes from: the plan's own schedule is simulated with the plan's own stages."""

    @property
    def ranks(self) -> int:
        """Pipeline ranks."""
        return len(self.costs.stages)


@dataclass(frozen=True)
class Trial:
    """A schedule and its timeline; peak_live counts micro-batches on a rank, a stage of a rank as its part of one."""

    name: str
    schedule: Schedule
    costs: Costs
    edges: Edges
    timeline: Timeline
    peak_live: tuple[float, ...]
    found: Found | None = None

    def too_full(self, live: Sequence[int] | None) -> int | None:
        """Return the first rank that holds more than it may."""
        return next((r for r, peak in enumerate(self.peak_live) if live is not None and peak > live[r]), None)


def try_out(name: str, pipeline: Pipeline) -> Trial:
    """Build the schedule of that name and simulate it, whether or not it fits the memory (`auto` always does)."""
    costs, ranks, edges, found = pipeline.costs, pipeline.ranks, pipeline.edges, None
    plan = pipeline.plan
    default = frozenset(stage for stage, cost in enumerate(costs.stages) if cost.recompute > 0)
    if plan is not None and name == plan.schedule:
        schedule, costs, edges = schedule_of(plan), costs_of(plan), edges_of(plan)
    elif name in (AUTO, AUTO_V):
        stage_rank = tuple(range(ranks)) if name == AUTO else v_stage_rank(ranks)
        parts, stages = len(stage_rank) // ranks, len(stage_rank)
        if parts > 1:
            costs, edges = spread(costs, stage_rank), chain(stages)
        among = default if pipeline.recomputes is None else pipeline.recomputes
        found = auto(
            costs,
            pipeline.micro_batches,
            stage_rank=stage_rank,
            edges=edges,
            live=None if pipeline.live is None else [parts * count for count in pipeline.live],
            recomputes=[
                stage
                for stage, rank in enumerate(stage_rank)
                if rank in among and (stage < stages - 1 or pipeline.recomputes is not None)
            ],
        )
        schedule = found.schedule
    else:
        schedule = _named(name, pipeline, default if pipeline.recomputes is None else pipeline.recomputes)
        if schedule.stages != ranks:
            costs, edges = spread(costs, schedule.stage_rank), chain(schedule.stages)
    timeline = simulate(schedule, costs, edges)
    parts = schedule.stages // ranks
    counted = replace(
        costs, stages=tuple(replace(c, activation_bytes=1, kept_bytes=None, weight_bytes=None) for c in costs.stages)
    )
    peak = tuple(held / parts for held in simulate(schedule, counted, edges).rank_peak_bytes)
    return Trial(name, schedule, costs, edges, timeline, peak, found)


def _named(name: str, pipeline: Pipeline, recomputes: Collection[int]) -> Schedule:
    schedule = named_schedule(name, pipeline.ranks, pipeline.micro_batches, pipeline.chunks)
    again = {stage for stage, rank in enumerate(schedule.stage_rank) if rank in recomputes}
    return recomputing(schedule, again & schedule.recomputes if name in LADDER else again)


def spread(costs: Costs, stage_rank: Sequence[int]) -> Costs:
    """Return costs of stages that are equal parts of their ranks; ranks that are no neighbours have the slowest hop."""
    parts = len(stage_rank) // len(costs.stages)
    stages = tuple(_part(costs.stages[rank], parts) for rank in stage_rank)
    slowest = max(costs.transfer.values(), default=0.0)
    hops = {
        (s, s + 1): costs.transfer.get((min(a, b), max(a, b)), slowest)
        for s, (a, b) in enumerate(pairwise(stage_rank))
        if a != b
    }
    return Costs(stages, hops)


def _part(cost: StageCosts, parts: int) -> StageCosts:
    return StageCosts(
        cost.forward / parts, cost.backward / parts, cost.recompute / parts, cost.weight / parts,
        cost.activation_bytes // parts,
    )  # fmt: skip


def pipeline_of(plan: Plan) -> Pipeline:
    """Return the ranks of a plan with what their stages cost together, its links and its memory.

    Under another schedule, those ranks recompute that do so in the plan.
    """
    costs, edges, rank = costs_of(plan), edges_of(plan), plan.stage_rank
    ranks = tuple(
        _together([c for c, of in zip(costs.stages, rank, strict=True) if of == r]) for r in range(plan.mesh.pp)
    )
    hops: dict[tuple[int, int], float] = {}
    for (source, target), seconds in costs.transfer.items():
        pair = min(rank[source], rank[target]), max(rank[source], rank[target])
        hops[pair] = max(hops.get(pair, 0.0), seconds)
    between = ((rank[source], rank[target]) for source, target in edges)
    near = frozenset((min(pair), max(pair)) for pair in between if pair[0] != pair[1])
    return Pipeline(
        Costs(ranks, hops),
        plan.micro_batches,
        near | chain(plan.mesh.pp),
        _live(plan),
        frozenset(stage.rank for stage in plan.stages if stage.recompute),
        max(len(plan.stages) // plan.mesh.pp, 2),
        plan,
    )


def _together(costs: Sequence[StageCosts]) -> StageCosts:
    return StageCosts(
        sum(c.forward for c in costs), sum(c.backward for c in costs), sum(c.recompute for c in costs),
        sum(c.weight for c in costs),
    )  # fmt: skip


def _live(plan: Plan) -> tuple[int, ...]:
    """Micro-batches that each rank has room for, a stage of it counted as its part of one; at least as planned."""
    found: list[int] = []
    for rank, nbytes in enumerate(plan.rank_bytes):
        own = [stage for stage in plan.stages if stage.rank == rank]
        each = sum(stage.memory.live / max(1, stage.live_micro_batches) for stage in own)
        room = plan.memory_limit - nbytes + plan.rank_activation_bytes[rank]
        planned = ceil(sum(stage.live_micro_batches for stage in own) / len(own))
        found.append(max(planned, min(plan.micro_batches, floor(room / each)) if each else plan.micro_batches))
    return tuple(found)

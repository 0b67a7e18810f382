"""One schedule on one pipeline, simulated: what `merak simulate` compares and `merak timeline` draws.

Costs are those of a rank. A schedule that gives a rank several stages cuts them into equal parts.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from math import floor

from merak_like.partitioner.hardware import PRESETS
from merak_like.partitioner.mesh import Coord
from merak_like.partitioner.plan import Plan
from merak_like.partitioner.schedules import AS_DATA, AUTO, AUTO_V, data_builder
from merak_like.partitioner.schedules.action import Edges, Kind, Schedule, chain
from merak_like.partitioner.schedules.auto.build import Found, auto
from merak_like.partitioner.schedules.interleaved import interleaved
from merak_like.partitioner.schedules.scp import LADDER, recompute
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
    default = frozenset(stage for stage, cost in enumerate(costs.stages) if cost.recompute > 0)
    if name in (AUTO, AUTO_V):
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
    ranks, micro_batches = pipeline.ranks, pipeline.micro_batches
    build = data_builder(name)
    if build is interleaved:
        schedule = interleaved(ranks, micro_batches, pipeline.chunks)
    else:
        schedule = build(ranks, micro_batches)
    if name in LADDER:
        kept = frozenset(recomputes)
        orders = tuple(tuple(a for a in o if a.kind is not Kind.R or a.stage in kept) for o in schedule.orders)
        return replace(schedule, orders=orders, recomputes=schedule.recomputes & kept)
    return recompute(schedule, [stage for stage, rank in enumerate(schedule.stage_rank) if rank in recomputes])


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
    """Return the pipeline that a plan cuts: its costs, half of each backward for the weights; its links; its memory.

    A plan whose hardware is no preset does not say how fast its links are: transfers then take no time.
    """
    stages = tuple(
        StageCosts(s.forward_seconds, s.backward_seconds / 2, weight=s.backward_seconds / 2) for s in plan.stages
    )
    nbytes: dict[tuple[int, int], int] = {}
    for crossing in plan.crossings:
        for target in crossing.targets:
            nbytes[crossing.source, target] = nbytes.get((crossing.source, target), 0) + crossing.nbytes
    hardware, mesh = PRESETS.get(plan.hardware), plan.mesh
    hops: dict[tuple[int, int], float] = {}
    for (source, target), size in nbytes.items():
        if hardware is not None:
            pairs = [[mesh.rank(Coord(dp, stage, 0)) for stage in (source, target)] for dp in range(mesh.dp)]
            hops[source, target] = max(hardware.link(*pair).seconds(size) for pair in pairs)
    live: list[int] = []
    for stage in plan.stages:
        memory = stage.memory
        each = (memory.activations + memory.boundary) / max(1, stage.live_micro_batches)
        room = plan.memory_limit - (memory.total - memory.activations - memory.boundary)
        live.append(
            max(stage.live_micro_batches, min(plan.micro_batches, floor(room / each)) if each else plan.micro_batches)
        )
    return Pipeline(Costs(stages, hops), plan.micro_batches, frozenset(nbytes) | chain(len(stages)), tuple(live))

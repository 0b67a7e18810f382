"""Writing down what was decided: graph and stage starts become a plan, and a plan is checked against its graph."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from merak_like.partitioner.after import after_seconds
from merak_like.partitioner.blocks import Piece
from merak_like.partitioner.cost import Cost
from merak_like.partitioner.cuts import crossings
from merak_like.partitioner.graph import ProxyGraph
from merak_like.partitioner.job import STAND_IN
from merak_like.partitioner.judge import Judged
from merak_like.partitioner.locality import held_by, residents
from merak_like.partitioner.plan import Plan, StageMemory, StagePlan, Unit
from merak_like.partitioner.problem import Problem
from merak_like.partitioner.schedules.action import Schedule
from merak_like.partitioner.sharding import ShardedBlock
from merak_like.partitioner.software import TORCH, Software


@dataclass(frozen=True)
class Setting:
    """A problem, and what it was made from."""

    problem: Problem
    costs: tuple[Cost, ...]
    pieces: tuple[Piece, ...]
    scale: float
    """Samples per micro-batch over samples traced."""
    zero: int = 0
    sequence_parallel: bool = False
    software: Software = TORCH


def assemble(
    graph: ProxyGraph,
    setting: Setting,
    found: Sequence[int],
    judged: Judged,
    *,
    micro_batch: int,
    signature: Mapping[str, str],
    sharding: Sequence[ShardedBlock],
    notes: Sequence[str],
) -> Plan:
    """The plan of a partition, given by its segments."""
    job, costs, timeline = setting.problem.job, setting.costs, judged.timeline
    starts = tuple(int(setting.problem.positions[start]) for start in found)
    made = _units(graph, costs, setting.pieces, starts)
    name_of = {(unit.first, unit.stop): unit.name for unit in made}
    needs = residents(graph)
    memories, rank_activations = _opened(judged)
    stages: list[StagePlan] = []
    for index, (start, stop) in enumerate(pairwise(starts)):
        held = [graph.parameter(name) for name in held_by(needs, start, stop)]
        stages.append(
            StagePlan(
                index=index,
                rank=judged.schedule.stage_rank[index],
                start=start,
                stop=stop,
                blocks=tuple(dict.fromkeys(unit.block for unit in made if unit.stage == index)),
                params=tuple(p.name for p in held if not p.buffer),
                buffers=tuple(p.name for p in held if p.buffer),
                param_count=sum(p.numel for p in held if not p.buffer),
                flops=round(sum(op.flops for op in graph.ops[start:stop]) * setting.scale),
                forward_seconds=sum(cost.forward_seconds for cost in costs[start:stop]),
                backward_seconds=sum(cost.backward_seconds for cost in costs[start:stop]),
                weight_seconds=sum(cost.weight_seconds for cost in costs[start:stop]),
                recompute_seconds=judged.costs.stages[index].recompute,
                live_micro_batches=timeline.peak_live[index],
                recompute=tuple(name_of[unit] for unit in judged.recompute[index]),
                memory=memories[index],
            )
        )
    plan = Plan(
        model=graph.model,
        mesh=job.mesh,
        schedule=job.schedule,
        orders=written(judged.schedule) if job.schedule in STAND_IN else (),
        micro_batches=job.micro_batches,
        micro_batch=micro_batch,
        stages=tuple(stages),
        crossings=crossings(graph, starts),
        units=made,
        ties=graph.ties,
        shared=shared_parameters(stages),
        hardware=job.hardware.name,
        memory_limit=job.memory_limit,
        rank_activation_bytes=rank_activations,
        pipeline_seconds=timeline.makespan,
        after=after_seconds(
            job.mesh,
            job.hardware,
            _together(judged),
            _tied_bytes(graph, stages) // job.mesh.tp,
            zero=setting.zero,
            hidden=min(s.backward + s.forward * bool(setting.zero) for s in judged.stages),
            micro_batches=job.micro_batches,
        ),
        bubble=timeline.bubble,
        zero=setting.zero,
        sequence_parallel=setting.sequence_parallel,
        peak_flops=job.hardware.peak(_dtype(graph)),
        software=str(setting.software),
        signature=dict(signature),
        notes=tuple(notes),
        sharding=tuple(sharding),
    )
    check_plan(plan, graph)
    return plan


def _opened(judged: Judged) -> tuple[list[StageMemory], tuple[int, ...]]:
    """What stages, and the micro-batches of ranks, hold; a block that is computed again is workspace."""
    memories = [judged.memory(index) for index in range(len(judged.stages))]
    peaks = list(judged.timeline.rank_peak_bytes)
    for rank in range(judged.schedule.ranks):
        own = [index for index, of in enumerate(judged.schedule.stage_rank) if of == rank]
        opened = {i: judged.stages[i].block_bytes for i in own if judged.recompute[i]}
        largest = max(opened, key=lambda i: opened[i], default=-1)
        for index, nbytes in opened.items():
            held = memories[index]
            memories[index] = replace(
                held,
                activations=held.activations - nbytes,
                workspace=held.workspace + nbytes * (index == largest),
            )
        peaks[rank] -= max(opened.values(), default=0)
    return memories, tuple(peaks)


def _together(judged: Judged) -> list[StageMemory]:
    """What each pipeline rank holds throughout a step."""
    totals = [StageMemory()] * judged.schedule.ranks
    for index, rank in enumerate(judged.schedule.stage_rank):
        held, own = totals[rank], judged.memory(index)
        totals[rank] = StageMemory(
            held.weights + own.weights, held.gradients + own.gradients, held.optimizer + own.optimizer
        )
    return totals


def _dtype(graph: ProxyGraph) -> str:
    """That of most weights."""
    elements = Counter[str]()
    for parameter in graph.parameters:
        elements[parameter.dtype] += parameter.numel * (not parameter.buffer)
    return elements.most_common(1)[0][0] if elements else "float32"


def _tied_bytes(graph: ProxyGraph, stages: Sequence[StagePlan]) -> int:
    """Bytes of gradients that are summed over stages."""
    return sum(graph.parameter(name).nbytes for name in shared_parameters(stages) if graph.parameter(name).trainable)


def written(schedule: Schedule) -> tuple[str, ...]:
    """Each rank's actions in words, as ``Plan.orders`` has them."""
    return tuple(" ".join(map(str, order)) for order in schedule.orders)


def shared_parameters(stages: Sequence[StagePlan]) -> dict[str, tuple[int, ...]]:
    """The parameters (first names) that stand on several stages, with those stages."""
    places: dict[str, list[int]] = {}
    for stage in stages:
        for name in stage.params:
            places.setdefault(name, []).append(stage.index)
    return {name: tuple(found) for name, found in places.items() if len(found) > 1}


def check_plan(plan: Plan, graph: ProxyGraph) -> None:
    """Refuse a plan that loses or doubles an op or parameter of the graph, or does not name a value that crosses.

    Raises ValueError saying which. Worth calling on a plan that was edited, or made for another version of the model.
    """
    for before, after in pairwise(plan.stages):
        if before.stop != after.start:
            raise ValueError(f"stage {before.index} ends at op {before.stop}, but the next begins at op {after.start}")
    if plan.crossings != crossings(graph, plan.starts):
        raise ValueError("the plan's crossings are not those of the graph at these cuts: make the plan again")
    needs = residents(graph)
    for stage in plan.stages:
        held, needed = {*stage.params, *stage.buffers}, set(held_by(needs, stage.start, stage.stop))
        if held != needed:
            raise ValueError(
                f"stage {stage.index} needs {_some(needed - held)} that the plan does not put there, "
                f"and holds {_some(held - needed)} that it does not need"
            )
    placed = {name for stage in plan.stages for name in (*stage.params, *stage.buffers)}
    if missing := {p.name for p in graph.parameters} - placed:
        raise ValueError(f"no stage holds {_some(missing)}: every parameter must stand on a stage")
    if dict(plan.shared) != shared_parameters(plan.stages):
        raise ValueError(
            f"parameters on several stages are {shared_parameters(plan.stages)}, the plan says {plan.shared}"
        )
    if (place := next((i for i, (a, b) in enumerate(pairwise(plan.units)) if a.stop != b.first), None)) is not None:
        raise ValueError(f"unit {plan.units[place].name} ends where {plan.units[place + 1].name} does not begin")


def _some(names: set[str], most: int = 5) -> str:
    listed = sorted(names)
    return ", ".join(listed[:most]) + (f" and {len(listed) - most} more" if len(listed) > most else "") or "nothing"


def _units(
    graph: ProxyGraph, costs: Sequence[Cost], pieces: Sequence[Piece], starts: Sequence[int]
) -> tuple[Unit, ...]:
    """The pieces with their stages; one that a cut goes through becomes parts, named ``(1/2)`` and so on."""
    parts: list[tuple[Piece, str, int, int]] = []
    for piece in pieces:
        inside = [start for start in starts if piece.first < start < piece.stop]
        borders = [piece.first, *inside, piece.stop]
        for number, (first, stop) in enumerate(pairwise(borders), start=1):
            parts.append((piece, f"{piece.name} ({number}/{len(borders) - 1})" if inside else piece.name, first, stop))
    firsts = [first for _, _, first, _ in parts]
    producer = graph.producer
    made: list[Unit] = []
    for index, (piece, name, first, stop) in enumerate(parts):
        ops, spent = graph.ops[first:stop], costs[first:stop]
        reads = {bisect_right(firsts, producer[value]) - 1 for op in ops for value in op.inputs}
        made.append(
            Unit(
                name=name,
                type=piece.type,
                block=piece.block,
                stage=bisect_right(starts, first) - 1,
                first=first,
                stop=stop,
                flops=sum(cost.flops for cost in spent),
                seconds=sum(cost.seconds for cost in spent),
                param_bytes=sum(graph.parameter(held).nbytes for held in graph.params_of(ops)),
                activation_bytes=sum(cost.saved_bytes for cost in spent),
                reads=tuple(sorted(reads - {index})),
            )
        )
    return tuple(made)

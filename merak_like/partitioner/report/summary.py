"""What the tables and the page show but the plan only implies: traffic over each cut, balance, memory by kind."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

from merak_like.partitioner.plan import Crossing, Plan, StageMemory, StagePlan
from merak_like.partitioner.report.text import ranges

MEMORY_KINDS: tuple[str, ...] = tuple(f.name for f in fields(StageMemory))


@dataclass(frozen=True, slots=True)
class Cut:
    """The border between stages ``after`` and ``after + 1``."""

    after: int
    crossings: tuple[Crossing, ...]
    """Values made at or before this border and read beyond it, each once."""
    nbytes: int
    """Bytes of one micro-batch, forward."""


def cuts(plan: Plan) -> tuple[Cut, ...]:
    """Every border between two neighbouring stages, with what crosses it.

    ::

        stage 0 │ stage 1 │ stage 2
           x ───┼──► x    │           x crosses cut 0
           y ───┼─────────┼──► y      y crosses cut 0 and cut 1
    """
    borders: list[Cut] = []
    for after in range(len(plan.stages) - 1):
        over = tuple(c for c in plan.crossings if c.source <= after < max(c.targets))
        borders.append(Cut(after, over, sum(c.nbytes for c in over)))
    return tuple(borders)


def holds(plan: Plan, stage: StagePlan) -> tuple[str, ...]:
    """The blocks of a stage that have parameters: what a person would say it holds. All of them if none has."""
    tied = {names[0]: names for names in plan.ties}
    names = [alias for name in stage.params for alias in tied.get(name, (name,))]
    modules = {name[:end] for name in names for end in range(len(name)) if name[end] == "."}
    return tuple(block for block in stage.blocks if block in modules) or stage.blocks


def sent_bytes(plan: Plan, stage: int) -> int:
    """Bytes a stage sends forward for one micro-batch: each value once for every stage that reads it."""
    return sum(c.nbytes * len(c.targets) for c in plan.crossings if c.source == stage)


def received_bytes(plan: Plan, stage: int) -> int:
    """Bytes a stage receives forward for one micro-batch."""
    return sum(c.nbytes for c in plan.crossings if stage in c.targets)


def stage_seconds(stage: StagePlan) -> float:
    """Forward and backward of one micro-batch."""
    return stage.forward_seconds + stage.backward_seconds


def shares(plan: Plan) -> tuple[float, ...]:
    """Each stage's time as a fraction of the slowest stage's: all 1.0 is perfect balance."""
    times = [stage_seconds(stage) for stage in plan.stages]
    slowest = max(times) or 1.0
    return tuple(time / slowest for time in times)


def samples(plan: Plan) -> int:
    """Samples trained in one step over all replicas."""
    return plan.mesh.dp * plan.micro_batches * plan.micro_batch


def tight_rank(plan: Plan) -> int:
    """The pipeline rank that is fullest."""
    return max(range(plan.mesh.pp), key=lambda rank: plan.rank_bytes[rank])


def fits(plan: Plan) -> bool:
    """Does every rank stay within the memory limit?"""
    return max(plan.rank_bytes) <= plan.memory_limit


def shared_ranks(plan: Plan) -> bool:
    """Does a rank run several stages?"""
    return len(plan.stages) > plan.mesh.pp


def again(plan: Plan, stage: StagePlan) -> str:
    """How much of a stage is computed again, as in ``3 of 8 units``; nothing where it keeps everything."""
    of = sum(unit.stage == stage.index for unit in plan.units)
    return f"{len(stage.recompute)} of {of} units" if stage.recompute else ""


def recomputed(plan: Plan) -> list[str]:
    """What each stage computes again, in words; stages that keep everything are left out."""
    return [
        f"stage {stage.index}, {again(plan, stage)}: {', '.join(ranges(stage.recompute))}"
        for stage in plan.stages
        if stage.recompute
    ]


def as_json(plan: Plan) -> dict[str, Any]:
    """The numbers of the tables, for scripts: the plan without its units, with totals and cuts."""
    stages = [
        {
            **{key: item for key, item in asdict(stage).items() if key != "params"},
            "holds": ranges(holds(plan, stage)),
            "memory": {**asdict(stage.memory), "total": stage.memory.total},
            "share_of_slowest": share,
            "sent_bytes": sent_bytes(plan, stage.index),
            "received_bytes": received_bytes(plan, stage.index),
        }
        for stage, share in zip(plan.stages, shares(plan), strict=True)
    ]
    return {
        "digest": plan.digest,
        "model": plan.model,
        "mesh": asdict(plan.mesh),
        "hardware": plan.hardware,
        "schedule": plan.schedule,
        "orders": plan.orders,
        "micro_batches": plan.micro_batches,
        "micro_batch": plan.micro_batch,
        "samples_per_step": samples(plan),
        "step_seconds": plan.step_seconds,
        "pipeline_seconds": plan.pipeline_seconds,
        "after_seconds": plan.after,
        "mfu": plan.mfu,
        "memory_bytes": plan.memory_bytes,
        "bubble": plan.bubble,
        "memory_limit": plan.memory_limit,
        "rank_bytes": plan.rank_bytes,
        "rank_activation_bytes": plan.rank_activation_bytes,
        "fits": fits(plan),
        "stages": stages,
        "cuts": [{"after": c.after, "nbytes": c.nbytes, "values": [x.value for x in c.crossings]} for c in cuts(plan)],
        "crossings": [asdict(crossing) for crossing in plan.crossings],
        "ties": plan.ties,
        "shared": plan.shared,
        "notes": plan.notes,
    }

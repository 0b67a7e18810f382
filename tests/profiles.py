"""Profiles made by hand: no engine, no clock."""

from __future__ import annotations

from merak_like.partitioner.plan import Plan
from merak_like.partitioner.planned import schedule_of
from merak_like.partitioner.recorded import Record, Recorded, Step
from merak_like.partitioner.report.compare import planned_step


def as_run(plan: Plan, *, slower: float = 1.0, late: float = 0.0, after: float = 0.0) -> Step:
    """A step that went as planned on every replica, but slower, begun late, and with an end of its own."""
    planned = planned_step(plan, schedule_of(plan))
    ranks = tuple(
        tuple(Record(r.action, slower * r.start + late, slower * r.end + late, slower * r.waited) for r in records)
        for records in planned.records
    )
    return Step(ranks * plan.mesh.dp, (slower * planned.makespan + late + after,) * plan.mesh.size)


def profile(plan: Plan, *steps: Step) -> Recorded:
    return Recorded(plan.digest, tuple(step.records for step in steps), tuple(step.tails for step in steps))

"""The planned step above the measured one: a picture, a trace and a table of where the time of each rank went."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from itertools import zip_longest
from typing import Any

from rich.console import RenderableType

from merak_like.partitioner.mesh import Coord
from merak_like.partitioner.plan import Plan
from merak_like.partitioner.planned import costs_of, schedule_of
from merak_like.partitioner.recorded import Recorded, Step
from merak_like.partitioner.report import shares
from merak_like.partitioner.report.lanes import (
    AFTER,
    LEFT,
    TRANSFER,
    WAIT,
    Lanes,
    Mark,
    document,
    events,
    head,
    process,
    span,
)
from merak_like.partitioner.report.text import percent_text, seconds_text
from merak_like.partitioner.schedules.action import Order, Schedule
from merak_like.partitioner.schedules.passes import add_transfers
from merak_like.partitioner.simulator import simulate

APART = 3.0
"""Of two steps of which one takes more than so many times the other, each has its own scale: on one, it is a smear."""


@dataclass(frozen=True)
class Comparison:
    """A plan's simulated step, by pipeline rank, and a measured one, by rank of the job."""

    plan: Plan
    schedule: Schedule
    planned: Step
    measured: Step
    told: str
    """Which of the measured steps it is."""

    @property
    def pipelines(self) -> tuple[tuple[int, ...], ...]:
        """The ranks of the job that make up each pipeline."""
        mesh = self.plan.mesh
        return tuple(
            tuple(mesh.rank(Coord(dp, pp, tp)) for pp in range(mesh.pp))
            for dp in range(mesh.dp)
            for tp in range(mesh.tp)
        )

    @property
    def slowest(self) -> int:
        """The pipeline that the others wait for."""
        spans = [self.measured.only(ranks).makespan for ranks in self.pipelines]
        return spans.index(max(spans))


def compare(plan: Plan, recorded: Recorded) -> Comparison:
    """Put a plan's step beside the median one of a profile. Raises ValueError where they do not belong together."""
    if recorded.plan != plan.digest:
        raise ValueError(
            f"the profile is of plan {recorded.plan[:12]}, but this plan is {plan.digest[:12]}: give the plan that was "
            "run, or measure this one"
        )
    schedule, index = schedule_of(plan), recorded.median
    measured = recorded.step(index)
    if len(measured.records) != plan.mesh.size:
        raise ValueError(f"the profile has {len(measured.records)} ranks, but {plan.mesh} has {plan.mesh.size}")
    for rank, records in enumerate(measured.records):
        did = tuple(record.action for record in records if record.action.peer < 0)
        _check_same(did, schedule.orders[plan.mesh.coord(rank).pp], rank)
    told = f"step {index}, the median of {len(recorded.steps)}" if recorded.steps[1:] else "one step"
    return Comparison(plan, schedule, planned_step(plan, schedule), measured, told)


def planned_step(plan: Plan, schedule: Schedule) -> Step:
    """Simulate a plan as the engine carries it out, each value sent straight from stage to stage.

    Where neither the plan nor a preset says how fast the links are, transfers take no time.
    """
    edges = frozenset((crossing.source, target) for crossing in plan.crossings for target in crossing.targets)
    return Step.planned(simulate(add_transfers(schedule, edges), costs_of(plan), edges))


def table(comparison: Comparison) -> RenderableType:
    """Shares of every rank of the job, for a terminal."""
    ranks = range(comparison.plan.mesh.size)
    return shares.table(_rows(comparison, ranks))


def facts(comparison: Comparison) -> tuple[str, str]:
    """The planned and the measured step in a line each."""
    planned, measured = comparison.planned, comparison.measured
    times = f" · {measured.makespan / planned.makespan:.2f} times the plan" if planned.makespan > 0 else ""
    return (
        f"{seconds_text(planned.makespan)} · {percent_text(planned.bubble)} bubble · for {comparison.plan.hardware}",
        f"{seconds_text(measured.makespan)}{times} · {percent_text(measured.bubble)} bubble · then "
        f"{seconds_text(measured.seconds - measured.makespan)} reduction and optimizer · {comparison.told}",
    )


def to_svg(comparison: Comparison) -> str:
    """Draw the planned lanes above those of the slowest pipeline, and the shares of its ranks below."""
    plan, schedule, planned = comparison.plan, comparison.schedule, comparison.planned
    ranks = comparison.pipelines[comparison.slowest]
    measured = comparison.measured.only(ranks)
    longest = max(planned.seconds, measured.seconds)
    apart = longest > APART * min(planned.seconds, measured.seconds)
    title = f"{plan.model}, {plan.schedule}"
    about = f"{plan.micro_batches} micro-batches · {len(plan.stages)} stages on {plan.mesh}"
    says, said = facts(comparison)
    if len(comparison.pipelines) > 1:
        said += f" · pipeline {comparison.slowest} of {len(comparison.pipelines)}, the slowest"
    above = _lanes(schedule, planned, 104, planned.seconds if apart else longest, range(len(ranks)))
    below = _lanes(schedule, measured, above.bottom + 44, measured.seconds if apart else longest, ranks)
    scales = " · each on its own scale, they are too far apart for one" if apart else ""
    body = [
        *head(schedule, title, about, (WAIT, TRANSFER, AFTER)),
        *_heading("planned", says + scales, above.top - 8),
        *above.draw(),
        *_heading("measured", said, below.top - 8),
        *below.draw(),
    ]
    rows, top = _rows(comparison, ranks), below.bottom + 40
    return document([*body, *shares.draw(rows, top)], top + shares.height(rows) + 24, title)


def to_chrome(comparison: Comparison) -> str:
    """Write the trace events: a process for the plan and one for all ranks of the job, waits and transfers included."""
    schedule, planned = comparison.schedule, comparison.planned
    made = [
        *process(0, "planned step"),
        *_traced(schedule, planned, 0, range(schedule.ranks)),
        *process(1, "measured step"),
    ]
    for ranks in comparison.pipelines:
        made += _traced(schedule, comparison.measured.only(ranks), 1, ranks)
    return json.dumps({"displayTimeUnit": "ms", "traceEvents": made}) + "\n"


def _rows(comparison: Comparison, ranks: Sequence[int]) -> Sequence[shares.Row]:
    planned = comparison.planned.only([comparison.plan.mesh.coord(rank).pp for rank in ranks])
    return shares.rows(planned, comparison.measured.only(ranks), [f"rank {rank}" for rank in ranks])


def _lanes(schedule: Schedule, step: Step, top: float, extent: float, ranks: Sequence[int]) -> Lanes:
    return Lanes(schedule, step, top, extent, seconds_text, ranks, _marks(step))


def _traced(schedule: Schedule, step: Step, pid: int, ranks: Sequence[int]) -> Iterator[dict[str, Any]]:
    yield from events(schedule, step, pid=pid, ranks=ranks)
    for lane, start, end, what, category, _ in _marks(step):
        yield span(pid, ranks[lane], start, end, what, category, {})


def _marks(step: Step) -> list[Mark]:
    """Waits, transfer calls and what comes after the last action."""
    made: list[Mark] = []
    for rank, (records, tail) in enumerate(zip(step.records, step.tails, strict=True)):
        for action, start, end, waited in records:
            if waited > 0:
                made.append(Mark(rank, start, min(start + waited, end), f"wait in {action}", *WAIT))
            if action.peer >= 0:
                made.append(Mark(rank, min(start + waited, end), end, f"call of {action}", *TRANSFER))
        if records and tail > records[-1].end:
            made.append(Mark(rank, records[-1].end, tail, "reduction, norm and optimizer", *AFTER))
    return made


def _check_same(did: Order, order: Order, rank: int) -> None:
    for one, other in zip_longest(did, order, fillvalue="nothing"):
        if one != other:
            raise ValueError(f"rank {rank} did {one} where the plan says {other}: the profile is damaged")


def _heading(name: str, said: str, y: float) -> Iterator[str]:
    yield f'<text x="{LEFT}" y="{y:g}"><tspan class="rank">{name}</tspan>'
    yield f'<tspan class="dim" dx="10">{escape(said)}</tspan></text>'
